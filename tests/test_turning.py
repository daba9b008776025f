"""What moves a model's queries by some positions: right for models that rotate, refused where they do otherwise."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from architectures import SIZES, build
from mlx_lm.models import gpt2, llama
from mlx_lm.utils import _get_classes
from test_saved import falcon
from tiny import f64, feed, greedy

import zm_mlx
from zm_mlx.host import turning
from zm_mlx.host.hook import attention
from zm_mlx.host.model_caches import zero_merge
from zm_mlx.host.probe import probe
from zm_mlx.host.turning import turns
from zm_mlx.policies import ZeroMerge

BY = 512
SCALED = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}
OTHERS = {
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.4},
    "gpt_neox": {
        "model_type": "gpt_neox",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
    },
    "glm4": {
        "model_type": "glm4",
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000,
        "head_dim": 16,
        "attention_bias": True,
    },
    "cohere": {"model_type": "cohere", "layer_norm_eps": 1e-5, "logit_scale": 0.1},
}
FULL = ["llama2", "llama_gqa", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "multi_query", "starcoder2", "gpt_oss"]


def scaled(name, dtype=mx.float32):
    mx.random.seed(3)
    sizes = {**SIZES, "head_dim": 16, "rope_scaling": SCALED[name]}
    model = llama.Model(llama.ModelArgs.from_dict({**sizes, "model_type": "llama"}))
    model.set_dtype(dtype)
    return model


def other(name):
    made, arguments = _get_classes({**SIZES, **OTHERS[name]})
    mx.random.seed(3)
    return made(arguments.from_dict({**SIZES, **OTHERS[name]}))


class Listening:
    """A cache at a position of choice that keeps the queries of a call, and answers with the values."""

    def __init__(self, begin):
        self.offset = begin

    def update_and_fetch(self, keys, values):
        return keys, values

    def make_mask(self, length, return_array=False, window_size=None):
        return "causal"


def queries_at(model, offset, monkeypatch):
    """All layers' queries of four tokens at a position, by mlx-lm's own code, where attention is left out."""
    heard = []

    def listen(queries, keys, values, cache, scale, mask, sinks=None):
        heard.append(queries)
        return mx.zeros((*queries.shape[:3], values.shape[-1]), queries.dtype)

    for module in model.modules():
        for function in vars(type(module)).values():
            names = getattr(function, "__globals__", {})
            if names.get("scaled_dot_product_attention") is attention:
                monkeypatch.setitem(names, "scaled_dot_product_attention", listen)
    model(mx.array([[5, 9, 2, 7]]), cache=[Listening(offset) for _ in model.layers])
    monkeypatch.undo()
    return heard


def assert_moves(model, found, monkeypatch, atol=1e-4):
    """At other positions, and with other tokens, than those at which the matrices were checked."""
    here, later = queries_at(model, 40, monkeypatch), queries_at(model, 40 + BY, monkeypatch)
    assert len(here) == len(found)
    for matrix, x, y in zip(found, here, later, strict=True):
        size = float(mx.abs(y).max())
        np.testing.assert_allclose(f64(x.astype(mx.float32) @ matrix), f64(y), atol=atol * size)
        assert np.abs(f64(x) - f64(y)).max() > 0.05 * size, "nothing moved"


@pytest.mark.parametrize("name", SCALED)
def test_every_scaling_of_a_llama(name, monkeypatch):
    model = scaled(name)
    found = turns(model, probe(model), BY)
    assert len(found) == 2 and all(x is not None and x.dtype == mx.float32 for x in found)
    assert found[0] is found[1], "layers that rotate alike share an array"
    assert_moves(model, found, monkeypatch)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama3", "yarn"])
def test_16_bit_models(name, dtype, monkeypatch):
    model = scaled(name, dtype)
    found = turns(model, probe(model), BY)
    assert_moves(model, found, monkeypatch, atol=0.03)


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_rotate_a_part_of_a_query_or_in_another_order(name, monkeypatch):
    model = other(name)
    found = turns(model, probe(model), BY)
    assert_moves(model, found, monkeypatch)
    if name != "cohere":  # most of a query is not rotated
        assert float((mx.diag(found[0]) == 1).sum()) >= found[0].shape[0] // 2


@pytest.mark.parametrize("name", FULL)
def test_known_architectures_have_a_rotation_in_every_full_layer(name):
    model = build(name)
    shapes = probe(model)
    found = turns(model, shapes, BY)
    assert [x is not None and x.shape for x in found] == [(s.head_dim, s.head_dim) for s in shapes]


@pytest.mark.parametrize("name", ["llama_sliding", "gemma3_text", "gemma4"])
def test_of_layers_with_a_window_no_rotation_is_taken(name):
    """They rotate by another base; the caches that are ours belong to other layers."""
    model = build(name)
    shapes = probe(model)
    found = turns(model, shapes, BY)
    assert [x is not None and x.shape for x in found] == [(s.head_dim, s.head_dim) for s in shapes]


def test_layers_that_keep_their_caches_in_lists():
    model = falcon()
    shapes = probe(model)
    assert [x is not None and x.shape for x in turns(model, shapes, BY)] == [(s.head_dim, s.head_dim) for s in shapes]


def test_a_layer_without_rotation_keeps_its_queries_and_the_others_theirs(monkeypatch):
    """SmolLM3 rotates in three of four layers."""
    config = {**SIZES, "model_type": "smollm3", "no_rope_layers": [1, 0], "tie_word_embeddings": False}
    made, arguments = _get_classes(config)
    model = made(arguments.from_dict(config))
    rotated, still = turns(model, probe(model), BY)
    assert rotated is not None and not mx.allclose(rotated, mx.eye(16), atol=0.1)
    assert still is None or mx.allclose(still, mx.eye(16))


def test_latent_attention_of_deepseek_has_none():
    model = build("deepseek_v2")
    assert turns(model, probe(model), BY) == [None, None]


def test_latent_attention_is_told_apart_by_its_queries():
    """MiniCPM3 rotates the end of a query; its ``rope`` by itself turns the beginning."""
    config = {
        **SIZES,
        "model_type": "minicpm3",
        "num_key_value_heads": 4,
        "dim_model_base": 64,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "scale_depth": 1.4,
        "scale_emb": 12,
        "rope_scaling": {**SCALED["longrope"], "short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    }
    made, arguments = _get_classes(config)
    model = made(arguments.from_dict(config))
    shapes = probe(model)
    assert turning._matrix(model.layers[0], shapes[0].head_dim, BY) is not None
    assert turns(model, shapes, BY) == [None, None]


def positions_by_table():
    args = {"n_ctx": 1024, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 1024, "layer_norm_epsilon": 1e-5}
    mx.random.seed(3)
    return gpt2.Model(gpt2.ModelArgs.from_dict({"model_type": "gpt2", "vocab_size": 96, **args}))


@pytest.mark.parametrize("make", [positions_by_table, lambda: build("deepseek_v2")], ids=["gpt2", "deepseek_v2"])
@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_where_none_is_known_the_policy_works_by_attention_alone(make, prefill):
    """No piece is held, nothing is read, and what is kept is what attention says."""
    model, tokens = make(), tiny.prompt(90)
    caches = zm_mlx.make_prompt_cache(model, 48, prompt_length=90, prefill=prefill)
    alone = zm_mlx.make_prompt_cache(model, 48, prompt_length=90, prefill=prefill, policy=ZeroMerge(score="attention"))
    for part in (tokens[:, :50], tokens[:, 50:]):
        feed(model, caches, part), feed(model, alone, part)
        if prefill == "streaming":
            assert [c.layer.recent_rows for c in caches] == [c.layout.recent for c in caches]
    for a, b in zip(zero_merge(caches), zero_merge(alone), strict=True):
        assert a.operations.turn is None and not a.layer.reading.kept.any() and not a.layer.reading.recent.any()
        assert mx.array_equal(a.layer.kept.position, b.layer.kept.position)
    assert np.array_equal(*(greedy(model, x, tokens[:, :1], 5)[0] for x in (caches, alone)))


# ---- models that lie


class Other(llama.nn.Module):
    """Is called ``rope`` and rotates by another base than the attention beside it."""

    def __call__(self, x, offset=0):
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=77.0, scale=1.0, offset=offset)


class Faster(Other):
    """Rotates the faster the later it is."""

    def __call__(self, x, offset=0):
        return super().__call__(x, offset + (offset + x.shape[2]) ** 2 // 64)


class Mirror(Other):
    """Is no rotation at all."""

    def __call__(self, x, offset=0):
        return x[..., ::-1]


class Growing(Other):
    """Makes later queries longer."""

    def __call__(self, x, offset=0):
        return super().__call__(x, offset) * (1 + offset / 100)


class Foreign(Other):
    """Is called in another way."""

    def __call__(self, x, positions):
        return super().__call__(x, int(positions))


def lying(rope, layer):
    """A llama in which a layer has ``rope`` beside the rotation that it uses."""
    model = tiny.model()
    attention = model.layers[layer].self_attn
    true = attention.rope

    class Lying(type(attention)):
        def __call__(self, x, mask=None, cache=None):
            fake, self["rope"] = self["rope"], true
            try:
                return super().__call__(x, mask, cache)
            finally:
                self["rope"] = fake

    attention.__class__ = Lying
    attention.rope = rope
    return model


@pytest.mark.parametrize("rope", [Other(), Faster(), Mirror(), Growing(), Foreign()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_matrix_that_the_models_own_queries_contradict_is_refused(rope, layer):
    """In the layer alone that lies."""
    model = lying(rope, layer)
    found = turns(model, probe(model), BY)
    assert found[layer] is None and found[1 - layer] is not None


def test_a_layer_with_two_rotations_has_none():
    model = tiny.model()
    model.layers[0].second = Other()
    model.layers[0].second.rope = Other()
    found = turns(model, probe(model), BY)
    assert found[0] is None and found[1] is not None


def test_a_rotation_that_depends_on_the_position_is_refused():
    """And used by the model: then no one matrix moves all queries."""
    model = tiny.model()
    for layer in model.layers:
        layer.self_attn.rope = Faster()
    assert turns(model, probe(model), BY) == [None, None]


def test_looking_leaves_the_model_and_random_numbers_as_they_were():
    model = tiny.model()
    mx.random.seed(5)
    before = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(5)
    turns(model, probe(model), BY)
    assert mx.random.uniform(shape=(3,)).tolist() == before
    plain = [model(tiny.prompt(20)) for _ in range(2)]
    assert mx.array_equal(*plain)
