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
from states import random_queries, random_state
from tiny import f64, give, tokens

import zm_mlx
from zm_mlx.generate import DEFAULT_MODEL
from zm_mlx.ops.kernels import _common
from zm_mlx.ops.kernels.attend import attend
from zm_mlx.ops.kernels.attend_chunk import attend_chunk
from zm_mlx.ops.kernels.compact import compact
from zm_mlx.ops.kernels.score import score
from zm_mlx.ops.plain import attention, compaction
from zm_mlx.policies import Policy, selection
from zm_mlx.state.layout import Layout
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Call, Scores

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
    chosen, others = selection.select(mx.array(scores[None]), count, pool)
    assert chosen.shape == (1, count)
    assert sorted([*chosen[0].tolist(), *others[0].tolist()]) == list(range(n))
    least = mx.array(np.where(np.isnan(scores), -np.inf, scores)[None])
    assert selection.select(least, count, pool)[0].tolist() == chosen.tolist()


def broken(seed, share=0.3, *, rows=False):
    """A state with numbers that are none among its scores, and among keys and values if ``rows``."""
    rng = np.random.default_rng(seed)
    state = random_state(LAYOUT, departed=500, filled=51, batch=2, dim=64, value_dim=64)

    def harm(x, part=share):
        found = np.array(x)
        places = rng.random(found.shape) < part
        found[places] = rng.choice(NO_NUMBERS, places.sum())
        return mx.array(found)

    state = state._replace(scores=Scores(*map(harm, state.scores)))
    if rows:
        kept, recent = (Dense(harm(x.keys, 1e-3), harm(x.values, 1e-3)) for x in (state.kept.rows, state.recent))
        state = state._replace(kept=state.kept._replace(rows=kept), recent=recent)
    assert state.leaving(LAYOUT) == 11
    return state


def compacted(state):
    """By the kernels and by the plain ops."""
    given = (state, LAYOUT, Policy(residual=3), state.scores)
    with metal_host.options(trace=True):
        found = compact(*given)
    return found, compaction.compact(*given)


@pytest.mark.parametrize("seed", range(4))
def test_compaction_kernels_choose_what_the_plain_ops_choose_of_scores_that_are_no_numbers(executor, seed):
    found, expected = compacted(broken(seed))
    assert found.kept.position.tolist() == expected.kept.position.tolist()
    for x, y in zip(found.arrays(), expected.arrays(), strict=True):
        if x is not found.scores.kept:
            equal(x, y, 2e-5)


@pytest.mark.parametrize("seed", range(4))
def test_compaction_of_rows_that_are_no_numbers_stays_within_its_arrays(executor, seed):
    """The residual row of a victim that is no number may differ, what is kept may not."""
    found, expected = compacted(broken(seed, rows=True))
    assert found.kept.position.tolist() == expected.kept.position.tolist()
    raw = np.array(expected.kept.position[0]) >= 0
    for x, y in zip(found.kept.rows, expected.kept.rows, strict=True):
        np.testing.assert_array_equal(f64(x)[:, raw], f64(y)[:, raw])
    weight = f64(found.kept.weight)
    assert np.isfinite(weight).all() and weight.sum() == f64(expected.kept.weight).sum()


@pytest.mark.parametrize("where", ["query", "kept key", "recent key", "kept value"])
@pytest.mark.parametrize("bad", NO_NUMBERS[::2])
@pytest.mark.parametrize("length", [1, 19])
def test_attention_kernels_hide_nothing_that_is_no_number_and_change_nothing_else(executor, where, bad, length):
    state = random_state(LAYOUT, departed=500, filled=50, batch=1, dim=64, value_dim=64)
    queries, kept = 0.4 * random_queries(LAYOUT, length, 2, 64, mx.float32, batch=1), state.kept.rows
    if where == "query":
        queries[0, 1, 0, 3] = bad
    elif where == "kept value":
        kept.values[0, 5, 7] = bad
    elif where == "kept key":
        kept.keys[0, 40, 3] = bad
    else:
        state.recent.keys[0, 1, 30, 3] = bad
    given = (Call(queries, 0.125), state, LAYOUT, Policy(residual=3))
    out, scores = (attend if length == 1 else attend_chunk)(*given)
    expected, expected_scores = attention.attend(*given)
    assert not all(np.isfinite(f64(x)).all() for x in (expected, *expected_scores))
    # In a product of matrices its neighbours (other queries of a tile, masked rows) become no numbers, too.
    assert not np.isfinite(f64(out))[~np.isfinite(f64(expected))].any()
    again = score(*given) if length > 1 else scores
    for x, y in zip((out, *scores, *again), (expected, *expected_scores, *expected_scores), strict=True):
        numbers = np.isfinite(f64(x)) & np.isfinite(f64(y))
        np.testing.assert_allclose(f64(x)[numbers], f64(y)[numbers], atol=1e-4)
        assert numbers.any()


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
@pytest.mark.parametrize("residual", [0, 2])
def test_a_cache_that_met_no_numbers_keeps_its_rows_and_its_cap(prefill, residual):
    policy = Policy(residual=residual, staging=3)
    prompt = {"prefill": prefill, "prompt_length": 60} if prefill == "exact" else {}
    cache = tiny.cache(20, policy=policy, **prompt)
    q, k, v = tokens(1, 120)
    k[:, :, 10] = mx.nan
    out = give(cache, q, k, v, 10)
    rows = tiny.held(cache, 0)
    raw = [p for p in rows.position.tolist() if p >= 0]
    assert raw == sorted(set(raw)) and max(raw) == 119 and len(rows.position) <= 20
    assert rows.weight.sum().item() == (120 if residual else len(raw))
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
    length = 300 if prefill == "exact" else None
    caches = zm_mlx.make_prompt_cache(model, 64, prefill=prefill, prompt_length=length)
    found, logits = tiny.greedy(model, caches, prompt, 12, 100)
    for caches in (full_caches(model), [RotatingKVCache(280, keep=4) for _ in model.layers]):
        expected, reference = tiny.greedy(model, caches, prompt, 12, 100)
        assert np.isnan(reference).all(), "the model does not overflow"
        assert found.tolist() == expected.tolist() and np.isnan(logits).all()
