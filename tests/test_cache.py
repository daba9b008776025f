"""ZeroMergeCache: the published loop, a whole model, memory, and mlx-lm's protocol."""

import copy
import importlib

import mlx.core as mx
import numpy as np
import pytest
import tiny
import twin
from mlx_lm.models import cache as mlx_lm_cache
from tiny import assert_equals_twin, f64, give, held, tokens, twin_of

from zm_mlx.errors import UnsupportedModelError
from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.policies import Policy
from zm_mlx.state.layout import LayerShape

SMALL = Policy(residual=2, staging=3)
FLOATS = [mx.float32, mx.float16, mx.bfloat16]
names = ["float32", "float16", "bfloat16"]


def caches(rows, policy=SMALL, layers=2, **more):
    return [tiny.cache(rows, policy=policy, **more) for _ in range(layers)]


def full(layers=2):
    return [mlx_lm_cache.KVCache() for _ in range(layers)]


# ---- the paper


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("residual", [1, 3])
def test_one_token_a_step_equals_the_published_loop(alpha, residual):
    """S = 1, no pooling, no second-order term, a prompt longer than C."""
    policy = Policy(residual=residual, staging=1, alpha=alpha, kappa=0, pool=1)
    prompt, length = 40, 120
    q, k, v = tokens(7, length, batch=2)
    cache = tiny.cache(18, policy=policy, prefill="exact", prompt_length=prompt)
    out = f64(give(cache, q, k, v, [prompt, *[1] * (length - prompt)]))
    a = cache.layout
    for b in range(2):
        for h in range(2):
            mine = slice(2 * h, 2 * h + 2)
            queries, keys, values = f64(q[b, mine]), f64(k[b, h]), f64(v[b, h])
            loop = twin.PaperLoop(residual, a.context[h], a.proximity, alpha=alpha, decay=0.98, scale=8**-0.5)
            expected = [loop.prompt(queries[:, :prompt], keys[:prompt], values[:prompt])]
            expected += [loop.step(queries[:, t], keys[t], values[t])[:, None] for t in range(prompt, length)]
            np.testing.assert_allclose(out[b, mine], np.concatenate(expected, axis=1), atol=5e-5)
            rows = held(cache, h, b)
            assert rows.weight.tolist() == loop.w.tolist() and sum(loop.w) == length
            for x, y in zip((rows.keys, rows.values, rows.score), (loop.k, loop.v, loop.s), strict=True):
                np.testing.assert_allclose(f64(x), y, atol=5e-5)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=names[1:])
def test_half_precision_follows_the_twin_with_rounded_means(dtype):
    q, k, v = tokens(3, 90, heads=1, dtype=dtype)
    cache = tiny.cache(20, 1, policy=SMALL)
    out = give(cache, q, k, v, 7)
    made = twin_of(cache, rounding=tiny.rounding(dtype))
    expected = made.run(f64(q[0]), f64(k[0]), f64(v[0]), 8**-0.5)
    assert made.doubt > 1e-4
    error = tiny.TOLERANCE[dtype]
    np.testing.assert_allclose(f64(out[0]), expected, atol=error, rtol=error)
    rows = held(cache, 0)
    assert rows.weight.tolist() == [len(r.tokens) for r in made.heads[0].rows]
    np.testing.assert_allclose(f64(rows.keys), made.heads[0].arrays()[0], atol=error)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=names[1:])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rows", [40, [30, 64]])
def test_the_bits_of_16_bit_outputs_do_not_depend_on_chunks(dtype, rows, sinks):
    """They do with a BLAS whose sums depend on the shapes of a product."""
    q, k, v = tokens(4, 200, groups=3, dim=64, sharp=0.5, dtype=dtype)
    more = {"sinks": mx.array([0.5, -1, 2, 0, 1, 3])} if sinks else {}
    outputs = [give(tiny.cache(rows), q, k, v, size, **more) for size in (1, 7, 64, 200)]
    for out in outputs[1:]:
        assert mx.array_equal(out, outputs[0])


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
def test_sinks_reach_the_right_heads_of_an_unequal_table(prefill):
    q, k, v = tokens(5, 60, heads=3)
    sinks = mx.array([3.0, -1, 0, 4, 1, 2])
    prompt = 30 if prefill == "exact" else None
    cache = tiny.cache([12, 40, 9], 3, policy=SMALL, prefill=prefill, prompt_length=prompt)
    out = give(cache, q, k, v, 7, sinks=sinks)
    made = twin_of(cache)
    if prompt:
        made.begin_prompt(prompt)
    expected = made.run(f64(q[0]), f64(k[0]), f64(v[0]), 8**-0.5, f64(sinks))
    assert made.doubt > 1e-4
    np.testing.assert_allclose(f64(out[0]), expected, atol=5e-5)
    assert_equals_twin(cache, [made])


def test_bad_arguments_raise_and_name_themselves():
    with pytest.raises(ValueError, match="prefill must be 'exact' or 'streaming', not 'fast'"):
        tiny.cache(64, prefill="fast")
    with pytest.raises(ValueError, match="prompt_length must be 1 token or more, not 0"):
        tiny.cache(64, prefill="exact", prompt_length=0)
    with pytest.raises(ValueError, match="smallest that works here is 6"):
        tiny.cache(5)
    with pytest.raises(ValueError, match="smallest that works"):
        tiny.cache([64, 5])
    with pytest.raises(ValueError, match="give prompt_length"):
        tiny.cache(64, prefill="exact")
    for rows in ("x", [64, 64.5], None, 64.0, [[64, 64]]):
        with pytest.raises(ValueError, match="rows per head are whole numbers"):
            tiny.cache(rows)
    with pytest.raises(ValueError, match="too large"):
        tiny.cache(2**31)
    with pytest.raises(ValueError, match=r"policy must be a zm_mlx\.Policy, not 'x'"):
        ZeroMergeCache(Policy().layout(64, 2), policy="x")
    with pytest.raises(ValueError, match="layout must be a Layout, as"):
        ZeroMergeCache(64)
    with pytest.raises(ValueError, match="needs 2 numbers, one for each KV head, not 3"):
        tiny.cache([64, 64, 64], 3).update_and_fetch(*tokens(0, 1)[1:])


def test_unequal_tables_shrink_memory_as_computed():
    q, k, v = tokens(1, 70)
    equal, less = tiny.cache([60, 60], policy=SMALL), tiny.cache([60, 10], policy=SMALL)
    for cache in (equal, less):
        give(cache, q, k, v, 9)
        assert cache.nbytes == cache.layout.nbytes(LayerShape(2, 8, 8, 4))
    assert less.nbytes < 0.65 * equal.nbytes


# ---- a whole model


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
@pytest.mark.parametrize("rows", [64, [64, 200], 200])
def test_float32_tokens_under_the_budget_are_those_of_mlx_lms_cache(prefill, rows):
    """Prompt and new tokens fill the smallest head exactly, with chunks that end anywhere."""
    model, prompt = tiny.model(1), tiny.prompt(34, 2)
    policy = Policy(staging=5)
    mine = caches(rows, policy, prefill=prefill, prompt_length=34 if prefill == "exact" else None)
    found, logits = tiny.greedy(model, mine, prompt, 30, 9)
    expected, reference = tiny.greedy(model, full(), prompt, 30, 9)
    assert found.tolist() == expected.tolist() and len({*found[0].tolist()}) > 5
    assert np.abs(logits - reference).max() < 1e-4 * np.abs(reference).max()
    assert mine[0].offset == 63


@pytest.mark.parametrize(("dtype", "error"), [(mx.float16, 5e-3), (mx.bfloat16, 4e-2)], ids=names[1:])
def test_half_precision_under_the_budget_differs_only_by_rounding(dtype, error):
    model, prompt = tiny.model(1, dtype=dtype), tiny.prompt(34, 2)
    expected, reference = tiny.greedy(model, full(), prompt, 30)
    both = mx.concatenate([prompt, mx.array(expected[:, :-1])], axis=1)
    logits = f64(tiny.feed(model, caches(64), both, 9))[:, 33:]
    scale = np.abs(reference).max()
    assert np.abs(logits - reference).max() < error * scale
    best = np.sort(reference, axis=-1)
    differs = logits.argmax(-1) != expected
    assert (best[..., -1] - best[..., -2])[differs].max(initial=0) < error * scale


@pytest.mark.parametrize("rows", [20, [30, 9]])
def test_streaming_gives_the_same_tokens_for_every_chunk_size(rows):
    model, prompt = tiny.model(2), tiny.prompt(150, 3)
    runs = {}
    for size in (1, 7, 512, 2048):
        mine = caches(rows)
        runs[size] = (*tiny.greedy(model, mine, prompt, 20, size), mine)
        assert mine[0].offset == 169 and np.isfinite(runs[size][1]).all()
    for size in (1, 7, 512):
        assert runs[size][0].tolist() == runs[2048][0].tolist()
        np.testing.assert_allclose(runs[size][1], runs[2048][1], atol=2e-3)
        for a, b in zip(runs[size][2], runs[2048][2], strict=True):
            assert [x.weight.tolist() for x in (held(a, h) for h in range(2))] == [
                x.weight.tolist() for x in (held(b, h) for h in range(2))
            ]


def test_compression_changes_the_logits_so_the_tests_above_see_it():
    model, prompt = tiny.model(2), tiny.prompt(150, 3)
    a, b = tiny.feed(model, caches(20), prompt), tiny.feed(model, full(), prompt)
    assert np.abs(f64(a[:, -1] - b[:, -1])).max() > 1e-2


def test_tokens_made_long_after_the_cap_are_among_the_kept():
    """Positions stay true, and the kept set does not freeze: tokens newer than the cap get into it."""
    q, k, v = tokens(3, 428, sharp=1.0)
    cache = tiny.cache(128)
    give(cache, *(x[:, :, :128] for x in (q, k, v)))
    for t in range(128, 428):
        give(cache, *(x[:, :, t : t + 1] for x in (q, k, v)))
    a, newest = cache.layout, cache.layer.filled
    assert cache.offset == 428
    for h in range(2):
        rows = held(cache, h)
        positions = rows.position.tolist()
        assert positions[-newest:] == list(range(428 - newest, 428))
        context = positions[a.residual : -newest]
        assert len(context) == a.context[h] and context == sorted(set(context))
        assert sum(p > 128 for p in context) > a.context[h] / 10, "the kept set is frozen"
        assert rows.weight.sum().item() == 428


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
def test_chunked_prefill_never_exceeds_budget(prefill):
    """Turn after turn, for prompts and chunks of many sizes."""
    model = tiny.model(0, layers=1)
    (cache,) = mine = caches(24, layers=1, prefill=prefill, prompt_length=40 if prefill == "exact" else None)
    seen = 0
    for turn, (length, size) in enumerate([(40, 7), (3, 1), (90, 512), (24, 2048), (1, 1), (61, 23)]):
        if turn and prefill == "exact":
            cache.begin_prompt(length)
        tiny.feed(model, mine, tiny.prompt(length, turn), size)
        seen += length
        assert cache.offset == seen and cache.prefill == "streaming"
        assert all(len(held(cache, h).weight) <= 24 for h in range(2))
        assert cache.nbytes == cache.layout.nbytes(LayerShape(2, 16, 16, 4))


@pytest.mark.parametrize("step", [7, 512])
def test_mlx_lms_own_generation_runs_on_it(step):
    generate = importlib.import_module("mlx_lm.generate")
    model, prompt = tiny.model(2), tiny.prompt(100, 3)
    found = generate.generate_step(
        prompt[0], model, max_tokens=12, prompt_cache=(mine := caches(20)), prefill_step_size=step
    )
    expected, _ = tiny.greedy(model, caches(20), prompt, 12)
    assert [int(t) for t, _ in found] == expected[0].tolist()
    assert mine[0].offset in (111, 112)  # it may have begun the token after the last


# ---- memory


def test_two_thousand_decode_steps_leave_memory_flat():
    """Only the output is evaluated, as mlx-lm does: state must not pile up as graph, nor be copied."""
    q, k, v = tokens(0, 600, groups=2, dim=64)
    cache = tiny.cache(512)
    mx.eval(q, k, v)
    given = mx.get_active_memory()
    give(cache, q, k, v, 100)
    whole = cache.nbytes
    assert whole > 512 * 1024
    active, peaks, turns, compactions = [], [], [], []
    for step in range(2000):
        t = slice(step % 600, step % 600 + 1)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        keys, values = cache.update_and_fetch(k[:, :, t], v[:, :, t])
        out = cache.attend(q[:, :, t], keys, values, 0.125)
        mx.eval(out)
        since = cache.layer.since_compaction if step else 1
        {0: compactions, 1: turns}.get(since, peaks).append(mx.get_peak_memory() - before)
        del out, keys, values
        active.append(mx.get_active_memory())
    assert cache.offset == 2600 and len(compactions) in (31, 32)
    active = active[cache.layout.staging :]  # until then constants of recorded steps are made
    assert max(active) - min(active) < whole / 100, "memory grows or is held by graph"
    assert max(active) < given + whole * 1.05, "keys are held row by row and dimension by dimension"
    assert active[-1] <= active[100] + 4096
    assert max(peaks) < whole / 5, "a step allocates something of the cache's size"
    assert max(turns) < whole / 2, "the kept keys are turned over after a compaction, and nothing else is"
    assert max(compactions) < 3 * whole


def test_a_streamed_call_peaks_at_the_budget_and_the_call():
    """One call of many tokens compacts as it goes: neither the prompt's logits nor its rows pile up."""
    q, k, v = tokens(0, 2048, groups=1, dim=32)
    mx.eval(q, k, v)
    cache = tiny.cache(64)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    out = cache.attend(q, *cache.update_and_fetch(k, v), 0.1)
    mx.eval(out)
    assert mx.get_peak_memory() - before < 3 * out.nbytes + 10 * cache.nbytes


# ---- mlx-lm's protocol


def filled(length=50, rows=20, seed=1, **more):
    cache = tiny.cache(rows, policy=SMALL, **more)
    give(cache, *tokens(seed, length), 9)
    return cache


def continues_alike(a, b, seed=9):
    x, y = (give(c, *tokens(seed, 30), 7) for c in (a, b))
    return mx.array_equal(x, y) and all(
        p is q is None or mx.array_equal(p, q) for p, q in zip(a.state[:-1], b.state[:-1], strict=True)
    )


def test_it_inherits_nothing_from_mlx_lms_caches():
    """An inherited merge, trim or to_quantized would silently replace compression."""
    assert ZeroMergeCache.__mro__ == (ZeroMergeCache, object)
    cache = filled()
    assert not hasattr(cache, "__len__") and not hasattr(cache, "bits") and bool(cache) and bool(tiny.cache(20))
    assert not any(isinstance(x, mx.Dtype) for x in vars(cache).values())


@pytest.mark.parametrize("rows", [20, [30, 9]])
@pytest.mark.parametrize("exact", [False, True])
def test_a_deep_copy_is_independent(rows, exact):
    cache = filled(rows=rows, **({"prefill": "exact", "prompt_length": 70} if exact else {}))
    other, reference = copy.deepcopy(cache), copy.deepcopy(cache)
    give(cache, *tokens(5, 40))
    assert other.offset == 50 and cache.offset == 90
    assert all(
        x is y is None or mx.array_equal(x, y) for x, y in zip(other.state[:-1], reference.state[:-1], strict=True)
    )
    assert continues_alike(other, reference)


@pytest.mark.parametrize("length", [0, 5, 50])
@pytest.mark.parametrize("residual", [0, 2])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [20, [30, 9]])
def test_state_goes_round(length, residual, exact, rows):
    policy = Policy(residual=residual, staging=3, decay=0.9, kappa=0.1234567890123)
    prefill = {"prefill": "exact", "prompt_length": 60} if exact else {}
    cache = tiny.cache(rows, policy=policy, **prefill)
    if length:
        give(cache, *tokens(1, length), 9)
    again = ZeroMergeCache.from_state(copy.deepcopy(cache.state))
    assert again.state[-1] == cache.state[-1] and again.policy == policy and again.layout == cache.layout
    assert again.offset == length and again.nbytes == cache.nbytes and again.prefill == cache.prefill
    assert continues_alike(cache, again)
    assert cache.prefill == ("streaming" if length == 50 or not exact else "exact")


def test_a_cache_made_from_a_state_does_not_share_its_arrays():
    cache = filled(length=51)
    snapshot = copy.deepcopy(cache)
    again = ZeroMergeCache.from_state(cache.state)
    give(cache, *tokens(5, 40))
    assert continues_alike(again, snapshot)


@pytest.mark.parametrize("residual", [0, 2])
@pytest.mark.parametrize("rows", [20, [30, 9]])
@pytest.mark.parametrize("dtype", FLOATS, ids=names)
def test_mlx_lms_own_files_go_round(tmp_path, residual, rows, dtype):
    made = [tiny.cache(rows, policy=Policy(residual=residual, staging=3)) for _ in range(2)]
    give(made[0], *tokens(1, 50, dtype=dtype), 9)  # the second one is empty
    path = str(tmp_path / "cache.safetensors")
    mlx_lm_cache.save_prompt_cache(path, made, {"note": "x"})
    loaded, metadata = mlx_lm_cache.load_prompt_cache(path, return_metadata=True)
    assert metadata == {"note": "x"} and [type(c) for c in loaded] == [ZeroMergeCache] * 2
    assert loaded[0].offset == 50 and loaded[1].empty() and loaded[0].layer.recent.keys.dtype == dtype
    x, y = (give(c, *tokens(9, 30, dtype=dtype), 7) for c in (made[0], loaded[0]))
    assert mx.array_equal(x, y) and loaded[0].state[-1] == made[0].state[-1]


def test_a_state_of_another_version_raises():
    state = filled().state
    with pytest.raises(ValueError, match="another version"):
        ZeroMergeCache.from_state([*state[:-1], state[-1].replace('"format": 4', '"format": 3')])


def test_trimming_is_refused_everywhere():
    cache = filled()
    before = cache.offset
    assert not cache.is_trimmable() and cache.trim(3) == 0 and cache.offset == before
    assert not mlx_lm_cache.can_trim_prompt_cache([cache]) and mlx_lm_cache.trim_prompt_cache([cache], 3) == 0


def test_kv_bits_raise_and_are_named():
    with pytest.raises(ValueError, match="--kv-bits"):
        filled().to_quantized(group_size=32, bits=8)
    generate = importlib.import_module("mlx_lm.generate")
    steps = generate.generate_step(
        tiny.prompt(30)[0], tiny.model(), max_tokens=3, prompt_cache=caches(20), kv_bits=8, quantized_kv_start=0
    )
    with pytest.raises(ValueError, match="--kv-bits"):
        list(steps)


def test_keys_can_be_assigned_between_calls():
    cache, other = filled(), filled()
    assert cache.keys is cache.layer.recent.keys and tiny.cache(20).keys is None
    cache.keys = mx.depends(cache.keys, mx.ones(3))
    assert continues_alike(cache, other)


@pytest.mark.parametrize("length", [0, 50])
def test_masks_are_causal_over_the_new_tokens_alone(length):
    cache = filled(length) if length else tiny.cache(20)
    assert cache.make_mask(1) is None and cache.make_mask(5) == "causal"
    assert cache.make_mask(5, return_array=True).tolist() == np.tri(5, dtype=bool).tolist()
    assert cache.make_mask(5, window_size=2).shape == (5, 5)


def test_the_fetch_returns_the_very_objects_and_counts_them():
    cache = filled()
    _, k, v = tokens(2, 4)
    keys, values = cache.update_and_fetch(k, v)
    assert keys is k and values is v and cache.offset == 54


def test_a_model_that_skips_the_hook_raises_at_its_second_update():
    cache = filled()
    _, k, v = tokens(2, 4)
    cache.update_and_fetch(k, v)
    with pytest.raises(UnsupportedModelError, match=r"does not go through zm_mlx.*make_prompt_cache"):
        cache.update_and_fetch(k, v)


@pytest.mark.parametrize("which", ["keys", "values"])
def test_attention_with_other_arrays_raises(which):
    cache = filled()
    q, k, v = tokens(2, 4)
    cache.update_and_fetch(k, v)
    other = {"keys": (k + 0, v), "values": (k, v + 0)}[which]
    with pytest.raises(UnsupportedModelError, match="keys and values of its cache as they are"):
        cache.attend(q, *other, 1.0)


def test_attention_twice_for_one_update_raises():
    cache = filled()
    q, k, v = tokens(2, 4)
    cache.update_and_fetch(k, v)
    cache.attend(q, k, v, 1.0)
    with pytest.raises(UnsupportedModelError, match="more than once"):
        cache.attend(q, k, v, 1.0)


@pytest.mark.parametrize("change", ["fewer", "heads"])
def test_queries_that_do_not_match_the_new_tokens_raise(change):
    cache = filled()
    q, k, v = tokens(2, 4)
    cache.update_and_fetch(k, v)
    with pytest.raises(UnsupportedModelError, match="do not match the 4 new tokens of 2 KV heads"):
        cache.attend(q[:, :, 1:] if change == "fewer" else q[:, 1:], k, v, 1.0)


@pytest.mark.parametrize(
    "more", [{"batch": 2}, {"heads": 3}, {"dim": 16}, {"value_dim": 4}, {"dtype": mx.float16}], ids=str
)
def test_keys_of_another_shape_or_dtype_raise_and_leave_the_cache_usable(more):
    cache, other = filled(), filled()
    with pytest.raises(ValueError, match="do not fit"):
        cache.update_and_fetch(*tokens(2, 4, **more)[1:])
    assert cache.offset == 50 and continues_alike(cache, other)


def test_empty_size_and_bytes_are_reported():
    cache = tiny.cache(20, policy=SMALL)
    assert cache.empty() and cache.size() == 0 and cache.nbytes == 0 and cache.offset == 0
    give(cache, *tokens(1, 7))
    assert not cache.empty() and cache.size() == 7 and isinstance(cache.nbytes, int)
    give(cache, *tokens(1, 50))
    assert 17 <= cache.size() <= 20
