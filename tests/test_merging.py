"""Residual merging (zm_mlx/ops/plain/merging.py) against float64."""

import mlx.core as mx
import numpy as np
import pytest
import twin
from hypothesis import given, settings
from hypothesis import strategies as st
from states import FLOATS, f32, names
from test_attention import peak
from tiny import TOLERANCE, f64

from zm_mlx.policies.merging import merge
from zm_mlx.state import rows
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Merged, Residuals


def merged_rows(residual, heads, dim, dtype, batch=2, seed=5, counts=(2, 9)):
    """Residual rows with exact sums of their own random tokens."""
    rng = np.random.default_rng(seed)
    many = rng.integers(*counts, (batch, heads, residual))
    sums = [np.zeros((batch, heads, residual, dim)) for _ in range(2)]
    squares = np.zeros((batch, heads, residual))
    for at in np.ndindex(many.shape):
        k, v = rng.standard_normal((2, many[at], dim))
        sums[0][at], sums[1][at], squares[at] = k.sum(0), v.sum(0), (k * k).sum()
    spread = np.maximum(0, squares / many - ((sums[0] / many[..., None]) ** 2).sum(-1)) / dim
    return Merged(
        Dense(*(f32(s / many[..., None]).astype(dtype) for s in sums)),
        f32(many),
        f32(rng.random(many.shape)),
        Residuals(f32(spread), f32(sums[0]), f32(sums[1]), f32(squares)),
    )


def no_rows(residual, heads, dim, dtype, batch=2):
    """Residual rows that hold nothing."""
    shape = (batch, heads, residual)
    none, sums = mx.zeros(shape), mx.zeros((*shape, dim))
    return Merged(Dense.zeros(shape, dim, dim, dtype), none, none, Residuals(none, sums, sums, none))


def victims(heads, count, dim, dtype, batch=2, seed=6):
    """Rows [B, H, count] and their scores."""
    rng = np.random.default_rng(seed)
    keys, values = (mx.array(rng.standard_normal((batch, heads, count, dim))).astype(dtype) for _ in range(2))
    return Dense(keys, values), f32(rng.random((batch, heads, count)))


def merged_by_hand(merged, new, scores, b, h):
    """Float64: each victim to the residual row with the largest dot product with its stored key."""
    sums = [f64(x[b, h]) for x in (merged.residuals.key_sum, merged.residuals.value_sum)]
    squares, weight, best = (f64(x[b, h]) for x in (merged.residuals.square_sum, merged.weight, merged.score))
    centres = f64(merged.rows.keys[b, h])
    for i in range(scores.shape[2]):
        k, v = f64(new.keys[b, h, i]), f64(new.values[b, h, i])
        r = int(np.argmax(centres @ k))
        sums[0][r], sums[1][r] = sums[0][r] + k, sums[1][r] + v
        squares[r], weight[r] = squares[r] + k @ k, weight[r] + 1
        best[r] = max(best[r], f64(scores[b, h, i]))
    mean, value = (s / weight[:, None] for s in sums)
    return mean, value, weight, best, np.maximum(0, squares / weight - (mean**2).sum(-1)) / mean.shape[-1]


def leaves(merged):
    return [*merged.rows, merged.weight, merged.score, *merged.residuals]


@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
def test_victims_join_the_nearest_row_and_rows_are_exact_means(dtype):
    before, (new, scores) = merged_rows(3, 2, 8, dtype), victims(2, 20, 8, dtype)
    merged = merge(before, new, scores, False)
    assert merged.rows.keys.dtype == merged.rows.values.dtype == dtype
    assert all(x.dtype == mx.float32 for x in (merged.weight, merged.score, *merged.residuals))
    for b in range(2):
        for h in range(2):
            k, v, weight, best, spread = merged_by_hand(before, new, scores, b, h)
            assert f64(merged.weight[b, h]).tolist() == weight.tolist()
            np.testing.assert_allclose(f64(merged.rows.keys[b, h]), k, atol=TOLERANCE[dtype])
            np.testing.assert_allclose(f64(merged.rows.values[b, h]), v, atol=TOLERANCE[dtype])
            np.testing.assert_allclose(f64(merged.score[b, h]), best, rtol=1e-6)
            np.testing.assert_allclose(f64(merged.residuals.spread[b, h]), spread, rtol=1e-4, atol=1e-6)


def test_a_mean_of_thousands_of_half_precision_tokens_keeps_moving():
    before = merged_rows(1, 1, 4, mx.float16, batch=1, counts=(4000, 4001))
    ones = mx.ones((1, 1, 400, 4), mx.float16)
    merged = before
    for _ in range(10):
        merged = merge(merged, Dense(ones, ones), mx.ones((1, 1, 400)), False)
    expected = (f64(before.residuals.key_sum) + 4000) / 8000
    assert merged.weight.item() == 8000
    np.testing.assert_allclose(f64(merged.rows.keys), expected, atol=1e-3)


def test_equal_dot_products_join_the_lowest_residual_row():
    before = merged_rows(4, 1, 8, mx.float32, batch=1)
    same = before.rows.keys[:, :, 1:2]
    keys = mx.concatenate([-same, same, same, same], axis=2)
    new = mx.repeat(same, 5, axis=2)
    merged = merge(before._replace(rows=before.rows._replace(keys=keys)), Dense(new, new), mx.ones((1, 1, 5)), False)
    assert f64(merged.weight - before.weight).tolist() == [[[0, 5, 0, 0]]]


def test_all_victims_choose_by_the_keys_before_the_merge():
    centres = mx.array([[[[1.0, 0.0], [0.9, 0.0]]]])
    before = no_rows(2, 1, 2, mx.float32, batch=1)
    before = before._replace(
        rows=before.rows._replace(keys=centres),
        weight=mx.ones((1, 1, 2)),
        residuals=before.residuals._replace(key_sum=centres),
    )
    # The first victim drags row 0 to the far left; the second still belongs to it.
    keys = mx.array([[[[0.1, 50.0], [1.0, 0.1]]]])
    merged = merge(before, Dense(keys, keys), mx.ones((1, 1, 2)), False)
    assert merged.weight.tolist() == [[[3, 1]]]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 30))
def test_merging_does_not_depend_on_the_order_of_victims(seed, residual, count):
    before = merged_rows(residual, 2, 8, mx.float32, seed=seed)
    new, scores = victims(2, count, 8, mx.float32, seed=seed)
    order = mx.array(np.random.default_rng(seed).permutation(count))
    a = merge(before, new, scores, False)
    b = merge(before, new.map(lambda x: x[:, :, order]), scores[:, :, order], False)
    assert mx.array_equal(a.weight, b.weight) and mx.array_equal(a.score, b.score)
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(f64(x), f64(y), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("count", [4, 5, 6, 7, 8, 23])
def test_empty_residual_rows_are_filled_by_contiguous_groups_of_equal_size(count):
    new, scores = victims(2, count, 8, mx.float32)
    merged = merge(no_rows(4, 2, 8, mx.float32), new, scores, True)
    assert merged.weight.max().item() - merged.weight.min().item() <= 1
    for b in range(2):
        for h in range(2):
            ends = np.cumsum(f64(merged.weight[b, h])).astype(int)
            assert ends[-1] == count
            for i, (a, z) in enumerate(zip([0, *ends], ends, strict=False)):
                k, v = f64(new.keys[b, h, a:z]), f64(new.values[b, h, a:z])
                np.testing.assert_allclose(f64(merged.rows.keys[b, h, i]), k.mean(0), atol=1e-6)
                np.testing.assert_allclose(f64(merged.rows.values[b, h, i]), v.mean(0), atol=1e-6)
                np.testing.assert_allclose(f64(merged.residuals.spread[b, h, i]), twin.spread_of(k), atol=1e-5)
                np.testing.assert_allclose(f64(merged.score[b, h, i]), f64(scores[b, h, a:z]).max(), atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
def test_tiles_of_victims_change_nothing(monkeypatch, dtype):
    before, (new, scores) = merged_rows(3, 2, 8, dtype), victims(2, 11, 8, dtype)
    whole = merge(before, new, scores, False)
    monkeypatch.setattr(rows, "TILE_BYTES", 4 * 2 * 12 * 4)
    assert dtype == mx.float32 or len(list(new.tiles())) > 1, "the rows are not tiled"
    for a, b in zip(leaves(merge(before, new, scores, False)), leaves(whole), strict=True):
        np.testing.assert_allclose(f64(a), f64(b), rtol=1e-2 if a.dtype == dtype else 1e-5, atol=1e-5)


def test_tiles_of_half_precision_victims_bound_memory(monkeypatch):
    """Some tiles are always in flight, but not all of them."""
    before = merged_rows(4, 1, 32, mx.float16, batch=1)
    new, scores = victims(1, 20000, 32, mx.float16, batch=1)
    mx.eval(before, new, scores)
    whole = peak(lambda: merge(before, new, scores, False))
    monkeypatch.setattr(rows, "TILE_BYTES", 4 * 32 * 500)  # 40 tiles
    assert peak(lambda: merge(before, new, scores, False)) < whole / 3
