"""Tiny models of many architectures, from configurations as a ``config.json`` has them."""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.utils import _get_classes
from model_configs import VOCAB, WINDOW, architecture

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # LLaMA-2: as many KV heads as query heads, head dim 128.
    "llama2": {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 128},
    "llama_gqa": {"model_type": "llama", "head_dim": 16, "rope_theta": 500000.0},
    "llama_sliding": {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": WINDOW,
    },
    "mistral": {"model_type": "mistral", "num_attention_heads": 8, "head_dim": 16, "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **EXPERTS,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
        "head_dim": 32,
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
    },
    "phi3": {"model_type": "phi3"},
    "gemma3_text": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "sliding_window_pattern": 2,
        "sliding_window": WINDOW,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
    },
    # Layers of different head dims.
    "gemma4": {**GEMMA4, "num_kv_shared_layers": 0},
    "mixtral": {"model_type": "mixtral", **EXPERTS},
    # Falcon: one KV head for all query heads.
    "multi_query": {"model_type": "llama", "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 64},
    "gpt_oss": {
        "model_type": "gpt_oss",
        **EXPERTS,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "starcoder2": {"model_type": "starcoder2"},
    # Keys and values of different head dims.
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "mscale_all_dim": 1.0},
    },
}
SLIDING = {"llama_sliding": [0, 2], "gemma3_text": [0, 2], "gemma4": [0, 2], "gpt_oss": [0]}  # layers with a window

# Attention that does not go through mlx-lm's function as it is: see test_other_attention.py.
OTHERS = [
    "gemma2",  # a soft cap
    "deepseek_v3",  # latent rows
    "mistral4",  # latent rows, put together otherwise
    "gemma4_text",  # later layers use an earlier one's keys and values
    "gemma3n",
    "olmo",
    "plamo",
    "plamo2",
    "stablelm",
]


@cache
def build(name: str) -> nn.Module:
    """A float32 model with random weights, in which every parameter matters: of CONFIGS, or any of mlx-lm's."""
    mx.random.seed(len(name))
    if name not in CONFIGS:
        model = architecture(name)
    else:
        made, arguments = _get_classes({**SIZES, **CONFIGS[name]})
        model = made(arguments.from_dict({**SIZES, **CONFIGS[name]}))

    def prepare(x: mx.array) -> mx.array:
        if not mx.issubdtype(x.dtype, mx.floating):
            return x
        constant = x.max().item() == x.min().item()  # attention sinks, biases and norms start as constants
        return x.astype(mx.float32) + (0.3 * mx.random.normal(x.shape) if constant else 0.0)

    model.update(tree_map(prepare, model.parameters()))
    mx.eval(model.parameters())
    return model
