"""Compaction: the oldest recent rows move into the kept store, and what has no room is merged (method.md 4)."""

import mlx.core as mx

from ...policies.policy import Policy
from ...state.layout import Group, Layout
from ...state.mixed import zipped
from ...state.state import Kept, Merged, Residuals, Scores, State, joined, rectangle


def compact(state: State, layout: Layout, policy: Policy, importance: Scores) -> State:
    """Leave the newest ``proximity`` (and already staged) rows in the recent store; compress the others.

    Per head: as long as all tokens that ever left fit, they stay raw, in order. Otherwise the raw
    rows (context and leaving) are the pool: the M_h most important stay as context, the others are
    merged (with R = 0: dropped).

    Args:
        importance: by which rows are selected; the scores themselves stay with their rows.
    """
    state, leaving = state.closing(), state.leaving(layout)
    if leaving:
        kept, residuals, numbers = zip(
            *(_group(group, state, leaving, layout, policy, importance) for group in layout.groups), strict=True
        )
        scores, *reading = (joined(x) for x in zip(*numbers, strict=True))
        state = state._replace(
            kept=Kept.joined(kept),
            residuals=Residuals(*(mx.concatenate(list(x), axis=1) for x in zip(*residuals, strict=True))),
            scores=state.scores._replace(kept=scores),
            reading=state.reading._replace(kept=reading[0]) if reading else state.reading,
        )
    return state.without_leaving(layout, leaving)


def _group(
    group: Group, state: State, leaving: int, layout: Layout, policy: Policy, importance: Scores
) -> tuple[Kept, Residuals, list[mx.array]]:
    """The kept rows of one group, the sums behind its residual rows, and its scores (and reading) [B, h, rows].

    Codes move as they are; only those that are merged become numbers, which go into the sums.
    """
    heads, departed = slice(group.first_head, group.stop_head), state.departed
    old, residuals = state.kept.rectangles(group), state.residuals.of(group)
    new = state.passed.map(lambda x: x[:, heads])
    carried = (state.scores, state.reading) if state.reads else (state.scores,)
    numbers = [(rectangle(x.kept, group), x.recent[:, heads, : new.shape[2]]) for x in carried]
    old_scores = numbers[0][0]
    positions = mx.broadcast_to(mx.arange(departed, departed + new.shape[2], dtype=mx.int32), new.shape)

    raw = state.competing(group, layout)
    if raw is None:

        def filled(x: mx.array, arriving: mx.array) -> mx.array:
            return mx.concatenate([x[:, :, :departed], arriving[:, :, :leaving], x[:, :, departed + leaving :]], axis=2)

        rows = old.with_moving(zipped(old.rows.moving, new, filled))
        kept = Kept(rows, filled(old.weight, mx.ones(new.shape)), filled(old.position, positions))
        return kept, residuals, [filled(*x) for x in numbers]

    fresh = departed <= group.rows
    competing = raw if departed and group.rows else slice(0, 0)

    def together(x: mx.array, arriving: mx.array) -> mx.array:
        return _together(x, arriving, competing)

    pool, positions = zipped(old.rows.moving, new, together), together(old.position, positions)
    pooled_numbers = [together(*x) for x in numbers]
    worth = [rectangle(importance.kept, group)[:, :, competing], importance.recent[:, heads, :leaving]]
    chosen, victims = policy.select(mx.concatenate(worth, axis=2), group.context)
    # The first rows of the context are placeholders for the residual rows.
    places = mx.pad(chosen, [(0, 0), (0, 0), (layout.residual, 0)])
    index = _index(places, competing, group.rows, new.shape[2])
    moved = old.with_moving(pool.map(lambda x: x[index]))
    kept = Kept(moved, mx.ones(places.shape), positions[index])
    taken = [x[index] for x in pooled_numbers]
    if layout.residual:
        first = slice(0, layout.residual)
        rows = old.rows.residual_rows(layout.residual)
        merged = Merged(rows, old.weight[:, :, first], old_scores[:, :, first], residuals)
        index = _index(victims, competing, group.rows, new.shape[2])
        merged = policy.merge(merged, pool.map(lambda x: x[index]), pooled_numbers[0][index], fresh)
        residuals = merged.residuals
        kept = kept._replace(rows=kept.rows.with_residual(merged.rows))
        none = mx.full(merged.weight.shape, -1, mx.int32)
        for x, y in ((kept.weight, merged.weight), (kept.position, none), (taken[0], merged.score)):
            x[:, :, : layout.residual] = y
        for x in taken[1:]:
            x[:, :, : layout.residual] = 0
    return kept, residuals, taken


def _together(kept: mx.array, recent: mx.array, competing: slice) -> mx.array:
    """All rows of both stores [B, h, n, …], one behind the other: two pieces to copy, and not two for each head."""
    stores = [kept, recent] if competing.stop > competing.start else [recent]
    return mx.concatenate([x.flatten(1, 2) for x in stores], axis=1).flatten(0, 1)


def _index(rows: mx.array, competing: slice, kept: int, recent: int) -> mx.array:
    """Where ``_together`` has rows [B, h, m] of the pool: its ``competing`` rows out of ``kept``, then recent ones."""
    batch, heads, _ = rows.shape
    old = competing.stop - competing.start
    each = heads * ((kept if old else 0) + recent)

    def first(begin: int, rows: int) -> mx.array:
        """Of each sequence and head."""
        head = mx.arange(begin, begin + heads * rows, rows, dtype=mx.int32)
        return (mx.arange(0, batch * each, each, dtype=mx.int32)[:, None] + head)[..., None]

    if not old:
        return rows + first(0, recent)
    return rows + mx.where(rows < old, first(competing.start, kept), first(heads * kept - old, recent))
