"""A small configuration for every architecture of mlx-lm, from the fields of its ``ModelArgs``."""

import importlib
import pkgutil
import sys
from dataclasses import fields
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models

VOCAB = 96
WINDOW = 16  # of all sliding-window layers

# By the name of the field; what a model does not know is left out.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    # the same under other names
    "num_vocab": VOCAB,
    "embedding_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "d_model": 64,
    "n_embd": 64,
    "hidden_dim": 64,
    "model_dim": 64,
    "block_dim": 64,
    "dim_model_base": 64,
    "n_inner": 96,
    "mlp_hidden_size": 128,
    "ffn_hidden_size": 96,
    "shared_intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "n_kv_heads": 2,
    "num_kv_heads": 2,
    "num_attention_groups": 2,
    "kv_channels": 16,
    "hidden_size_per_head": 16,
    "hidden_size_per_layer_input": 8,
    "n_ctx": 1024,
    "n_positions": 1024,
    "block_size": 1024,
    "model_max_length": 1024,
    "original_max_position_embeddings": 512,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "rotary_dim": 16,
    "partial_rotary_factor": 0.5,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "share_expert_dim": 32,
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "zero_expert_num": 1,
    "zero_expert_type": "identity",
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "attention_method": "MLA",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    # sliding windows
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_window_size": WINDOW,
    "window_size": WINDOW,
    "loop_window_size": WINDOW,
    "sliding_window_pattern": 2,
    # recurrent layers
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 16,
    "mamba_proj_bias": False,
    "ssm_state_size": 8,
    "state_size": 8,
    "conv_kernel": 4,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "time_step_rank": 4,
    "time_step_limit": [0.01, 10.0],
    "conv_L_cache": 3,
    "group_norm_size": 1,
    # numbers that only have to be there
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_conv_bias": True,
    "use_qk_norm": True,
    "use_expert_bias": True,
    "conv_bias": False,
    "qk_norm": True,
    "post_norm": False,
    "tie_word_embeddings": True,
    "logits_scaling": 1.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "scale_depth": 1.4,
    "scale_emb": 1.0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "rope_scaling": None,
    "hidden_act": "silu",
}

SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
LINEAR_THEN_FULL = ["linear_attention", "full_attention"]
LLAMA4_ROPE = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
ALPHA = {"type": "dynamic", "factor": 1.0, "alpha": 1.0}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "mscale_all_dim": 1.0}
GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": SLIDING_THEN_FULL * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
}
KDA = {
    "linear_attn_config": {
        "kda_layers": [1],
        "full_attn_layers": [2],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    }
}
QWEN35 = {"num_hidden_layers": 4, "full_attention_interval": 2, "mlp_only_layers": []}

# What the name of a field does not tell.
METAL = {"bitnet": "mlx_lm.models.bitlinear_layers", "muse_spark": "mlx_lm.kernels."}  # where their kernels are
OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 1, "num_layers": 3},
    "afmoe": {"layer_types": SLIDING_THEN_FULL},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2, "tie_word_embeddings": False},
    "bailing_hybrid": {"layer_group_size": 2},
    "bailing_moe_linear": {"layer_group_size": 2},
    "bailing_moe_v3": {"layer_group_size": 2},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"rope_scaling": YARN, "topk_method": "gready", "num_key_value_heads": 4},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": SLIDING_THEN_FULL, "is_moe_layer": [False, True]},
    "gear": {"layer_types": SLIDING_THEN_FULL},
    "gemma3": {"text_config": {"model_type": "gemma3_text"}},
    "gemma3n": {
        "text_config": {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": SLIDING_THEN_FULL * 2,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        }
    },
    "gemma4": {"text_config": {"model_type": "gemma4_text", **GEMMA4}},
    "gemma4_text": GEMMA4,
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 10000.0}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan": {"use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2, "rope_scaling": ALPHA},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k25": {"text_config": {}},
    "kimi_k3": {"text_config": {**KDA, "hidden_act": "situ", "activation_situ_beta": 1.0}},
    "kimi_linear": KDA,
    "kimi_vl": {"text_config": {}},
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "lfm2-vl": {
        "text_config": {
            "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 16,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
        }
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {
        "text_config": {
            "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 1,
            "num_hidden_layers": 4,
            "num_experts_per_tok": 1,
        }
    },
    "llama4_text": {"no_rope_layers": [1, 0]},
    "mellum": {
        "layer_types": SLIDING_THEN_FULL,
        "rope_parameters": {x: {"rope_theta": 10000.0, "rope_type": "default"} for x in SLIDING_THEN_FULL},
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "minicpm3": {
        "rope_scaling": {"original_max_position_embeddings": 512, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    },
    "minimax_m3_vl": {
        "text_config": {
            "dense_intermediate_size": 96,
            "moe_layer_freq": [0, 1],
            "sparse_attention_config": {
                "sparse_num_index_heads": 2,
                "sparse_index_dim": 16,
                "sparse_block_size": 4,
                "sparse_topk_blocks": 2,
                "sparse_local_block": 1,
                "sparse_attention_freq": [0, 1],
            },
        }
    },
    "ministral3": {"rope_parameters": LLAMA4_ROPE},
    "mistral3": {"text_config": {"model_type": "ministral3", "rope_parameters": LLAMA4_ROPE}},
    "mistral4": {"rope_parameters": LLAMA4_ROPE},
    "muse_glimmer": {"num_hidden_layers": 4},
    "muse_spark": {
        "text_config": {
            "post_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0},
            "layer_rope_theta": [10000.0, 0],
            "layer_types": SLIDING_THEN_FULL,
            "final_logit_softcapping": 30.0,
            "output_multiplier": 1.0,
            "moe_hidden_size": 32,
            "num_shared_experts": 0,
        }
    },
    "nemotron-nas": {
        "num_hidden_layers": 3,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 0.5}},
        ],
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "E"]},
    "olmo3": {"layer_types": SLIDING_THEN_FULL},
    "olmo_hybrid": {"layer_types": LINEAR_THEN_FULL, "linear_allow_neg_eigval": True},
    "openelm": {
        "num_transformer_layers": 2,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 1.5],
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 96,
        "gegelu_limit": 20.0,
        "num_hidden_layers": 2,
    },
    "pixtral": {"text_config": {"model_type": "llama"}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"full_attention_idx": [1], "num_hidden_layers": 4},
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": "lm_head", "embedding": False, "dtype": "float16", "block": 0}],
        "text_config": {**QWEN35, "hidden_size": 128, "tie_word_embeddings": False},
    },
    "qwen2_vl": {"text_config": {"model_type": "qwen2"}},
    "qwen3_5": {"text_config": QWEN35},
    "qwen3_5_moe": {"text_config": QWEN35},
    "qwen3_next": {"num_hidden_layers": 4, "full_attention_interval": 2},
    "qwen3_vl": {"text_config": {"model_type": "qwen3"}},
    "qwen3_vl_moe": {"text_config": {"model_type": "qwen3_moe"}},
    "recurrent_gemma": {"conv1d_width": 4, "logits_soft_cap": 30.0, "block_types": ["recurrent", "attention"]},
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "spark2_5": {
        "layer_types": SLIDING_THEN_FULL,
        "rope_parameters": {x: {"rope_theta": 10000.0} for x in SLIDING_THEN_FULL},
        "hidden_act": "gelu",
    },
    "stablelm": {"use_qkv_bias": False},
}


def architectures() -> list[str]:
    """Every module of ``mlx_lm.models`` that is a model."""
    names = [m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return [name for name in names if hasattr(module(name), "ModelArgs")]


def module(name: str) -> ModuleType:
    """A module of ``mlx_lm.models``. OLMo's wants another package, of which it uses nothing."""
    sys.modules.setdefault("hf_olmo", ModuleType("hf_olmo"))
    found = importlib.import_module(f"mlx_lm.models.{name}")
    if name in METAL and not mx.metal.is_available():
        for home in [m for path, m in sys.modules.items() if path.startswith(METAL[name])]:
            for kernel in [x for x in vars(home) if x.startswith("_") and x.endswith("_kernel")]:
                setattr(home, kernel, _nothing)
    return found


def architecture(name: str) -> nn.Module:
    """A small model of one of mlx-lm's architectures, with random weights."""
    home = module(name)
    return home.Model(home.ModelArgs.from_dict(config(name)))


def _nothing(*, inputs: list[Any], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
    """In place of a Metal kernel, so that a model can be probed without Metal: zeros that depend on its inputs."""
    made = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
    return mx.depends(made, [x for x in inputs if isinstance(x, mx.array)])


def config(name: str) -> dict[str, Any]:
    """A configuration as a ``config.json`` has it."""
    own = OVERRIDES.get(name, {})
    made = {**SMALL, "model_type": name, **own}
    if "text_config" in own:
        made["text_config"] = {**SMALL, "model_type": name, **own["text_config"]}
    known = {f.name for f in fields(module(name).ModelArgs)}
    return {key: value for key, value in made.items() if key in known}
