"""Compaction: the oldest recent rows move into the kept store, and what has no room is merged (method.md 4)."""

import mlx.core as mx

from ...policies.policy import Policy
from ...state.layout import Group, Layout
from ...state.rows import Dense
from ...state.state import Kept, Merged, Residuals, Scores, State, joined, rectangle


def compact(state: State, layout: Layout, policy: Policy, importance: Scores) -> State:
    """Leave the newest ``proximity`` (and already staged) rows in the recent store; compress the others.

    Per head: as long as all tokens that ever left fit, they stay raw, in order. Otherwise the raw
    rows (context and leaving) are the pool: the M_h most important stay as context, the others are
    merged (with R = 0: dropped).

    Args:
        importance: by which rows are selected; the scores themselves stay with their rows.
    """
    leaving = state.leaving(layout)
    if leaving:
        kept, residuals, numbers = zip(
            *(_group(group, state, leaving, layout, policy, importance) for group in layout.groups), strict=True
        )
        scores, *reading = (joined(x) for x in zip(*numbers, strict=True))
        state = state._replace(
            kept=Kept(
                Dense.joined([k.rows.map(lambda x: x.flatten(1, 2)) for k in kept], axis=1),
                joined([k.weight for k in kept]),
                joined([k.position for k in kept]),
            ),
            residuals=Residuals(*(mx.concatenate(list(x), axis=1) for x in zip(*residuals, strict=True))),
            scores=state.scores._replace(kept=scores),
            reading=state.reading._replace(kept=reading[0]) if reading else state.reading,
        )
    return state.without_leaving(layout, leaving)


def _group(
    group: Group, state: State, leaving: int, layout: Layout, policy: Policy, importance: Scores
) -> tuple[Kept, Residuals, list[mx.array]]:
    """The kept rows of one group, the sums behind its residual rows, and its scores (and reading) [B, h, rows]."""
    heads, departed = slice(group.first_head, group.stop_head), state.departed
    old, residuals = state.kept.of(group), state.residuals.of(group)
    new = state.recent.map(lambda x: x[:, heads, :leaving])
    carried = (state.scores, state.reading) if state.reads else (state.scores,)
    numbers = [(rectangle(x.kept, group), x.recent[:, heads, :leaving]) for x in carried]
    old_scores, new_scores = numbers[0]
    positions = mx.broadcast_to(mx.arange(departed, departed + leaving, dtype=mx.int32), new_scores.shape)

    raw = state.competing(group, layout)
    if raw is None:

        def filled(x: mx.array, arriving: mx.array) -> mx.array:
            return mx.concatenate([x[:, :, :departed], arriving, x[:, :, departed + leaving :]], axis=2)

        kept = Kept(
            old.rows.zip(new, filled), filled(old.weight, mx.ones(new_scores.shape)), filled(old.position, positions)
        )
        return kept, residuals, [filled(*x) for x in numbers]

    fresh = departed <= group.rows

    def pooled(x: mx.array, arriving: mx.array) -> mx.array:
        return mx.concatenate([x[:, :, raw], arriving], axis=2) if departed and group.rows else arriving

    pool = old.rows.zip(new, pooled)
    pooled_numbers, positions = [pooled(*x) for x in numbers], pooled(old.position, positions)
    worth = scores = pooled_numbers[0]
    if importance is not state.scores:
        worth = pooled(rectangle(importance.kept, group), importance.recent[:, heads, :leaving])
    chosen, victims = policy.select(worth, group.context)
    # The first rows of the context are placeholders for the residual rows.
    places = mx.pad(chosen, [(0, 0), (0, 0), (layout.residual, 0)])
    index = _index(places, scores.shape)
    kept = Kept(pool.map(lambda x: _take(x, index)), mx.ones(places.shape), _take(positions, index))
    taken = [_take(x, index) for x in pooled_numbers]
    if layout.residual:
        before = old.first(layout.residual)
        merged = Merged(before.rows, before.weight, old_scores[:, :, : layout.residual], residuals)
        index = _index(victims, scores.shape)
        merged = policy.merge(merged, pool.map(lambda x: _take(x, index)), _take(scores, index), fresh)
        residuals = merged.residuals
        kept.rows.write(0, merged.rows)
        none = mx.full(merged.weight.shape, -1, mx.int32)
        for x, y in ((kept.weight, merged.weight), (kept.position, none), (taken[0], merged.score)):
            x[:, :, : layout.residual] = y
        for x in taken[1:]:
            x[:, :, : layout.residual] = 0
    return kept, residuals, taken


def _index(rows: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Rows [B, h, m] of arrays [B, h, n, …] counted over all heads: faster than element by element."""
    batch, heads, n = shape
    return rows + mx.arange(0, batch * heads * n, n, dtype=mx.int32).reshape(batch, heads, 1)


def _take(x: mx.array, index: mx.array) -> mx.array:
    return x.flatten(0, 2)[index]
