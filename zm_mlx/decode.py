"""``compress.attend`` for one new token after the other, in as few operations as it takes.

While decoding, building and launching operations costs as much as their work. So what only a
compaction changes is bound once, and the operations of a step are recorded once by ``mx.compile``
and replayed at each token. For that, shapes must stay the same for a while: attention reads a few
rows more than are filled, and masks them.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from .layout import Group, Layout
from .policy import Policy
from .stores import Kept, Recent

Result = tuple[mx.array, mx.array, mx.array]
Step = Callable[[mx.array, mx.array, Recent, int], Result]


def bind(kept: Kept, *, left: int, layout: Layout, policy: Policy, scale: float, sinks: mx.array | None = None) -> Step:
    """``compress.attend`` until the next compaction, for queries [B, H * G, 1, D] and rows in float32.

    Returns:
        A function of what changes from token to token: queries, score of the kept rows, recent
        store and ``live``; its results are those of ``compress.attend``, evaluated together.
    """
    filled = _filled(layout, left)
    rows = [tuple(_Rows.of(kept, group, layout, filled)) for group in layout.groups]
    sinks = None if sinks is None else sinks.astype(mx.float32).reshape(layout.heads, -1)
    most, some = layout.recent, max(1, layout.staging // 8)

    by_reach: dict[int, Callable[..., Result]] = {}

    def step(queries: mx.array, kept_score: mx.array, recent: Recent, live: int) -> Result:
        reach = min(most, live + -live % some)
        compiled = by_reach.get(reach)
        if compiled is None:
            compiled = by_reach[reach] = _compiled(layout, policy, scale, filled, reach)
        return compiled(queries, rows, kept_score, recent[0], recent[1], recent[2], mx.array(live), sinks)

    return step


class _Rows(NamedTuple):
    """The kept rows of a group as a step reads them."""

    keys: mx.array  # [B, h, D, rows]
    values: mx.array  # [B, h, rows, Dv]
    log_weight: mx.array  # [B, h, 1, R], or of all rows as long as they are raw; -inf where empty
    half_spread: mx.array  # [B, h, 1, R]

    @classmethod
    def of(cls, kept: Kept, group: Group, layout: Layout, filled: int) -> "_Rows":
        rows = kept.of(group)
        read = min(filled, group.rows)
        weight = rows.weight[:, :, None, : layout.residual if filled > group.rows else read]
        log_weight = mx.where(weight > 0, mx.log(weight), -mx.inf)
        keys, values = rows.keys[:, :, :read].swapaxes(2, 3), rows.values[:, :, :read]
        return cls(keys, values, log_weight, 0.5 * rows.spread[:, :, None])


def _filled(layout: Layout, left: int) -> int:
    """Kept rows to read per head: ``left`` or a few more, never past the end of a group that is not full."""
    fullest = layout.groups[0].rows
    if left > fullest:
        return fullest + 1
    eighth = max(1, fullest // 8)
    return min(left + -left % eighth, *(g.rows for g in layout.groups if g.rows >= left))


@lru_cache(maxsize=1024)
def _compiled(layout: Layout, policy: Policy, scale: float, filled: int, reach: int) -> Callable[..., Result]:
    """A step over the first ``filled`` kept rows of each head and the first ``reach`` recent ones."""
    recent_rows = mx.arange(reach)
    mx.eval(recent_rows)

    def step(
        queries: mx.array,
        kept: list[tuple[mx.array, ...]],
        kept_score: mx.array,
        recent_keys: mx.array,
        recent_values: mx.array,
        recent_score: mx.array,
        live: mx.array,
        sinks: mx.array | None,
    ) -> Result:
        batch, query_heads, _, dim = queries.shape
        q = (queries * scale).reshape(batch, layout.heads, -1, dim)
        outputs, on_kept, on_recent = [], [], []
        for group, old in zip(layout.groups, map(_Rows._make, kept), strict=True):
            heads, rows, residual = slice(group.first_head, group.stop_head), old.keys.shape[3], old.log_weight.shape[3]
            of_group = q[:, heads]
            now = of_group @ recent_keys[:, heads, :reach].swapaxes(2, 3)
            logits = [mx.where(recent_rows < live, now, -mx.inf)]
            if rows:
                past, bias = of_group @ old.keys, old.log_weight
                if policy.alpha != 1:
                    bias = mx.where(bias > -mx.inf, policy.alpha * bias, bias)
                if policy.kappa and filled > group.rows and residual:
                    norm = (of_group * of_group).sum(axis=3, keepdims=True)
                    bias = bias + mx.minimum(policy.kappa, old.half_spread * norm)
                logits[:0] = [past[..., :residual] + bias, past[..., residual:]]
            if sinks is not None:
                logits.append(mx.broadcast_to(sinks[heads][..., None], (*of_group.shape[:3], 1)))
            p = mx.softmax(mx.concatenate(logits, axis=3), axis=3)
            p_kept, p_recent = p[..., :rows], p[..., rows : rows + reach]
            out = p_recent @ recent_values[:, heads, :reach]
            outputs.append(mx.addmm(out, p_kept, old.values) if rows else out)
            on_kept.append(_padded(p_kept.sum(axis=2), group.rows).flatten(1, 2))
            on_recent.append(_padded(p_recent.sum(axis=2), recent_score.shape[2]))
        scores = [
            policy.decay * kept_score + mx.concatenate(on_kept, axis=1),
            policy.decay * recent_score + mx.concatenate(on_recent, axis=1),
        ]
        out = mx.concatenate(outputs, axis=1).reshape(batch, query_heads, 1, -1)
        return mx.depends(out, scores), *scores

    compiled: Callable[..., Result] = mx.compile(step)
    return compiled


def _padded(x: mx.array, count: int) -> mx.array:
    """x [B, h, n] with zeros up to [B, h, count]."""
    missing = count - x.shape[2]
    return mx.pad(x, [(0, 0), (0, 0), (0, missing)]) if missing else x
