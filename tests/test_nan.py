"""Scores, keys and values that are no numbers: nothing is written outside of its array, nothing is hidden."""

import metal_host
import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import load
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.models.cache import make_prompt_cache as full_caches
from test_compress import queries_of, stores
from tiny import f64, give, tokens

import zm_mlx
from zm_mlx import compress
from zm_mlx.cache import ZeroMergeCache
from zm_mlx.generate import DEFAULT_MODEL
from zm_mlx.kernels import _common
from zm_mlx.kernels.attend import attend
from zm_mlx.kernels.attend_chunk import attend_chunk
from zm_mlx.kernels.compact import compact
from zm_mlx.kernels.score import score
from zm_mlx.layout import Layout
from zm_mlx.policy import Policy

NO_NUMBERS = (np.nan, -np.nan, np.inf, -np.inf)
LAYOUT = Layout(3, (60, 20), 40, 11)
FEW = settings(max_examples=60, deadline=None)


@pytest.fixture
def executor():
    _common.kernel.cache_clear()
    with metal_host.installed():
        yield
    _common.kernel.cache_clear()


def equal(found, expected, tolerance=1e-5):
    """Equal up to rounding, and not a number at the same places."""
    np.testing.assert_allclose(f64(found), f64(expected), atol=tolerance, rtol=tolerance, equal_nan=True)


@FEW
@given(st.data())
def test_select_takes_as_many_rows_as_it_should_whatever_the_scores_are(data):
    n = data.draw(st.integers(1, 40))
    count, pool = data.draw(st.integers(0, n)), data.draw(st.sampled_from([1, 3, 13]))
    numbers = st.one_of(st.sampled_from(NO_NUMBERS), st.floats(width=32), st.integers(0, 2))
    scores = np.array(data.draw(st.lists(numbers, min_size=n, max_size=n)), np.float32)
    chosen, others = compress.select(mx.array(scores[None]), count, pool)
    assert chosen.shape == (1, count)
    assert sorted([*chosen[0].tolist(), *others[0].tolist()]) == list(range(n))
    least = mx.array(np.where(np.isnan(scores), -np.inf, scores)[None])
    assert compress.select(least, count, pool)[0].tolist() == chosen.tolist()


def broken(seed, share=0.3, *, rows=False):
    """Stores with numbers that are none among their scores, and among keys and values if ``rows``."""
    rng = np.random.default_rng(seed)
    kept, recent = stores(LAYOUT, left=500, live=50, batch=2, dim=64, value_dim=64, dtype=mx.float32)

    def harm(x, some=share):
        found = np.array(x)
        places = rng.random(found.shape) < some
        found[places] = rng.choice(NO_NUMBERS, places.sum())
        return mx.array(found)

    kept, recent = (x._replace(score=harm(x.score)) for x in (kept, recent))
    if rows:
        kept = kept._replace(keys=harm(kept.keys, 1e-3), values=harm(kept.values, 1e-3))
        recent = recent._replace(keys=harm(recent.keys, 1e-3), values=harm(recent.values, 1e-3))
    return kept, recent


@pytest.mark.parametrize("seed", range(4))
def test_compaction_kernels_choose_what_the_plain_ops_choose_of_scores_that_are_no_numbers(executor, seed):
    kept, recent = broken(seed)
    how = {"left": 500, "leaving": 11, "layout": LAYOUT, "policy": Policy(residual=3)}
    with metal_host.options(trace=True):
        found = compact(kept, recent, **how)
    expected = compress.compact(kept, recent, **how)
    assert found.position.tolist() == expected.position.tolist()
    for x, y in zip(found, expected, strict=True):
        if x is not found.score:
            equal(x, y, 2e-5)


@pytest.mark.parametrize("seed", range(4))
def test_compaction_of_rows_that_are_no_numbers_stays_within_its_arrays(executor, seed):
    """The residual row of a victim that is no number may differ, what is kept may not."""
    kept, recent = broken(seed, rows=True)
    how = {"left": 500, "leaving": 11, "layout": LAYOUT, "policy": Policy(residual=3)}
    with metal_host.options(trace=True):
        found = compact(kept, recent, **how)
    expected = compress.compact(kept, recent, **how)
    assert found.position.tolist() == expected.position.tolist()
    raw = np.array(expected.position[0]) >= 0
    for x, y in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(f64(x)[:, raw], f64(y)[:, raw])
    assert np.isfinite(f64(found.weight)).all() and f64(found.weight).sum() == f64(expected.weight).sum()


@pytest.mark.parametrize("where", ["query", "kept key", "recent key", "kept value"])
@pytest.mark.parametrize("bad", NO_NUMBERS[::2])
@pytest.mark.parametrize("length", [1, 19])
def test_attention_kernels_hide_nothing_that_is_no_number_and_change_nothing_else(executor, where, bad, length):
    kept, recent = stores(LAYOUT, left=500, live=50, batch=1, dim=64, value_dim=64, dtype=mx.float32)
    queries = 0.4 * queries_of(LAYOUT, length, 2, 64, mx.float32, batch=1)
    if where == "query":
        queries[0, 1, 0, 3] = bad
    elif where == "kept value":
        kept.values[0, 5, 7] = bad
    else:
        rows = kept.keys[0, 40] if where == "kept key" else recent.keys[0, 1, 30]
        rows[3] = bad
        if where == "kept key":
            kept.keys[0, 40] = rows
        else:
            recent.keys[0, 1, 30] = rows
    how = {"left": 500, "live": 50, "layout": LAYOUT, "policy": Policy(residual=3), "scale": 0.125}
    found = (attend if length == 1 else attend_chunk)(queries, kept, recent, **how)
    expected = compress.attend(queries, kept, recent, **how)
    assert not all(np.isfinite(f64(x)).all() for x in expected)
    # A product with a matrix that holds one makes its neighbours (other queries of a tile, masked rows) no numbers, too.
    assert not np.isfinite(f64(found[0]))[~np.isfinite(f64(expected[0]))].any()
    again = score(queries, kept, recent, tokens=length, **how) if length > 1 else found[1:]
    for x, y in zip([*found, *again], [*expected, *expected[1:]], strict=True):
        numbers = np.isfinite(f64(x)) & np.isfinite(f64(y))
        np.testing.assert_allclose(f64(x)[numbers], f64(y)[numbers], atol=1e-4)
        assert numbers.any()


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
@pytest.mark.parametrize("residual", [0, 2])
def test_a_cache_that_met_no_numbers_keeps_its_rows_and_its_cap(prefill, residual):
    policy = Policy(residual=residual, staging=3)
    how = {"prefill": prefill, "prompt_length": 60} if prefill == "exact" else {}
    cache = ZeroMergeCache(20, policy=policy, **how)
    q, k, v = tokens(1, 120)
    k[:, :, 10] = mx.nan
    out = give(cache, q, k, v, 10)
    kept = cache.held(0)
    raw = [p for p in kept.position.tolist() if p >= 0]
    assert raw == sorted(set(raw)) and max(raw) == 119 and len(kept.position) <= 20
    assert kept.weight.sum().item() == (120 if residual else len(raw))
    assert np.isnan(f64(out[:, :, 15])).all()  # a full cache says the same
    if residual:  # what was merged is still there
        assert np.isnan(f64(out[:, :, -1])).all()


def overflowing():
    model, _ = load(DEFAULT_MODEL)
    model.set_dtype(mx.float16)
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = layer.weight * 30000
    return model


def with_a_nan_embedding():
    model, _ = load(DEFAULT_MODEL)
    model.set_dtype(mx.float32)
    weight = model.model.embed_tokens.weight
    weight[50] = mx.nan
    model.model.embed_tokens.weight = weight
    return model


@pytest.mark.parametrize("make", [overflowing, with_a_nan_embedding])
@pytest.mark.parametrize("prefill", ["streaming", "exact"])
def test_a_model_that_produces_nan_gives_what_it_gives_with_mlx_lms_caches(make, prefill):
    model = make()
    prompt = tiny.prompt(300, 3, vocab=2000)
    prompt[0, 150] = 50
    how = {"prefill": prefill} | ({"prompt_length": 300} if prefill == "exact" else {})
    found, logits = tiny.greedy(model, zm_mlx.make_prompt_cache(model, 64, **how), prompt, 12, 100)
    for caches in (full_caches(model), [RotatingKVCache(280, keep=4) for _ in model.layers]):
        expected, reference = tiny.greedy(model, caches, prompt, 12, 100)
        assert np.isnan(reference).all(), "the model does not overflow"
        assert found.tolist() == expected.tolist() and np.isnan(logits).all()
