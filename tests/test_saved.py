"""Saved caches: they continue as if never saved, and what does not fit the model raises."""

import os
import re

import mlx.core as mx
import pytest
import tiny
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.utils import _get_classes

import zm_mlx
from zm_mlx.host import saved
from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.policies import Policy
from zm_mlx.state.layout import LayerShape

SMALL = Policy(residual=2, staging=3)
FLOATS = [mx.float32, mx.float16, mx.bfloat16]


def caches(rows=20, layers=2, policy=SMALL, **more):
    return [tiny.cache(rows, policy=policy, **more) for _ in range(layers)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


@pytest.fixture
def model():
    return tiny.model(1)


@pytest.fixture
def file(path, model):
    """A saved cache of 50 tokens in 20 rows."""
    made = caches()
    tiny.feed(model, made, tiny.prompt(50))
    zm_mlx.save_prompt_cache(path, made)
    return path


def assert_same_greedy(model, a, b, more=4, count=12):
    rest = tiny.prompt(more, 77)
    found, logits = tiny.greedy(model, a, rest, count)
    again, others = tiny.greedy(model, b, rest, count)
    assert found.tolist() == again.tolist() and (logits == others).all()


# ---- round trips


@pytest.mark.parametrize("rows", [20, [30, 9]])
@pytest.mark.parametrize("prefill", ["streaming", "exact", "mid-prompt", "cancelled prompt"])
def test_generation_continues_with_the_same_tokens(path, model, rows, prefill):
    more = {
        "streaming": {},
        "exact": {"prefill": "exact", "prompt_length": 50},
        "mid-prompt": {"prefill": "exact", "prompt_length": 53},
        "cancelled prompt": {"prefill": "exact", "prompt_length": 80},
    }[prefill]
    made = caches(rows, **more)
    tiny.feed(model, made, tiny.prompt(50), 9)
    zm_mlx.save_prompt_cache(str(path), made)
    loaded = zm_mlx.load_prompt_cache(str(path), model)
    for a, b in zip(made, loaded, strict=True):
        assert (b.offset, b.layout, b.policy, b.prefill) == (a.offset, a.layout, a.policy, a.prefill)
        assert b.nbytes == a.nbytes and b.layout == a.layout
    assert_same_greedy(model, made, loaded)
    if "prompt" in prefill:
        assert loaded[0].prefill == "streaming"
        assert loaded[0].nbytes == loaded[0].layout.nbytes(LayerShape(2, 16, 16, 4))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("residual", [0, 2])
def test_half_precision_continues_with_the_same_tokens(path, dtype, residual):
    model = tiny.model(1, dtype=dtype)
    made = caches(policy=Policy(residual=residual, staging=3))
    tiny.feed(model, made, tiny.prompt(50), 9)
    zm_mlx.save_prompt_cache(path, made)
    loaded = zm_mlx.load_prompt_cache(path, model)
    assert loaded[0].layer.recent.keys.dtype == dtype
    assert_same_greedy(model, made, loaded)


def test_empty_caches_go_round(path, model):
    zm_mlx.save_prompt_cache(path, caches())
    loaded = zm_mlx.load_prompt_cache(path, model)
    assert all(c.empty() for c in loaded)
    assert_same_greedy(model, caches(), loaded, more=40)


def test_every_setting_of_the_policy_comes_back_exactly(path, model):
    policy = Policy(residual=1, proximity=0.3, staging=2, alpha=0.7, kappa=0.1, decay=0.987654321, pool=3)
    zm_mlx.save_prompt_cache(path, caches(policy=policy))
    assert zm_mlx.load_prompt_cache(path, model)[0].policy == policy


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"prompt": "naïve: ünïcode 🙂", "a.b": "c", "a": "d", "": "", "0": '\0\n"quoted"\\'},
        {"0.zm_mlx_sha256": '"0.zm_mlx_sha256":"' + 64 * "0" + '"', "1": "KVCache", "format": "mlx"},
    ],
    ids=["none", "empty", "names and values", "look-alikes"],
)
def test_metadata_goes_round_exactly(path, model, metadata):
    zm_mlx.save_prompt_cache(path, caches(), metadata)
    assert saved.read(path)[1] == (metadata or {})
    assert len(zm_mlx.load_prompt_cache(path, model)) == 2
    zm_mlx.save_prompt_cache(path, *saved.read(path))  # what was read can be saved again
    assert saved.read(path)[1] == (metadata or {})


# ---- kernels


@pytest.fixture
def plain_environment(monkeypatch):
    monkeypatch.delenv("ZM_MLX_KERNELS", raising=False)


@pytest.mark.parametrize(
    ("made", "asked", "found"),
    [
        ("ops", None, "ops"),
        ("metal", None, "metal"),
        ("auto", None, "auto"),
        (None, None, "auto"),
        ("ops", "auto", "auto"),
        ("metal", "ops", "ops"),
        (None, "ops", "ops"),
    ],
)
def test_kernels_come_back_unless_the_caller_says_otherwise(path, model, plain_environment, made, asked, found):
    zm_mlx.save_prompt_cache(path, caches(kernels=made))
    assert [c.kernels for c in zm_mlx.load_prompt_cache(path, model, kernels=asked)] == [found, found]


def test_each_cache_gets_its_own_kernels_back(path, model, plain_environment):
    made = [caches(kernels="ops")[0], caches(kernels="auto")[0]]
    zm_mlx.save_prompt_cache(path, made)
    assert [c.kernels for c in zm_mlx.load_prompt_cache(path, model)] == ["ops", "auto"]


def test_the_environment_chooses_where_a_cache_was_made_without_a_choice(path, model, monkeypatch):
    monkeypatch.delenv("ZM_MLX_KERNELS", raising=False)
    zm_mlx.save_prompt_cache(path, caches())
    monkeypatch.setenv("ZM_MLX_KERNELS", "ops")
    assert zm_mlx.load_prompt_cache(path, model)[0].kernels == "ops"


@pytest.mark.parametrize("none", [None, "small_model"])
def test_what_is_no_model_raises(file, none):
    with pytest.raises(ValueError, match="model must be an mlx-lm model"):
        zm_mlx.load_prompt_cache(file, none)


def test_unknown_kernels_raise(file, model):
    with pytest.raises(ValueError, match="kernels must be one of auto, metal, ops, not 'cuda'"):
        zm_mlx.load_prompt_cache(file, model, kernels="cuda")


def test_saving_leaves_the_caches_as_they_were(path, model):
    made, other = caches(), caches()
    for c in (made, other):
        tiny.feed(model, c, tiny.prompt(50))
    zm_mlx.save_prompt_cache(path, made)
    assert_same_greedy(model, made, other)


def test_overwriting_the_file_of_a_loaded_cache_does_not_change_it(file, model):
    loaded, reference = zm_mlx.load_prompt_cache(file, model), zm_mlx.load_prompt_cache(file, model)
    mx.eval([c.state for c in reference])
    zm_mlx.save_prompt_cache(file, caches(40))
    assert_same_greedy(model, loaded, reference)


def test_mlx_lms_loader_reads_the_file(file, model):
    theirs = mlx_lm_cache.load_prompt_cache(str(file))
    assert [type(c) for c in theirs] == [ZeroMergeCache] * 2
    assert_same_greedy(model, zm_mlx.load_prompt_cache(file, model), theirs)


def test_caches_beside_mlx_lms_own_are_saved_with_them(path):
    made = [caches()[0], mlx_lm_cache.RotatingKVCache(max_size=8)]
    q, k, v = tiny.tokens(0, 30)
    tiny.give(made[0], q, k, v)
    made[1].update_and_fetch(k, v)
    zm_mlx.save_prompt_cache(path, made)
    loaded, _ = saved.read(path)
    assert [type(c) for c in loaded] == [ZeroMergeCache, mlx_lm_cache.RotatingKVCache]
    assert loaded[1].offset == 30


# ---- wrong models


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"layers": 3}, "layers differ"),
        ({"layers": 1}, "layers differ"),
        ({"kv_heads": 4}, "heads=2"),
        ({"kv_heads": 1}, "heads=2"),
        ({"head_dim": 32}, "head_dim=16"),
        ({"dtype": mx.float16}, "itemsize=4"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_a_file_of_another_model_raises(file, other, what):
    with pytest.raises(ValueError, match=f"saved for another model.*{re.escape(what)}"):
        zm_mlx.load_prompt_cache(file, tiny.model(1, **other))


def test_a_file_of_another_16_bit_dtype_raises(path):
    half, brain = tiny.model(1, dtype=mx.float16), tiny.model(1, dtype=mx.bfloat16)
    made = caches()
    tiny.feed(half, made, tiny.prompt(30))
    zm_mlx.save_prompt_cache(path, made)
    with pytest.raises(ValueError, match="saved for another model"):
        zm_mlx.load_prompt_cache(path, brain)


def test_empty_caches_with_a_table_for_other_heads_raise(path, model):
    zm_mlx.save_prompt_cache(path, caches([30, 30, 9], heads=3))
    with pytest.raises(ValueError, match="saved for another model"):
        zm_mlx.load_prompt_cache(path, model)


# ---- caches inside containers, and mlx-lm's own


FALCON_H1 = {
    "model_type": "falcon_h1",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
}


def falcon(**other):
    """A model with a CacheList of an ArraysCache and a KVCache in each layer."""
    made, arguments = _get_classes({**FALCON_H1, **other})
    mx.random.seed(0)
    return made(arguments.from_dict({**FALCON_H1, **other}))


@pytest.fixture(scope="module")
def hybrid():
    return falcon()


@pytest.mark.parametrize("prompt", [0, 1, 90])
def test_a_model_with_a_cache_list_continues_with_the_same_tokens(path, hybrid, plain_environment, prompt):
    made = zm_mlx.make_prompt_cache(hybrid, 40, kernels="ops")
    if prompt:
        tiny.feed(hybrid, made, tiny.prompt(prompt), 16)
    zm_mlx.save_prompt_cache(path, made, {"a": "b"})
    loaded = zm_mlx.load_prompt_cache(path, hybrid)
    assert [[type(c) for c in layer.caches] for layer in loaded] == [[mlx_lm_cache.ArraysCache, ZeroMergeCache]] * 2
    for layer in loaded:
        inner = layer.caches[1]
        assert (inner.kernels, set(inner.layout.rows), inner.offset) == ("ops", {40}, prompt)
    assert_same_greedy(hybrid, made, loaded, more=50)
    assert [c.caches[1].kernels for c in zm_mlx.load_prompt_cache(path, hybrid, kernels="auto")] == ["auto"] * 2


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"num_hidden_layers": 3}, "layers differ (2 against 3)"),
        ({"num_key_value_heads": 4}, "heads=2"),
        ({"head_dim": 32}, "head_dim=16"),
        ({"mamba_d_state": 16}, "layer 0 has array 0"),
        ({"mamba_n_heads": 8, "mamba_d_head": 8}, "layer 0 has array 1"),
    ],
)
def test_a_model_that_differs_inside_of_a_container_raises(path, hybrid, other, what):
    made = zm_mlx.make_prompt_cache(hybrid, 40)
    tiny.feed(hybrid, made, tiny.prompt(50), 16)
    zm_mlx.save_prompt_cache(path, made)
    with pytest.raises(ValueError, match=f"saved for another model.*{re.escape(what)}"):
        zm_mlx.load_prompt_cache(path, falcon(**other))


def test_a_table_for_other_heads_inside_of_a_container_raises(path, hybrid):
    mixed = [mlx_lm_cache.CacheList(mlx_lm_cache.ArraysCache(2), tiny.cache([30, 30, 9], 3)) for _ in range(2)]
    zm_mlx.save_prompt_cache(path, mixed)
    with pytest.raises(ValueError, match="another model: layer 0 has rows for KV heads: 3, the model needs 2"):
        zm_mlx.load_prompt_cache(path, hybrid)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: tiny.cache(20),
        lambda: mlx_lm_cache.CacheList(tiny.cache(20), mlx_lm_cache.ArraysCache(2)),
        lambda: mlx_lm_cache.CacheList(mlx_lm_cache.CacheList(mlx_lm_cache.ArraysCache(2), tiny.cache(20))),
        lambda: mlx_lm_cache.CacheList(mlx_lm_cache.ArraysCache(2), tiny.cache(20), mlx_lm_cache.KVCache()),
        lambda: mlx_lm_cache.CacheList(mlx_lm_cache.ArraysCache(3), tiny.cache(20)),
    ],
    ids=["none", "other order", "deeper", "one more", "more arrays"],
)
def test_another_container_raises_and_is_named(path, hybrid, layer):
    zm_mlx.save_prompt_cache(path, [layer(), layer()])
    with pytest.raises(ValueError, match="saved for another model: layer 0 h"):
        zm_mlx.load_prompt_cache(path, hybrid)


def test_nested_containers_go_round(path):
    q, k, v = tiny.tokens(0, 30)
    made = mlx_lm_cache.CacheList(
        mlx_lm_cache.CacheList(tiny.cache(20, policy=SMALL, kernels="ops"), mlx_lm_cache.ArraysCache(2)),
        mlx_lm_cache.RotatingKVCache(8),
    )
    tiny.give(made[0][0], q, k, v)
    made[0][1][0] = mx.ones((1, 3, 4))
    zm_mlx.save_prompt_cache(path, [made])
    ((inner, rotating),) = [c.caches for c in saved.read(path)[0]]
    assert (inner[0].offset, inner[0].kernels, rotating.max_size) == (30, "ops", 8)
    assert inner[1][0].tolist() == made[0][1][0].tolist() and inner[1][1] is None
    for a, b in zip(inner[0].state, made[0][0].state, strict=True):
        assert (a == b).all() if isinstance(a, mx.array) else a == b


def test_another_sliding_window_raises(path):
    model = tiny.model()
    full, sliding = tiny.cache(20), mlx_lm_cache.RotatingKVCache(16)
    model.make_cache = lambda: [mlx_lm_cache.KVCache(), mlx_lm_cache.RotatingKVCache(8)]
    zm_mlx.save_prompt_cache(path, [full, sliding])
    with pytest.raises(ValueError, match="saved for another model: layer 1 has max_size 16, the model needs 8"):
        zm_mlx.load_prompt_cache(path, model)


# ---- what is not saved


def test_another_suffix_raises_before_anything_is_written(tmp_path):
    for name in ("cache.bin", "cache", ".safetensors", "cache.safetensors.gz"):
        with pytest.raises(ValueError, match=rf"ends in \.safetensors, unlike .*{name}"):
            zm_mlx.save_prompt_cache(tmp_path / name, caches())
    assert not os.listdir(tmp_path)


def test_a_pending_update_is_not_saved(path):
    made = caches()
    made[1].update_and_fetch(*tiny.tokens(0, 3)[1:])
    for nested in (made, [mlx_lm_cache.CacheList(*made)]):
        with pytest.raises(ValueError, match="never attended"):
            zm_mlx.save_prompt_cache(path, nested)
    assert not path.exists()


@pytest.mark.parametrize("foreign", [None, "KVCache", mlx_lm_cache.CacheList(tiny.cache(20), 5)])
def test_what_is_no_cache_is_not_saved(path, foreign):
    with pytest.raises(ValueError, match=r"must be one of mlx-lm or zm_mlx, not ('KVCache'|None|5)"):
        zm_mlx.save_prompt_cache(path, [*caches(), foreign])
    assert not path.exists()


@pytest.mark.parametrize("none", [[], None, [mlx_lm_cache.KVCache()], [mlx_lm_cache.CacheList()]])
def test_caches_that_could_not_be_loaded_are_not_saved(path, none):
    with pytest.raises(ValueError, match="no ZeroMerge cache to save"):
        zm_mlx.save_prompt_cache(path, none)
    assert not path.exists()


@pytest.mark.parametrize(
    "metadata",
    [
        *({"a": x} for x in (1, None, ["b"], {"b": "c"}, b"b", "\ud800")),
        *({x: "a"} for x in (1, "\udcff", "zm_mlx_sha256", "zm_mlx_", "a.99999999999", "a. 1", "a.b.+5.c")),
        "a",
        [("a", "b")],
    ],
)
def test_metadata_that_would_not_come_back_is_refused(path, metadata):
    with pytest.raises(ValueError, match="metadata"):
        zm_mlx.save_prompt_cache(path, caches(), metadata)
    assert not path.exists()
