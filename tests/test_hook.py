"""How the cache attaches to mlx-lm: what it serves, what it refuses by name, what it expects of its host."""

import importlib
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
import tiny
from architectures import OTHERS, VOCAB, build
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache
from packaging.requirements import Requirement
from tiny import feed, greedy, held, model, prompt

import zm_mlx
from zm_mlx import UnsupportedModelError
from zm_mlx.host import hook, probe

REPOSITORY = Path(__file__).parent.parent
WINDOW = 8  # wider than the probe's longest call
SCALE = 0.25
TOLERANCE = 1e-4  # relative, float32


def difference(found: mx.array, expected: mx.array) -> float:
    return (abs(found - expected).max() / abs(expected).max()).item()


# ---- models that cannot be served


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phi3small", "called the hooked attention 0 times"),  # block-sparse, by its own formula
        ("iquestloopcoder", "used outside of its own attention"),  # a second pass uses the keys of the first
        ("deepseek_v32", "an index of their own"),
        ("afm7", "keys_and_values"),
        ("mamba2", "no full-attention KV cache"),
    ],
)
def test_models_that_cannot_be_served_are_refused_with_name_and_reason(name, reason):
    with pytest.raises(UnsupportedModelError, match=f"cannot serve {name}: .*{reason}"):
        zm_mlx.make_prompt_cache(build(name), 64)


class Toy(nn.Module):
    """One attention layer, whose use of its cache is an argument."""

    model_type = "toy"

    def __init__(self, attend: Callable, make_cache: Callable = KVCache) -> None:
        super().__init__()
        mx.random.seed(0)
        self.embed = nn.Embedding(VOCAB, 64)
        self.qkv = nn.Linear(64, 192)
        self.attend = attend
        self.make_cache = lambda: [make_cache(), RotatingKVCache(max_size=WINDOW)]

    def __call__(self, inputs: mx.array, cache: list) -> mx.array:
        h = self.embed(inputs)
        heads = self.qkv(h).reshape(*inputs.shape, 3, 4, 16).transpose(2, 0, 3, 1, 4)
        out = self.attend(*heads, cache[0])
        return self.embed.as_linear(h + out.swapaxes(1, 2).flatten(2))


def masked(mask_of: Callable) -> Callable:
    """Attention with a mask made from the number of new tokens, the offset and the cache."""

    def attend(q, k, v, cache):
        mask = mask_of(q.shape[2], cache.offset, cache)
        k, v = cache.update_and_fetch(k, v)
        return scaled_dot_product_attention(q, k, v, cache=cache, scale=SCALE, mask=mask)

    return attend


def host_mask(length, cache, **options):
    return base.create_attention_mask(mx.zeros((1, length)), cache, **options)


def slopes(length, offset, cache):
    """ALiBi."""
    distance = mx.arange(offset + length)[None] - mx.arange(offset, offset + length)[:, None]
    bias = mx.where(distance > 0, -mx.inf, 0.01 * distance)
    return bias * mx.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)


def window_of_long_inputs(length, offset, cache):
    return base.create_causal_mask(length, offset, WINDOW) if length > WINDOW else host_mask(length, cache)


def also(other: Callable) -> Callable:
    """The hooked attention, and something else with the fetched keys and values."""

    def attend(q, k, v, cache):
        mask = host_mask(q.shape[2], cache)
        k, v = cache.update_and_fetch(k, v)
        return scaled_dot_product_attention(q, k, v, cache=cache, scale=SCALE, mask=mask) + other(q, k, v)

    return attend


def cast(q, k, v, cache):
    mask = host_mask(q.shape[2], cache)
    k, v = cache.update_and_fetch(k, v)
    return scaled_dot_product_attention(q, k.astype(mx.float16), v, cache=cache, scale=SCALE, mask=mask)


def twice(q, k, v, cache):
    k, v = cache.update_and_fetch(k, v)
    both = [scaled_dot_product_attention(q, k, v, cache=cache, scale=SCALE, mask="causal") for _ in range(2)]
    return both[0] + both[1]


def reads_back(q, k, v, cache):
    cache.update_and_fetch(k, v)
    return scaled_dot_product_attention(q, *cache.keys_and_values(), cache=cache, scale=SCALE, mask="causal")


PLAIN = masked(lambda length, offset, cache: host_mask(length, cache))
NO_CALL = "called the hooked attention 0 times for 1 updates"
OTHER_MASK = "another mask than the causal one"
OTHER_KEYS = "does not use the keys and values of its cache as they are"
OTHER_USE = "used outside of its own attention"
MISUSES = {
    "a window over a plain cache": (masked(lambda n, offset, c: host_mask(n, c, window_size=WINDOW)), OTHER_MASK),
    "a window in another shape": (masked(lambda n, offset, c: host_mask(n, c, window_size=WINDOW)[None]), OTHER_MASK),
    "no mask at all": (masked(lambda n, offset, c: None), OTHER_MASK),
    "ALiBi": (masked(slopes), OTHER_MASK),
    "a mask over the whole cache": (masked(lambda n, offset, c: base.create_causal_mask(n, offset)), OTHER_MASK),
    "attention of another layer on the same keys": (
        also(lambda q, k, v: scaled_dot_product_attention(q, k, v, cache=None, scale=SCALE, mask="causal")),
        OTHER_USE,
    ),
    "a sum over the keys": (also(lambda q, k, v: k.sum(axis=2, keepdims=True)), OTHER_USE),
    "keys in another dtype": (cast, OTHER_KEYS),
    "two attentions for one update": (twice, "more than once"),
    "keys read back from the cache": (reads_back, "it reads 'keys_and_values' of its KV caches"),
    "no attention at all": (lambda q, k, v, cache: cache.update_and_fetch(k, v)[1], NO_CALL),
}


def test_toy_itself_is_served():
    toy, tokens = Toy(PLAIN), prompt(40)
    found = feed(toy, zm_mlx.make_prompt_cache(toy, 40)[:1], tokens, 7)
    assert difference(found, feed(toy, [KVCache()], tokens, 7)) < TOLERANCE


@pytest.mark.parametrize("misuse", MISUSES)
def test_uses_that_would_silently_change_the_model_are_refused(misuse):
    attend, reason = MISUSES[misuse]
    with pytest.raises(UnsupportedModelError, match=f"cannot serve toy: .*{reason}"):
        zm_mlx.make_prompt_cache(Toy(attend), 64)


def test_mask_that_comes_only_with_long_inputs_raises_instead_of_being_ignored():
    toy, tokens = Toy(masked(window_of_long_inputs)), prompt(2 * WINDOW)
    caches = zm_mlx.make_prompt_cache(toy, 64)
    mx.eval(toy(tokens[:, :WINDOW], cache=caches))
    with pytest.raises(UnsupportedModelError, match=OTHER_MASK):
        toy(tokens, cache=caches)


@pytest.mark.parametrize("shape", [(), (1, 1)])
@pytest.mark.parametrize("dtype", [mx.bool_, mx.float32])
def test_causal_masks_given_as_arrays_are_served(shape, dtype):
    def array(length, offset, cache):
        mask = host_mask(length, cache, return_array=True)
        if mask is None:
            return None
        mask = mask if dtype == mx.bool_ else mx.where(mask, 0.0, mx.finfo(dtype).min)
        return mask.reshape(*shape, *mask.shape)

    toy, tokens = Toy(masked(array)), prompt(40)
    found = feed(toy, zm_mlx.make_prompt_cache(toy, 40)[:1], tokens, 7)
    assert difference(found, feed(toy, [KVCache()], tokens, 7)) < TOLERANCE


def test_caches_that_may_grow_are_not_left_beside_compressed_ones():
    class Own(KVCache):
        pass

    with pytest.raises(UnsupportedModelError, match="has a Own, which may grow"):
        zm_mlx.make_prompt_cache(Toy(PLAIN, Own), 64)


def test_update_that_never_reached_the_hook_raises_at_the_next_one():
    toy = Toy(PLAIN)
    caches = zm_mlx.make_prompt_cache(toy, 64)
    toy.attend, _ = MISUSES["no attention at all"]
    toy(prompt(2), cache=caches)
    with pytest.raises(UnsupportedModelError, match="never attended"):
        toy(prompt(2), cache=caches)


def test_probe_evaluates_no_weights_and_leaves_the_model_as_it_was():
    made = model()
    before = mlx_lm_cache.make_prompt_cache(made)
    expected = feed(made, before, prompt(20))
    mx.synchronize()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    zm_mlx.make_prompt_cache(made, 64)
    assert mx.get_peak_memory() - held < 64 * 1024
    assert mx.array_equal(feed(made, mlx_lm_cache.make_prompt_cache(made), prompt(20)), expected)


# ---- models with mlx-lm's own caches


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3_text", "gpt_oss", *sorted(set(OTHERS) - {"olmo"})])
def test_models_with_caches_of_mlx_lm_are_bit_equal_while_hooked(name, monkeypatch):
    made, tokens = build(name), prompt(30, vocab=VOCAB)
    hook.attach(made)
    hooked = feed(made, mlx_lm_cache.make_prompt_cache(made), tokens, 7)
    for module in (base, *{sys.modules[type(m).__module__] for m in made.modules()}):
        if hasattr(module, hook.NAME):
            assert getattr(module, hook.NAME) is hook.attention
            monkeypatch.setattr(module, hook.NAME, hook._original)
    assert mx.array_equal(feed(made, mlx_lm_cache.make_prompt_cache(made), tokens, 7), hooked)


def test_modules_imported_before_zm_mlx_are_hooked_too(tmp_path):
    """Both mlx-lm's own and one elsewhere that holds the function under its name."""
    (tmp_path / "elsewhere.py").write_text(
        "from mlx_lm.models import llama\n"
        "from mlx_lm.models.base import scaled_dot_product_attention\n"
        "class Attention(llama.Attention):\n"
        "    def __call__(self, x, mask=None, cache=None):\n"
        "        heads = [p(x).reshape(*x.shape[:2], 4, 16).swapaxes(1, 2)\n"
        "                 for p in (self.q_proj, self.k_proj, self.v_proj)]\n"
        "        keys, values = cache.update_and_fetch(*heads[1:])\n"
        "        out = scaled_dot_product_attention(heads[0], keys, values, cache, self.scale, mask)\n"
        "        return self.o_proj(out.swapaxes(1, 2).flatten(2))\n"
    )
    script = (
        "import elsewhere, sys\n"
        "from mlx_lm.models import llama\n"
        "assert 'zm_mlx' not in sys.modules\n"
        "import mlx.core as mx, tiny, zm_mlx\n"
        "assert llama.scaled_dot_product_attention is zm_mlx.host.hook.attention\n"
        "model = tiny.model(kv_heads=4)\n"
        "zm_mlx.make_prompt_cache(model, 64)\n"
        "model.model.layers[0].self_attn.__class__ = elsewhere.Attention\n"
        "caches = zm_mlx.make_prompt_cache(model, 64)\n"
        "mx.eval(model(tiny.prompt(100), cache=caches))\n"
        "mx.eval(model(tiny.prompt(1), cache=caches))\n"
        "print([c.size() for c in caches])\n"
    )
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}:{tmp_path}"
    run = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert all(n <= 64 for n in eval(run.stdout))


# ---- assumptions about the host


def test_installed_mlx_lm_is_in_the_pinned_range():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pin = next(r for r in map(Requirement, project["dependencies"]) if r.name == "mlx-lm")
    assert version("mlx-lm") in pin.specifier, (
        f"mlx-lm {version('mlx-lm')} is outside {pin.specifier}: run the tests against it, then move the pin"
    )


def test_host_attention_has_the_signature_that_the_hook_takes():
    parameters = [(p.name, p.default) for p in inspect.signature(hook._original).parameters.values()]
    no = inspect.Parameter.empty
    names = ["queries", "keys", "values", "cache", "scale", "mask"]
    assert parameters == [*((n, no) for n in names), ("sinks", None)], (
        "the signature of mlx_lm.models.base.scaled_dot_product_attention changed: host.hook.attention must follow"
    )
    ours = [(p.name, p.default) for p in inspect.signature(hook.attention).parameters.values()]
    assert ours == parameters


def test_host_caches_have_the_members_that_ours_has():
    def members(made):
        return {name for name in dir(made) if not name.startswith("_")}

    ours, theirs = members(tiny.cache(64)), members(KVCache())
    # Not ours: batching is another class, the rest are KVCache's own arrays and their growth.
    left_out = {"merge", "keys_and_values", "step", "values"}
    new = theirs - ours - left_out
    assert not new, f"mlx-lm's KVCache has new members {sorted(new)}: does its protocol ask for them?"
    protocol = {
        "update_and_fetch",
        "offset",
        "make_mask",
        "state",
        "from_state",
        "is_trimmable",
        "trim",
        "nbytes",
        "size",
        "empty",
        "to_quantized",
    }
    gone = protocol - theirs
    assert not gone, f"mlx-lm's KVCache lost {sorted(gone)}: how does mlx-lm do that now?"
    lost = protocol - ours
    assert not lost, f"ZeroMergeCache lacks {sorted(lost)}"


def test_host_takes_prompt_cache_and_asks_models_for_caches():
    generate = importlib.import_module("mlx_lm.generate")
    for function in (generate.generate_step, generate.speculative_generate_step):
        assert "prompt_cache" in inspect.signature(function).parameters, (
            f"mlx_lm.generate.{function.__name__} no longer takes prompt_cache"
        )
    toy = Toy(PLAIN)
    assert [type(c) for c in mlx_lm_cache.make_prompt_cache(toy)] == [KVCache, RotatingKVCache], (
        "mlx_lm.models.cache.make_prompt_cache no longer calls the model's make_cache"
    )


def test_host_shows_its_graph_with_the_names_that_the_probe_reads():
    used, unused = mx.zeros((2,)), mx.zeros((2,))
    leaf = [KVCache(), KVCache()]
    probes = [probe._Probe(i) for i in range(len(leaf))]
    probes[0].stand_ins, probes[1].stand_ins = [unused], [mx.zeros((2,)), used]
    probe._check_uses(mx.ones((2,)) + 1, probes)
    with pytest.raises(UnsupportedModelError, match="full-attention layer 1"):
        probe._check_uses(mx.exp(used + 1), probes)


# ---- budgets on real models


def test_bytes_budget_is_what_the_caches_of_each_layer_hold():
    made = model(layers=3)
    budget = 150_000
    plan = zm_mlx.plan_cache(made, "150KB")
    caches = plan.caches(made)
    feed(made, caches, prompt(400), 64)
    feed(made, caches, prompt(1))  # decoding holds no piece of a prompt
    assert sum(c.nbytes for c in caches) == plan.nbytes <= budget
    assert [c.layout.rows for c in caches] == [x.rows for x in plan.layouts]
    one_more = [[n + 8 for n in x.rows] for x in plan.layouts]
    assert zm_mlx.plan_cache(made, None, head_rows=one_more).nbytes > budget


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
def test_bytes_budget_is_for_the_sliding_window_layers_too(name):
    made = build(name)
    caches = zm_mlx.make_prompt_cache(made, "70KB")
    feed(made, caches, prompt(400, vocab=VOCAB), 64)
    feed(made, caches, prompt(1, vocab=VOCAB))  # mlx-lm trims a window's cache at the first step after a prompt
    assert 0.9 * 70_000 < sum(c.nbytes for c in caches) <= 70_000


def test_head_rows_are_checked_against_the_heads_and_layers_of_the_model():
    made = model()
    with pytest.raises(ValueError, match="needs 2 tables"):
        zm_mlx.make_prompt_cache(made, None, head_rows=[[64, 64]])
    with pytest.raises(ValueError, match="needs 2 numbers, one for each KV head, not 4"):
        zm_mlx.make_prompt_cache(made, None, head_rows=[[64] * 4] * 2)
    with pytest.raises(ValueError, match="too small"):
        zm_mlx.make_prompt_cache(made, None, head_rows=[[64, 64], [64, 2]])


def test_unequal_head_rows_change_nothing_while_they_suffice_and_hold_less_after():
    made, tokens = model(), prompt(100)
    rows = [[100, 160], [130, 100]]
    expected = feed(made, mlx_lm_cache.make_prompt_cache(made), tokens)
    found = feed(made, zm_mlx.make_prompt_cache(made, None, head_rows=rows), tokens, 7)
    assert difference(found, expected) < TOLERANCE
    rows = [[40, 80], [80, 40]]
    caches = zm_mlx.make_prompt_cache(made, None, head_rows=rows)
    assert mx.isfinite(feed(made, caches, tokens, 7)).all().item()
    feed(made, caches, prompt(1))  # decoding holds no piece of a prompt
    assert [[len(held(c, h).weight) <= n for h, n in enumerate(t)] for c, t in zip(caches, rows, strict=True)] == [
        [True, True]
    ] * 2


def test_sequences_of_a_batch_do_not_touch_each_other():
    made, tokens = model(), prompt(150, batch=2)
    both = feed(made, zm_mlx.make_prompt_cache(made, 48), tokens, 64)
    for i in range(2):
        alone = feed(made, zm_mlx.make_prompt_cache(made, 48), tokens[i : i + 1], 64)
        assert difference(both[i : i + 1], alone) < TOLERANCE
    full = feed(made, mlx_lm_cache.make_prompt_cache(made), tokens, 64)
    assert difference(feed(made, zm_mlx.make_prompt_cache(made, 150), tokens, 64), full) < TOLERANCE


# ---- mlx-lm's generation


def test_generate_step_gives_the_tokens_of_the_full_cache():
    generate_step = importlib.import_module("mlx_lm.generate").generate_step
    made, tokens = model(), prompt(90)
    expected, _ = greedy(made, mlx_lm_cache.make_prompt_cache(made), tokens, 30)
    for size in (16, 512):
        caches = zm_mlx.make_prompt_cache(made, 120)
        steps = generate_step(tokens[0], made, max_tokens=30, prompt_cache=caches, prefill_step_size=size)
        assert [int(t) for t, _ in steps] == expected[0].tolist()
    assert all(isinstance(c, zm_mlx.ZeroMergeCache) for c in caches), "generation replaced the caches"


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w95")


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
def test_stream_generate_gives_the_tokens_of_the_full_cache(tokenizer, prefill):
    made, text = model(), prompt(70)[0].tolist()
    expected = [r.token for r in mlx_lm.stream_generate(made, tokenizer, text, max_tokens=20)]
    caches = zm_mlx.make_prompt_cache(made, 90, prompt_length=70, prefill=prefill)
    found = [r.token for r in mlx_lm.stream_generate(made, tokenizer, text, max_tokens=20, prompt_cache=caches)]
    assert found == expected


def test_stream_generate_far_past_the_budget_holds_the_cap(tokenizer):
    made, text = model(), prompt(300)[0].tolist()
    plan = zm_mlx.plan_cache(made, 64)
    caches = plan.caches(made)
    last = list(mlx_lm.stream_generate(made, tokenizer, text, max_tokens=20, prompt_cache=caches))[-1]
    assert sum(c.nbytes for c in caches) == plan.nbytes
    assert {c.offset for c in caches} == {300 + last.generation_tokens - (last.finish_reason == "stop")}


def test_speculative_generation_is_refused_instead_of_going_wrong(tokenizer):
    made = model()
    caches = [*zm_mlx.make_prompt_cache(made, 64), *mlx_lm_cache.make_prompt_cache(made)]
    run = mlx_lm.stream_generate(made, tokenizer, [1, 2, 3], max_tokens=5, prompt_cache=caches, draft_model=made)
    with pytest.raises(ValueError, match="trimmable"):
        next(run)
