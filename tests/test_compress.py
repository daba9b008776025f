"""The plain ops against the float64 twin, one function at a time."""

import math

import mlx.core as mx
import numpy as np
import pytest
import twin
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TOLERANCE, f64, rounding

from zm_mlx import compress
from zm_mlx.layout import Layout
from zm_mlx.policy import Policy
from zm_mlx.stores import Kept, Recent

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
UNIFORM, RAGGED = (5, 5, 5), (0, 9, 5)  # context rows of each head
GARBAGE = 3e4  # in rows that hold nothing


def names(dtypes):
    return [str(d).rpartition(".")[2] for d in dtypes]


def stores(layout, *, left, live, batch=2, dim=8, value_dim=8, dtype=mx.float32, seed=0, empty=()):
    """Random stores: merged rows once ``left`` tokens no longer fit a head, garbage wherever nothing lives."""
    rng = np.random.default_rng(seed)
    rows, heads, r = layout.starts[-1], layout.heads, layout.residual
    keys, values = rng.standard_normal((batch, rows, dim)), rng.standard_normal((batch, rows, value_dim))
    weight, score = np.ones((batch, rows)), rng.random((batch, rows))
    spread = np.zeros((batch, heads, r))
    for h in range(heads):
        begin, end = layout.starts[h : h + 2]
        if left > end - begin:
            weight[:, begin : begin + r] = rng.integers(2, 30, (batch, r))
            spread[:, h] = rng.random((batch, r)) * 2
            for i in empty:
                weight[:, begin + i] = 0
        else:
            keys[:, begin + left : end] = values[:, begin + left : end] = GARBAGE
            weight[:, begin + left : end] = 0
    news = [rng.standard_normal((batch, heads, layout.recent, d)) for d in (dim, value_dim)]
    for x in news:
        x[:, :, live:] = GARBAGE
    recent = Recent(*[mx.array(x).astype(dtype) for x in news], mx.array(rng.random((batch, heads, layout.recent))))
    kept = Kept.empty(batch, layout, dim, value_dim, dtype)
    kept = kept._replace(
        keys=mx.array(keys).astype(dtype),
        values=mx.array(values).astype(dtype),
        weight=mx.array(weight.astype(np.float32)),
        score=mx.array(score.astype(np.float32)),
        spread=mx.array(spread.astype(np.float32)),
    )
    return kept, recent


def head_of(layout, kept, recent, b, h, left, live):
    """The live rows of one stored head in float64: keys, values, weight, spread, how many are kept rows."""
    begin, end = layout.starts[h : h + 2]
    old = min(left, end - begin)
    rows = slice(begin, begin + old)
    keys = np.concatenate([f64(kept.keys[b, rows]), f64(recent.keys[b, h, :live])])
    values = np.concatenate([f64(kept.values[b, rows]), f64(recent.values[b, h, :live])])
    weight = np.concatenate([f64(kept.weight[b, rows]), np.ones(live)])
    spread = np.zeros(old + live)
    if left > end - begin:
        spread[: layout.residual] = f64(kept.spread[b, h])
    return keys, values, weight, spread, old


def check_attention(layout, kept, recent, queries, *, left, live, policy, sinks=None, scale=0.3):
    """``attend`` and ``score`` equal the twin for every sequence and head."""
    how = {"left": left, "live": live, "layout": layout, "policy": policy, "scale": scale, "sinks": sinks}
    out, *scores = compress.attend(queries, kept, recent, **how)
    assert out.dtype == queries.dtype and all(s.dtype == mx.float32 for s in scores)
    batch, _, length, dim = queries.shape
    again = compress.score(queries, kept, recent, tokens=length, **how)
    assert all(mx.array_equal(*pair) for pair in zip(again, scores, strict=True))
    assert out.shape == (*queries.shape[:3], recent.values.shape[-1])
    assert scores[0].shape == kept.score.shape and scores[1].shape == recent.score.shape
    assert not scores[1][:, :, live:].any(), "a recent row that holds nothing has a score"
    fade = policy.decay**length
    on_kept, on_recent = scores[0] - fade * kept.score, (scores[1] - fade * recent.score)[:, :, :live]
    q = f64(queries).reshape(batch, layout.heads, -1, length, dim)
    outputs = f64(out).reshape(*q.shape[:4], -1)
    error = TOLERANCE[queries.dtype]
    for b in range(batch):
        for h in range(layout.heads):
            keys, values, weight, spread, old = head_of(layout, kept, recent, b, h, left, live)
            visible = np.ones((length, old + live), bool)
            visible[:, old:] = np.arange(live) <= np.arange(live - length, live)[:, None]
            sink = None if sinks is None else f64(sinks).reshape(layout.heads, -1)[h]
            expected, p = twin.attention(
                q[b, h], keys, values, weight, spread, visible,
                scale=scale, alpha=policy.alpha, kappa=policy.kappa, sinks=sink,
            )  # fmt: skip
            np.testing.assert_allclose(outputs[b, h], expected, atol=error, rtol=error)
            mass = twin.mass(p, policy.decay)
            begin, end = layout.starts[h : h + 2]
            np.testing.assert_allclose(f64(on_kept[b, begin : begin + old]), mass[:old], atol=3e-5, rtol=1e-4)
            assert np.abs(f64(on_kept[b, begin + old : end])).max(initial=0) < 1e-6, "a row that holds nothing has mass"
            np.testing.assert_allclose(f64(on_recent[b, h]), mass[old:], atol=3e-5, rtol=1e-4)


def queries_of(layout, length, groups, dim, dtype, batch=2, seed=1):
    x = np.random.default_rng(seed).standard_normal((batch, layout.heads * groups, length, dim)) * 2
    return mx.array(x).astype(dtype)


# ---- attend and score


@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
@pytest.mark.parametrize("context", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("length", [1, 4])
def test_attend_equals_the_twin_over_merged_rows(dtype, groups, context, length):
    layout = Layout(3, tuple(sorted(context, reverse=True)), 4, 3)
    kept, recent = stores(layout, left=100, live=6, value_dim=12, dtype=dtype)
    queries = queries_of(layout, length, groups, 8, dtype)
    check_attention(layout, kept, recent, queries, left=100, live=6, policy=Policy())


@pytest.mark.parametrize("left", [0, 1, 4, 9])
def test_rows_that_hold_nothing_are_never_read(left):
    layout = Layout(3, (9, 5, 0), 4, 3)  # 4: one head is full; 9: one head has merged, one is partly filled
    kept, recent = stores(layout, left=left, live=5)
    check_attention(layout, kept, recent, queries_of(layout, 3, 2, 8, mx.float32), left=left, live=5, policy=Policy())


def test_residual_rows_of_weight_0_are_invisible():
    layout = Layout(3, UNIFORM, 4, 3)
    kept, recent = stores(layout, left=100, live=7, empty=(0, 2))
    check_attention(layout, kept, recent, queries_of(layout, 1, 2, 8, mx.float32), left=100, live=7, policy=Policy())


@pytest.mark.parametrize("layout", [Layout(0, (0, 0), 4, 3), Layout(0, (5, 0), 4, 3), Layout(2, (0, 0), 1, 1)])
def test_heads_without_residual_or_context_rows(layout):
    live = layout.recent
    kept, recent = stores(layout, left=50, live=live)
    queries = queries_of(layout, 1, 2, 8, mx.float32)
    check_attention(layout, kept, recent, queries, left=50, live=live, policy=Policy())


@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
def test_sinks_take_probability_and_nothing_else(dtype):
    layout = Layout(3, RAGGED[1:], 4, 3)
    kept, recent = stores(layout, left=100, live=6, dtype=dtype)
    sinks = mx.array(np.random.default_rng(3).standard_normal(2 * 3) * 2).astype(dtype)
    queries = queries_of(layout, 4, 3, 8, dtype)
    check_attention(layout, kept, recent, queries, left=100, live=6, policy=Policy(), sinks=sinks)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(kappa=0, pool=1),
        Policy(kappa=0.2),
        Policy(kappa=100),
        Policy(alpha=0),
        Policy(alpha=0.6),
        Policy(decay=1),
        Policy(decay=0.5),
    ],
    ids=lambda p: f"alpha {p.alpha} kappa {p.kappa} decay {p.decay}",
)
def test_every_setting_of_attention_means_what_the_equation_says(policy):
    layout = Layout(3, RAGGED[1:], 4, 3)
    kept, recent = stores(layout, left=100, live=7)
    queries = queries_of(layout, 5, 2, 8, mx.float32)
    check_attention(layout, kept, recent, queries, left=100, live=7, policy=policy)


def test_a_merged_row_of_n_equal_tokens_counts_like_n_rows():
    layout, again = Layout(1, (4,), 2, 1), Layout(0, (9,), 2, 1)
    kept, recent = stores(layout, left=100, live=3, batch=1)
    kept = kept._replace(weight=mx.array([[5.0, 1, 1, 1, 1]]), spread=mx.zeros((1, 1, 1)))
    many = [mx.concatenate([mx.repeat(x[:, :1], 5, axis=1), x[:, 1:]], axis=1) for x in kept.rows[:2]]
    raw = Kept.empty(1, again, 8, 8, mx.float32)._replace(keys=many[0], values=many[1], weight=mx.ones((1, 9)))
    q = queries_of(layout, 1, 2, 8, mx.float32, batch=1)
    how = {"left": 100, "live": 3, "policy": Policy(), "scale": 0.3}
    a = compress.attend(q, kept, recent, layout=layout, **how)
    b = compress.attend(q, raw, recent, layout=again, **how)
    np.testing.assert_allclose(f64(a[0]), f64(b[0]), atol=1e-6)
    mass = [x[1] - Policy().decay * s.score for x, s in ((a, kept), (b, raw))]
    np.testing.assert_allclose(f64(mass[0])[0, 0], f64(mass[1])[0, :5].sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
@pytest.mark.parametrize("limit", ["LOGIT_BYTES", "TILE_BYTES", "both"])
def test_blocks_of_queries_and_tiles_of_rows_change_nothing(monkeypatch, dtype, limit):
    layout = Layout(3, tuple(sorted(RAGGED, reverse=True)), 4, 9)
    kept, recent = stores(layout, left=100, live=13, dtype=dtype, value_dim=12)
    queries = queries_of(layout, 9, 2, 8, dtype)
    for name, small in (("LOGIT_BYTES", 4 * 2 * 1 * 2 * 25 * 2), ("TILE_BYTES", 4 * 2 * 12 * 4)):
        if limit in (name, "both"):
            monkeypatch.setattr(compress, name, small)
    if limit != "TILE_BYTES":
        assert compress.block_length(queries[:, :4], 25) < 9, "the queries are not blocked"
    if limit != "LOGIT_BYTES" and dtype != mx.float32:
        assert len(list(compress._tiles(recent.keys))) > 1, "the rows are not tiled"
    check_attention(layout, kept, recent, queries, left=100, live=13, policy=Policy(decay=0.8))
    state = merge_state(3, 2, 8, dtype)
    keys, values, score, victims = pool_state(3, 2, 11, 8, dtype)
    tiled = compress.merge(state, keys, values, score, victims, 3, False)
    monkeypatch.undo()
    whole = compress.merge(state, keys, values, score, victims, 3, False)
    for a, b in zip(tiled, whole, strict=True):
        np.testing.assert_allclose(f64(a), f64(b), rtol=1e-2 if a.dtype == dtype else 1e-5, atol=1e-5)


def peak(work):
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(work())
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("context", [(400, 400), (600, 200)], ids=["uniform", "ragged"])
def test_blocks_of_queries_bound_memory(monkeypatch, context):
    """Lazy evaluation may run independent blocks side by side: then all logits exist at once."""
    layout = Layout(4, context, 540, 20)
    kept, recent = stores(layout, left=9000, live=560, batch=1)
    queries = queries_of(layout, 512, 2, 8, mx.float32, batch=1)
    monkeypatch.setattr(compress, "LOGIT_BYTES", 2**16)
    mx.eval(kept, recent, queries)
    how = {"left": 9000, "live": 560, "layout": layout, "policy": Policy(), "scale": 0.3}
    logits = 4 * 4 * 512 * 960
    assert peak(lambda: compress.attend(queries, kept, recent, **how)) < logits / 8
    assert peak(lambda: compress.score(queries, kept, recent, tokens=512, **how)) < logits / 8


def test_tiles_of_half_precision_rows_bound_memory(monkeypatch):
    """Some tiles are always in flight, but not all of them."""
    layout = Layout(4, (20000,), 4, 4)
    kept, recent = stores(layout, left=90000, live=8, batch=1, dim=32, value_dim=32, dtype=mx.float16)
    queries = queries_of(layout, 1, 1, 32, mx.float16, batch=1)
    mx.eval(kept, recent, queries)
    how = {"left": 90000, "live": 8, "layout": layout, "policy": Policy(), "scale": 0.3}
    whole = peak(lambda: compress.attend(queries, kept, recent, **how))
    state = merge_state(4, 1, 32, mx.float16, batch=1)
    pool = pool_state(4, 1, 20000, 32, mx.float16, batch=1)
    mx.eval(state, pool)
    merged = peak(lambda: compress.merge(state, *pool, 4, False))
    monkeypatch.setattr(compress, "TILE_BYTES", 4 * 32 * 500)  # 40 tiles
    assert peak(lambda: compress.attend(queries, kept, recent, **how)) < whole / 3
    assert peak(lambda: compress.merge(state, *pool, 4, False)) < merged / 3


def test_block_length_keeps_logits_below_the_limit_and_is_at_least_1(monkeypatch):
    q = mx.zeros((2, 6, 1000, 4))
    for limit in (1, 10**4, 10**6, 10**9):
        monkeypatch.setattr(compress, "LOGIT_BYTES", limit)
        length = compress.block_length(q, 50)
        assert length == 1 or 4 * 2 * 6 * length * 50 <= limit
        assert length == 1000 or 4 * 2 * 6 * (length + 1) * 50 > limit


# ---- select


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.sampled_from([1, 3, 5, 13]), st.data())
def test_select_pools_and_gives_ties_to_the_older(score, pool, data):
    count = data.draw(st.integers(0, len(score)))
    chosen, victims = compress.select(mx.array([score], mx.float32), count, pool)
    expected, others = twin.select([float(s) for s in score], count, pool)
    assert chosen.tolist() == [expected]
    assert victims.tolist() == [others]


def test_select_chooses_for_each_head_by_itself():
    score = np.random.default_rng(0).random((2, 3, 40))
    chosen, victims = compress.select(mx.array(score.astype(np.float32)), 11, 5)
    for b in range(2):
        for h in range(3):
            expected, others = twin.select(score[b, h].tolist(), 11, 5)
            assert chosen[b, h].tolist() == expected
            assert victims[b, h].tolist() == others


# ---- merge


def merge_state(residual, heads, dim, dtype, batch=2, seed=5, counts=(2, 9)):
    """Residual rows with exact sums of their own random tokens."""
    rng = np.random.default_rng(seed)
    layout = Layout(residual, (0,) * heads, 1, 1)
    many = rng.integers(*counts, (batch, heads, residual))
    sums = [np.zeros((batch, heads, residual, dim)) for _ in range(2)]
    squares = np.zeros((batch, heads, residual))
    for at in np.ndindex(many.shape):
        k, v = rng.standard_normal((2, many[at], dim))
        sums[0][at], sums[1][at], squares[at] = k.sum(0), v.sum(0), (k * k).sum()
    rows = [(s / many[..., None]).astype(np.float32) for s in sums]
    f32 = [mx.array(x.astype(np.float32)) for x in (*sums, squares, many, rng.random(many.shape))]
    empty = Kept.empty(batch, layout, dim, dim, dtype)
    spread = np.maximum(0, squares / many - ((sums[0] / many[..., None]) ** 2).sum(-1)) / dim
    return empty._replace(
        keys=mx.array(rows[0]).astype(dtype),
        values=mx.array(rows[1]).astype(dtype),
        weight=f32[3],
        score=f32[4],
        position=mx.full(many.shape, -1, mx.int32),
        spread=mx.array(spread.astype(np.float32)),
        key_sum=f32[0],
        value_sum=f32[1],
        square_sum=f32[2],
    )


def pool_state(batch_heads, heads, count, dim, dtype, batch=2, seed=6):
    rng = np.random.default_rng(seed)
    keys, values = (mx.array(rng.standard_normal((batch, heads, count, dim))).astype(dtype) for _ in range(2))
    score = mx.array(rng.random((batch, heads, count)).astype(np.float32))
    return keys, values, score, mx.array(rng.random((batch, heads, count)) < 0.7)


def merged_by_hand(state, keys, values, score, victims, b, h):
    """Float64: each victim to the residual row with the largest dot product with its stored key."""
    sums = [f64(x[b, h]) for x in (state.key_sum, state.value_sum)]
    squares, weight, best = f64(state.square_sum[b, h]), f64(state.weight[b, h]), f64(state.score[b, h])
    centres = f64(state.keys[b, h])
    for i in np.flatnonzero(np.array(victims[b, h])):
        k, v = f64(keys[b, h, i]), f64(values[b, h, i])
        r = int(np.argmax(centres @ k))
        sums[0][r], sums[1][r] = sums[0][r] + k, sums[1][r] + v
        squares[r], weight[r] = squares[r] + k @ k, weight[r] + 1
        best[r] = max(best[r], f64(score[b, h, i]))
    mean, value = (s / weight[:, None] for s in sums)
    return mean, value, weight, best, np.maximum(0, squares / weight - (mean**2).sum(-1)) / mean.shape[-1]


@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
def test_victims_join_the_nearest_row_and_rows_are_exact_means(dtype):
    state = merge_state(3, 2, 8, dtype)
    keys, values, score, victims = pool_state(3, 2, 20, 8, dtype)
    merged = compress.merge(state, keys, values, score, victims, 3, False)
    assert merged.keys.dtype == merged.values.dtype == dtype and merged.key_sum.dtype == mx.float32
    assert (merged.position == -1).all()
    for b in range(2):
        for h in range(2):
            k, v, weight, best, spread = merged_by_hand(state, keys, values, score, victims, b, h)
            assert f64(merged.weight[b, h]).tolist() == weight.tolist()
            np.testing.assert_allclose(f64(merged.keys[b, h]), k, atol=TOLERANCE[dtype])
            np.testing.assert_allclose(f64(merged.values[b, h]), v, atol=TOLERANCE[dtype])
            np.testing.assert_allclose(f64(merged.score[b, h]), best, rtol=1e-6)
            np.testing.assert_allclose(f64(merged.spread[b, h]), spread, rtol=1e-4, atol=1e-6)


def test_a_mean_of_thousands_of_half_precision_tokens_keeps_moving():
    state = merge_state(1, 1, 4, mx.float16, batch=1, counts=(4000, 4001))
    ones = mx.ones((1, 1, 400, 4), mx.float16)
    merged = state
    for _ in range(10):
        merged = compress.merge(merged, ones, ones, mx.ones((1, 1, 400)), mx.ones((1, 1, 400), mx.bool_), 1, False)
    expected = (f64(state.key_sum) + 4000) / 8000
    assert merged.weight.item() == 8000
    np.testing.assert_allclose(f64(merged.keys), expected, atol=1e-3)


def test_equal_dot_products_join_the_lowest_residual_row():
    state = merge_state(4, 1, 8, mx.float32, batch=1)
    same = state.keys[:, :, 1:2]
    state = state._replace(keys=mx.concatenate([-same, same, same, same], axis=2))
    keys = mx.repeat(same, 5, axis=2)
    every = mx.ones((1, 1, 5), mx.bool_)
    merged = compress.merge(state, keys, keys, mx.ones((1, 1, 5)), every, 4, False)
    assert f64(merged.weight - state.weight).tolist() == [[[0, 5, 0, 0]]]


def test_all_victims_choose_by_the_keys_before_the_merge():
    state = merge_state(2, 1, 2, mx.float32, batch=1)
    centres = mx.array([[[[1.0, 0.0], [0.9, 0.0]]]])
    state = state._replace(keys=centres, key_sum=centres, weight=mx.ones((1, 1, 2)))
    # The first victim drags row 0 to the far left; the second still belongs to it.
    keys = mx.array([[[[0.1, 50.0], [1.0, 0.1]]]])
    merged = compress.merge(state, keys, keys, mx.ones((1, 1, 2)), mx.ones((1, 1, 2), mx.bool_), 2, False)
    assert merged.weight.tolist() == [[[3, 1]]]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 30))
def test_merging_does_not_depend_on_the_order_of_victims(seed, residual, count):
    state = merge_state(residual, 2, 8, mx.float32, seed=seed)
    pool = pool_state(residual, 2, count, 8, mx.float32, seed=seed)
    order = mx.array(np.random.default_rng(seed).permutation(count))
    a = compress.merge(state, *pool, residual, False)
    b = compress.merge(state, *(x[:, :, order] for x in pool), residual, False)
    assert mx.array_equal(a.weight, b.weight) and mx.array_equal(a.score, b.score)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(f64(x), f64(y), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("count", [4, 5, 6, 7, 8, 23])
def test_empty_residual_rows_are_filled_by_contiguous_groups_of_equal_size(count):
    keys, values, score, _ = pool_state(4, 2, count + 3, 8, mx.float32)
    victims = np.ones((2, 2, count + 3), bool)
    victims[..., [0, 2, 3]] = False
    empty = Kept.empty(2, Layout(4, (0, 0), 1, 1), 8, 8, mx.float32)
    empty = empty.with_rows([x.reshape(2, 2, 4, *x.shape[2:]) for x in empty.rows])
    merged = compress.merge(empty, keys, values, score, mx.array(victims), 4, True)
    assert merged.weight.max().item() - merged.weight.min().item() <= 1
    for b in range(2):
        for h in range(2):
            rows = np.flatnonzero(victims[b, h])
            ends = np.cumsum(f64(merged.weight[b, h])).astype(int)
            assert ends[-1] == count
            for i, (a, z) in enumerate(zip([0, *ends], ends, strict=False)):
                k = f64(keys[b, h])[rows[a:z]]
                np.testing.assert_allclose(f64(merged.keys[b, h, i]), k.mean(0), atol=1e-6)
                np.testing.assert_allclose(f64(merged.spread[b, h, i]), twin.spread_of(k), atol=1e-5)
                np.testing.assert_allclose(f64(merged.score[b, h, i]), f64(score[b, h])[rows[a:z]].max(), atol=1e-6)


# ---- compact


@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
@pytest.mark.parametrize("context", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("residual", [0, 1, 3])
@pytest.mark.parametrize("pool", [1, 5])
def test_compact_moves_then_fills_then_merges(dtype, context, residual, pool):
    """Rows leave three at a time with random scores; after each compaction every head equals the twin's."""
    layout = Layout(residual, tuple(sorted(context, reverse=True)), 2, 3)
    policy = Policy(residual=residual, pool=pool)
    rng = np.random.default_rng(residual + pool)
    near = rounding(dtype)
    heads = [[twin.Head(residual, m, 0, pool, near) for m in layout.context] for _ in range(2)]
    kept = Kept.empty(2, layout, 8, 12, dtype)
    for step in range(8):
        keys, values = (near(rng.standard_normal((2, 3, 5, d))) for d in (8, 12))
        score = rng.random((2, 3, 5)).astype(np.float32)
        recent = Recent(mx.array(keys).astype(dtype), mx.array(values).astype(dtype), mx.array(score))
        kept = compress.compact(kept, recent, left=3 * step, leaving=3, layout=layout, policy=policy)
        starts = layout.starts
        for b in range(2):
            for h, head in enumerate(heads[b]):
                for i in range(3):
                    head.append(keys[b, h, i], values[b, h, i], float(score[b, h, i]))
                head.compact()
                rows = slice(starts[h], starts[h] + len(head.rows))
                assert len(head.rows) == min(3 * (step + 1), starts[h + 1] - starts[h])
                if not head.rows:
                    continue
                expected = head.arrays()
                np.testing.assert_allclose(f64(kept.keys[b, rows]), expected[0], atol=TOLERANCE[dtype])
                np.testing.assert_allclose(f64(kept.values[b, rows]), expected[1], atol=TOLERANCE[dtype])
                assert f64(kept.weight[b, rows]).tolist() == expected[2].tolist()
                np.testing.assert_allclose(f64(kept.score[b, rows]), [r.score for r in head.rows], atol=1e-6)
                positions = [-1] * len(head.merged) + [r.tokens[0] for r in head.raw]
                assert kept.position[b, rows].tolist() == positions
                if head.merged:
                    merged = len(head.merged)
                    np.testing.assert_allclose(f64(kept.spread[b, h]), expected[3][:merged], rtol=1e-3, atol=1e-5)
                    for s, what in ((kept.key_sum, head.keys), (kept.value_sum, head.values)):
                        sums = [np.sum([what[t] for t in r.tokens], axis=0) for r in head.merged]
                        np.testing.assert_allclose(f64(s[b, h]), sums, atol=1e-4)
                    squares = [sum(head.keys[t] @ head.keys[t] for t in r.tokens) for r in head.merged]
                    np.testing.assert_allclose(f64(kept.square_sum[b, h]), squares, rtol=1e-5)


def test_large_scores_and_small_ones_do_not_tie():
    score = mx.array([[1e-12, 3e-12, 2e-12, 1e6, 0.0]])
    assert compress.select(score, 3, 1)[0].tolist() == [[1, 2, 3]]


def test_logits_of_a_thousand_nats_stay_finite():
    layout = Layout(3, UNIFORM, 4, 3)
    kept, recent = stores(layout, left=100, live=7)
    out, *masses = compress.attend(
        queries_of(layout, 1, 2, 8, mx.float32) * 1e3, kept, recent,
        left=100, live=7, layout=layout, policy=Policy(), scale=0.3,
    )  # fmt: skip
    assert all(math.isfinite(x.sum().item()) for x in (out, *masses))
