"""Attention and a second reading united: each of the two fills half of the context rows (method.md 3)."""

import mlx.core as mx

from ..state.layout import Group, Layout
from ..state.state import Scores, State, joined, rectangle
from .selection import pooled


def united(state: State, layout: Layout, pool: int) -> Scores:
    """Importance by two measures: -(the better rank), so that the highest are the tops of both in equal parts.

    Both are max-pooled over ``pool`` rows, then ranked, per head, among the rows that compete in a compaction of this
    state. What was never read has the last rank by reading: it competes by its attention alone.

    Returns:
        float32, -inf for rows that do not compete.
    """
    groups = [_group(group, state, layout, pool) for group in layout.groups]
    return Scores(joined([kept for kept, _ in groups]), mx.concatenate([recent for _, recent in groups], axis=1))


def _group(group: Group, state: State, layout: Layout, pool: int) -> tuple[mx.array, mx.array]:
    """Importance of a group's kept rows [B, h, rows] and of its recent ones [B, h, n]."""
    batch, leaving = state.recent.shape[0], state.leaving(layout)
    raw = state.competing(group, layout)
    if raw is None:
        none = mx.full((batch, group.heads, group.rows), -mx.inf)
        return none, mx.full((batch, group.heads, state.recent_rows), -mx.inf)
    heads, old = slice(group.first_head, group.stop_head), raw.stop - raw.start

    def competing(x: Scores) -> mx.array:
        rows = x.recent[:, heads, :leaving]
        if old:
            rows = mx.concatenate([rectangle(x.kept, group)[:, :, raw], rows], axis=2)
        return pooled(rows, pool)

    reading = competing(state.reading)
    by_reading = mx.where(reading > 0, ranks(reading), reading.shape[2])
    worth = -mx.minimum(ranks(competing(state.scores)), by_reading).astype(mx.float32)
    return (
        _among(worth[:, :, :old], raw.start, group.rows),
        _among(worth[:, :, old:], 0, state.recent_rows),
    )


def ranks(x: mx.array) -> mx.array:
    """For each of x [..., n], how many are larger, int32: equal ones share a rank, whatever order a sort leaves."""
    order = mx.argsort(-x, axis=-1)
    ordered = mx.take_along_axis(x, order, axis=-1)
    place = mx.broadcast_to(mx.arange(x.shape[-1], dtype=mx.int32), x.shape)
    begins = mx.concatenate([mx.ones_like(x[..., :1], mx.bool_), ordered[..., 1:] != ordered[..., :-1]], axis=-1)
    rank = mx.cummax(mx.where(begins, place, 0), axis=-1)
    return mx.put_along_axis(mx.zeros(x.shape, mx.int32), order, rank, axis=-1)


def _among(x: mx.array, begin: int, rows: int) -> mx.array:
    """x [B, h, n] as rows ``begin`` to begin + n of ``rows``; the others are -inf."""
    sides = [(0, 0), (0, 0), (begin, rows - begin - x.shape[2])]
    return mx.pad(x, sides, constant_values=-mx.inf)
