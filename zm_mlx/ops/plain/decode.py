"""``attention.attend`` for one new token after the other, in as few operations as it takes.

While decoding, building and launching operations costs as much as their work. So what only a
compaction changes is bound once, and the operations of a step are recorded once by ``mx.compile``
and replayed at each token. For that, shapes must stay the same for a while: attention reads a few
rows more than are filled, and masks them.

Keys are bound dimension by dimension: a matrix product of one query goes along them then, several rows at a time,
where row by row it sums up one product after the other (2 to 3 times the time in MLX's own BLAS on Linux).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ...policies.policy import Policy
from ...state.layout import Group, Layout
from ...state.rows import Dense
from ...state.state import Bound, Call, Scores, State
from .attention import lifted, softmax


def bind(call: Call, state: State, layout: Layout, policy: Policy, turned: bool = True) -> Bound:
    """``attend`` until the next compaction, for queries [B, H * G, 1, D] and rows in float32.

    Args:
        turned: hold keys dimension by dimension, once the kept rows are full, in place of the state's own.
    """
    read = _rows_to_read(layout, state.departed)
    groups = [_Group.of(group, state, policy, read) for group in layout.groups]
    turned = turned and read >= layout.groups[0].rows
    if turned:
        groups = [g._replace(keys=mx.contiguous(g.keys)) for g in groups]
    rows = [tuple(g) for g in groups]
    sinks = None if call.sinks is None else call.sinks.astype(mx.float32).reshape(layout.heads, -1)
    most, some = layout.recent, max(1, layout.staging // 8)
    hiding, scale = _hiding(most), call.scale

    by_reach: dict[int, Callable[..., tuple[mx.array, mx.array, mx.array]]] = {}

    def step(queries: mx.array, state: State) -> tuple[mx.array, Scores]:
        recent, filled = state.recent, state.filled
        reach = min(most, filled + -filled % some)
        compiled = by_reach.get(reach)
        if compiled is None:
            compiled = by_reach[reach] = _compiled(layout, policy, scale, read, reach)
        hidden = hiding[most - filled : most - filled + reach]
        out, kept, new = compiled(queries, rows, state.scores, recent, hidden, sinks)
        return out, Scores(kept, new)

    return Bound(step, tuple(g.keys for g in groups) if turned else ())


class _Group(NamedTuple):
    """The kept rows of a group as a step reads them."""

    keys: mx.array  # [B, h, D, rows]
    values: mx.array  # [B, h, rows, Dv]
    log_mass: mx.array  # [B, h, 1, R], or of all rows as long as they are raw; -inf where empty
    spread: mx.array  # [B, h, 1, R], or nothing as long as they are raw

    @classmethod
    def of(cls, group: Group, state: State, policy: Policy, read: int) -> "_Group":
        kept = state.kept.of(group).first(min(read, group.rows))
        weight, spread = kept.weight[:, :, None], state.residuals.of(group).spread[:, :, None]
        if read > group.rows:
            weight = weight[..., : group.residual]
        else:
            spread = spread[..., :0]
        keys, values = kept.rows.dense()  # which are numbers in float32
        return cls(keys.swapaxes(2, 3), values, policy.log_mass(weight), spread)

    def logits(self, queries: mx.array, scale: float, policy: Policy) -> list[mx.array]:
        """The compensated logits of ``attention.attend`` for queries [B, h, G, D], cut behind those that are lifted."""
        raw = self.keys.shape[3] - self.log_mass.shape[3]
        log_mass = mx.pad(self.log_mass, [(0, 0)] * 3 + [(0, raw)]) if raw else self.log_mass
        logits = mx.addmm(log_mass, queries, self.keys, alpha=scale)
        return lifted(logits, self.spread, queries * scale, policy)


def _rows_to_read(layout: Layout, departed: int) -> int:
    """Kept rows to read per head: ``departed`` or a few more, never past the end of a group that is not full."""
    fullest = layout.groups[0].rows
    if departed > fullest:
        return fullest + 1
    eighth = max(1, fullest // 8)
    return min(departed + -departed % eighth, *(g.rows for g in layout.groups if g.rows >= departed))


@lru_cache(maxsize=64)
def _hiding(rows: int) -> mx.array:
    """What is added to logits, from row ``rows - n`` on: nothing to those of n rows, -inf to those behind them."""
    found = mx.concatenate([mx.zeros(rows), mx.full(rows, -mx.inf)])
    mx.eval(found)
    return found


@lru_cache(maxsize=1024)
def _compiled(
    layout: Layout, policy: Policy, scale: float, read: int, reach: int
) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
    """A step over the first ``read`` kept rows of each head and the first ``reach`` recent ones."""

    def step(
        queries: mx.array,
        kept: list[tuple[mx.array, ...]],
        scores: tuple[mx.array, mx.array],
        recent: tuple[mx.array, mx.array],
        hidden: mx.array,
        sinks: mx.array | None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        batch, query_heads, _, dim = queries.shape
        q = queries.reshape(batch, layout.heads, -1, dim)
        outputs, on_kept, on_recent = [], [], []
        for group, bound in zip(layout.groups, map(_Group._make, kept), strict=True):
            heads = slice(group.first_head, group.stop_head)
            new = Dense(*recent).map(_part(heads, reach))
            of_group, rows = q[:, heads], bound.values.shape[2]
            logits = [mx.addmm(hidden, of_group, new.keys.swapaxes(2, 3), alpha=scale)]
            if rows:
                logits[:0] = bound.logits(of_group, scale, policy)
            p = softmax(logits, None if sinks is None else sinks[heads])
            p_kept, p_recent = p[..., :rows], p[..., rows:]
            out = new.weigh(p_recent)
            outputs.append(mx.addmm(out, p_kept, bound.values) if rows else out)
            on_kept.append(_padded(p_kept.sum(axis=2), group.rows).flatten(1, 2))
            on_recent.append(_padded(p_recent.sum(axis=2), scores[1].shape[2]))
        mass = (mx.concatenate(on_kept, axis=1), mx.concatenate(on_recent, axis=1))
        new_scores = [policy.decay * x + y for x, y in zip(scores, mass, strict=True)]
        out = mx.concatenate(outputs, axis=1).reshape(batch, query_heads, 1, -1)
        return mx.depends(out, new_scores), *new_scores

    compiled: Callable[..., tuple[mx.array, mx.array, mx.array]] = mx.compile(step)
    return compiled


def _part(heads: slice, rows: int) -> Callable[[mx.array], mx.array]:
    return lambda x: x[:, heads, :rows]


def _padded(x: mx.array, count: int) -> mx.array:
    """x [B, h, n] with zeros up to [B, h, count]."""
    missing = count - x.shape[2]
    return mx.pad(x, [(0, 0), (0, 0), (0, missing)]) if missing else x
