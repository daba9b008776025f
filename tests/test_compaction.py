"""Plain compaction (zm_mlx/ops/plain/compaction.py) against the float64 twin."""

import mlx.core as mx
import numpy as np
import pytest
import twin
from states import FLOATS, arrived, f32, names, random_state
from tiny import TOLERANCE, f64, rounding

from zm_mlx.ops.plain.compaction import compact
from zm_mlx.policies import Policy
from zm_mlx.state.layout import Layout
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Scores, State

UNIFORM, RAGGED = (5, 5, 5), (0, 9, 5)  # context rows of each head


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
    state = State.empty(layout, Dense.zeros((2, 3, 1), 8, 12, dtype), layout.recent)
    for step in range(8):
        keys, values = (near(rng.standard_normal((2, 3, 5, d))) for d in (8, 12))
        score = rng.random((2, 3, 5)).astype(np.float32)
        state = arrived(state, keys, values, score)
        assert state.departed == 3 * step and state.leaving(layout) == 3
        before = state.recent
        state = compact(state, layout, policy, state.scores)
        assert state.filled == 2 and mx.array_equal(state.recent.keys[:, :, :2], before.keys[:, :, 3:])
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
                kept, scores, expected = state.kept, state.scores.kept, head.arrays()
                np.testing.assert_allclose(f64(kept.rows.keys[b, rows]), expected[0], atol=TOLERANCE[dtype])
                np.testing.assert_allclose(f64(kept.rows.values[b, rows]), expected[1], atol=TOLERANCE[dtype])
                assert f64(kept.weight[b, rows]).tolist() == expected[2].tolist()
                np.testing.assert_allclose(f64(scores[b, rows]), [r.score for r in head.rows], atol=1e-6)
                positions = [-1] * len(head.merged) + [r.tokens[0] for r in head.raw]
                assert kept.position[b, rows].tolist() == positions
                if head.merged:
                    merged, sums = len(head.merged), state.residuals
                    np.testing.assert_allclose(f64(sums.spread[b, h]), expected[3][:merged], rtol=1e-3, atol=1e-5)
                    for s, what in ((sums.key_sum, head.keys), (sums.value_sum, head.values)):
                        totals = [np.sum([what[t] for t in r.tokens], axis=0) for r in head.merged]
                        np.testing.assert_allclose(f64(s[b, h]), totals, atol=1e-4)
                    squares = [sum(head.keys[t] @ head.keys[t] for t in r.tokens) for r in head.merged]
                    np.testing.assert_allclose(f64(sums.square_sum[b, h]), squares, rtol=1e-5)


def test_importance_selects_and_scores_stay_with_their_rows():
    layout = Layout(0, (4,), 2, 3)
    state = random_state(layout, departed=4, filled=5, batch=1)
    kept = state.kept._replace(position=mx.arange(4, dtype=mx.int32)[None])
    worth = Scores(f32([[1, 9, 2, 8]]), f32([[[7, 0, 6, 100, 100]]]))
    new = compact(state._replace(kept=kept), layout, Policy(residual=0, pool=1), worth)
    assert new.kept.position.tolist() == [[1, 3, 4, 6]]
    old = mx.concatenate([state.scores.kept, state.scores.recent[:, 0]], axis=1)
    assert new.scores.kept.tolist() == old[:, mx.array([1, 3, 4, 6])].tolist()


@pytest.mark.parametrize("residual", [0, 2])
@pytest.mark.parametrize("departed", [2, 4, 40])
def test_what_a_second_reading_gave_stays_with_its_token(departed, residual):
    """Each raw row carries its position as its reading; merged rows carry nothing."""
    layout = Layout(residual, (4, 2), 2, 3, reading=True)
    state = random_state(layout, departed=departed, filled=5)
    position = mx.where(state.kept.weight == 1, mx.arange(8 + 2 * residual - 2, dtype=mx.int32), -1)
    recent = mx.broadcast_to(mx.arange(departed, departed + 5), (2, 2, 5)).astype(mx.float32)
    reading = Scores(mx.maximum(position, 0).astype(mx.float32), recent)
    state = state._replace(kept=state.kept._replace(position=position), reading=reading)
    new = compact(state, layout, Policy(residual=residual, pool=1), state.scores)
    assert mx.array_equal(new.reading.kept, mx.maximum(new.kept.position, 0))
    assert new.reading.recent[0, 0].tolist() == [departed + 3, departed + 4, 0, 0, 0]


def test_a_long_recent_store_shrinks_though_nothing_leaves():
    layout = Layout(1, (9,), 4, 3)
    state = random_state(layout, departed=0, filled=3, batch=1).with_recent_rows(50)
    new = compact(state, layout, Policy(residual=1), state.scores)
    assert (new.recent_rows, new.filled, new.departed) == (layout.recent, 3, 0)
    assert mx.array_equal(new.recent.keys[:, :, :3], state.recent.keys[:, :, :3])
    assert new.kept is state.kept
