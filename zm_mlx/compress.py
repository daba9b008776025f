"""ZeroMerge in plain MLX ops: attend, score, select, merge (arXiv 2503.10714, v2/v3 "ZSMerge").

This module is the truth that the kernels are compared with. Everything is batched over sequences
and heads, computed in float32 and rounded once at the end. B sequences, H KV heads, G query heads
per KV head; queries are [B, H * G, L, D], the query heads of a KV head next to each other. Heads
are in storage order (see ``Layout.order``). ``left`` tokens have left the recent store for the kept
one and ``live`` rows of the recent store are filled; the last L of those are the queries' own.
"""

import math
from collections.abc import Iterator

import mlx.core as mx

from .layout import Group, Layout
from .policy import Policy
from .stores import Kept, Recent

LOGIT_BYTES = 64 * 2**20  # queries go through in blocks whose logits stay below this
TILE_BYTES = 64 * 2**20  # rows of 16-bit dtypes are converted in tiles of this size, in float32


def attend(
    queries: mx.array,
    kept: Kept,
    recent: Recent,
    *,
    left: int,
    live: int,
    layout: Layout,
    policy: Policy,
    scale: float,
    sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Compensated attention, and the importance that it gives to each row.

        logit[g, j] = scale q[g]·k[j] + α log weight[j] + min(κ, ½ scale² spread[j] ‖q[g]‖²)
        mass[j] = Σ_i λ^(L-1-i) Σ_g p_i[g, j]

    The first two terms are the paper's compensated attention; the third, second-order one accounts
    for the variance of the keys behind a merged row (``Policy.kappa = 0`` leaves it out).

    Returns:
        output [B, H * G, L, Dv] in the dtype of the queries; the new scores λ^L score + mass of the
        kept rows [B, K] and of the recent store [B, H, rows] (0 past the live ones), float32.
    """
    outputs, on_kept, on_recent = _attend(queries, kept, recent, left, live, layout, policy, scale, sinks, True)
    return mx.concatenate(outputs, axis=1).astype(queries.dtype), *_faded(
        kept, recent, on_kept, on_recent, policy.decay ** queries.shape[2]
    )


def score(
    queries: mx.array,
    kept: Kept,
    recent: Recent,
    *,
    left: int,
    live: int,
    layout: Layout,
    policy: Policy,
    scale: float,
    sinks: mx.array | None = None,
    tokens: int,
) -> tuple[mx.array, mx.array]:
    """The new scores of ``attend`` without its output, from the last W queries of a prompt.

    Args:
        tokens: the length of the prompt; the scores from before it fade by λ^tokens.
    """
    _, on_kept, on_recent = _attend(queries, kept, recent, left, live, layout, policy, scale, sinks, False)
    return _faded(kept, recent, on_kept, on_recent, policy.decay**tokens)


def select(importance: mx.array, count: int, pool: int) -> tuple[mx.array, mx.array]:
    """Choose the ``count`` rows with the highest importance, max-pooled over ``pool`` neighbours.

    Args:
        importance: [..., n] float32, rows in the order of their positions.

    Returns:
        Indices of the chosen rows [..., count] and of the others [..., n - count], int32, both
        ascending. Of equal rows the older wins; NaN counts as -inf.
    """
    n = importance.shape[-1]
    importance = _ordered(importance)
    pooled = mx.pad(importance, [(0, 0)] * (importance.ndim - 1) + [(pool // 2, pool // 2)], constant_values=-mx.inf)
    width = 1
    while width < pool:  # the maximum over ``width`` rows becomes that over twice as many
        step = min(width, pool - width)
        pooled = mx.maximum(pooled[..., :-step], pooled[..., step:])
        width += step
    if count == 0:
        chosen = mx.zeros(pooled.shape, mx.bool_)
    else:
        least = mx.partition(pooled, n - count, axis=-1)[..., n - count : n - count + 1]
        above, level = pooled > least, pooled == least
        seats = count - above.sum(axis=-1, keepdims=True)
        chosen = above | (level & (_ranks(level) < seats))
    rows = mx.broadcast_to(mx.arange(n, dtype=mx.int32), chosen.shape)
    places = mx.where(chosen, _ranks(chosen), count + _ranks(~chosen))
    order = mx.put_along_axis(mx.zeros(chosen.shape, mx.int32), places, rows, axis=-1)
    return order[..., :count], order[..., count:]


def merge(
    kept: Kept, keys: mx.array, values: mx.array, importance: mx.array, victims: mx.array, residual: int, fresh: bool
) -> Kept:
    """Merge victims into the residual rows of one group (paper: residual merging).

    Each victim joins the residual row r* = argmax_r k·k_r (ties: the lowest; NaN counts as -inf), by the
    keys as they were before this call; sums and weights add, so the order of victims does not matter. While the
    residual rows are empty (``fresh``), the victims fill them instead, in position order, cut into
    contiguous groups of equal size (± 1).

    Args:
        kept: a group's rows, [B, h, rows, …]; the first ``residual`` rows are residual unless fresh.
        keys, values: the pool, [B, h, n, D] and [B, h, n, Dv] in the order of positions.
        importance: score of the pool's rows, [B, h, n] float32.
        victims: true for the rows of the pool to merge, [B, h, n] bool.

    Returns:
        A ``Kept`` whose first five arrays hold the residual rows only, [B, h, residual, …].
    """
    if fresh:
        target = _ranks(victims) * residual // mx.maximum(victims.sum(axis=-1, keepdims=True), 1)
    else:
        centres = kept.keys[:, :, :residual]
        target = mx.concatenate(
            [mx.argmax(_ordered(_dots(keys[:, :, t], centres)), axis=-1) for t in _tiles(keys)], axis=-1
        )
    joins = (target[..., None] == mx.arange(residual)) & victims[..., None]  # [B, h, n, R]
    share = joins.astype(mx.float32)
    key_sum = value_sum = square_sum = mx.array(0.0)
    for t in _tiles(keys):
        to_rows = share[:, :, t].swapaxes(-1, -2)
        k, v = keys[:, :, t].astype(mx.float32), values[:, :, t].astype(mx.float32)
        key_sum, value_sum = key_sum + to_rows @ k, value_sum + to_rows @ v
        square_sum = square_sum + (to_rows @ (k * k).sum(axis=-1, keepdims=True))[..., 0]
    weight = share.sum(axis=2)
    best = mx.where(joins, importance[..., None], -mx.inf).max(axis=2)
    if not fresh:
        key_sum, value_sum = key_sum + kept.key_sum, value_sum + kept.value_sum
        square_sum, weight = square_sum + kept.square_sum, weight + kept.weight[:, :, :residual]
        best = mx.maximum(best, kept.score[:, :, :residual])
    count = mx.maximum(weight, 1)[..., None]
    mean = key_sum / count
    spread = mx.maximum(0, square_sum / count[..., 0] - (mean * mean).sum(axis=-1)) / keys.shape[-1]
    return Kept(
        keys=mean.astype(keys.dtype),
        values=(value_sum / count).astype(values.dtype),
        weight=weight,
        score=mx.where(weight > 0, best, 0),
        position=mx.full(weight.shape, -1, mx.int32),
        spread=spread,
        key_sum=key_sum,
        value_sum=value_sum,
        square_sum=square_sum,
    )


def compact(kept: Kept, recent: Recent, *, left: int, leaving: int, layout: Layout, policy: Policy) -> Kept:
    """Move the ``leaving`` oldest recent rows into the kept store, merging what has no room.

    Per head: as long as all tokens that ever left fit, they stay raw, in order. Otherwise the raw
    rows (context and leaving) are the pool: the M_h most important stay as context, the others are
    merged (with R = 0: dropped).
    """
    parts = []
    for group in layout.groups:
        heads = slice(group.first_head, group.stop_head)
        old = kept.of(group)
        new = [x[:, heads, :leaving] for x in recent]
        positions = mx.broadcast_to(mx.arange(left, left + leaving, dtype=mx.int32), new[2].shape)
        if left + leaving <= group.rows:
            arrived = [*new[:2], mx.ones(new[2].shape), new[2], positions]
            rows = [
                mx.concatenate([x[:, :, :left], y, x[:, :, left + leaving :]], axis=2)
                for x, y in zip(old.rows, arrived, strict=True)
            ]
            parts.append(old.with_rows(rows))
            continue
        fresh = left <= group.rows
        raw = slice(0, left) if fresh else slice(layout.residual, group.rows)
        pool = [
            mx.concatenate([x[:, :, raw], y], axis=2) if left and group.rows else y
            for x, y in zip((old.keys, old.values, old.score, old.position), [*new, positions], strict=True)
        ]
        keys, values, importance, position = pool
        chosen, victims = select(importance, group.context, policy.pool)
        # The first rows of the context are placeholders for the residual rows.
        places = mx.pad(chosen, [(0, 0), (0, 0), (layout.residual, 0)])
        rows = _take([keys, values, mx.ones(importance.shape), importance, position], places)
        if layout.residual:
            keys, values, importance = _take([keys, values, importance], victims)
            every = mx.ones(victims.shape, mx.bool_)
            old = merge(old, keys, values, importance, every, layout.residual, fresh)
            for x, y in zip(rows, old.rows, strict=True):
                x[:, :, : layout.residual] = y
        parts.append(old.with_rows(rows))
    return Kept.join(parts)


def block_length(queries: mx.array, rows: int) -> int:
    """Queries (axis -2) whose float32 logits over ``rows`` rows stay below LOGIT_BYTES; at least 1."""
    *many, length, _ = queries.shape
    return min(length, max(1, LOGIT_BYTES // (4 * math.prod(many) * rows)))


def _attend(
    queries: mx.array,
    kept: Kept,
    recent: Recent,
    left: int,
    live: int,
    layout: Layout,
    policy: Policy,
    scale: float,
    sinks: mx.array | None,
    with_output: bool,
) -> tuple[list[mx.array], mx.array, mx.array]:
    length = queries.shape[2]
    outputs: list[mx.array] = []
    kept_mass: list[mx.array] = []
    recent_mass: list[mx.array] = []
    for group in layout.groups:
        q, k, r, s = _of_group(queries, kept, recent, sinks, group, layout.heads, left, live)
        out: list[mx.array] = []
        mass, old = mx.array(0.0), k.keys.shape[2]
        step = block_length(q, old + live)
        for begin in range(0, length, step):
            end = min(begin + step, length)
            block = _after(q[:, :, :, begin:end], *outputs[-1:], *out[-1:], mass)
            p = _probabilities(block, length - end, k, r, s, policy, scale)
            if with_output:
                out.append(_times_values(p[..., :old], k.values) + _times_values(p[..., old:], r.values))
            age = mx.arange(length - 1 - begin, length - 1 - end, -1, dtype=mx.float32)
            mass = mass + _column_sums(p, mx.power(policy.decay, age))
        if with_output:
            outputs.append((out[0] if len(out) == 1 else mx.concatenate(out, axis=3)).flatten(1, 2))
        kept_mass.append(mx.pad(mass[..., :old], [(0, 0), (0, 0), (0, group.rows - old)]).flatten(1, 2))
        recent_mass.append(mass[..., old:])
    return outputs, mx.concatenate(kept_mass, axis=1), mx.concatenate(recent_mass, axis=1)


def _of_group(
    queries: mx.array,
    kept: Kept,
    recent: Recent,
    sinks: mx.array | None,
    group: Group,
    heads: int,
    left: int,
    live: int,
) -> tuple[mx.array, Kept, Recent, mx.array | None]:
    """One group's queries [B, h, G, L, D], its live kept and recent rows, its sinks [h, G]."""
    batch, query_heads, length, dim = queries.shape
    chosen = slice(group.first_head, group.stop_head)
    q = queries.reshape(batch, heads, query_heads // heads, length, dim)[:, chosen]
    rows = kept.of(group)
    if left < group.rows:
        rows = rows.with_rows([x[:, :, :left] for x in rows.rows])
    recents = Recent(*(x[:, chosen, :live] for x in recent))
    return q, rows, recents, None if sinks is None else sinks.reshape(heads, -1)[chosen]


def _probabilities(
    q: mx.array, later: int, kept: Kept, recent: Recent, sinks: mx.array | None, policy: Policy, scale: float
) -> mx.array:
    """Softmax of the compensated logits of queries [B, h, G, l, D] that ``later`` more tokens follow.

    Returns:
        Probabilities of the kept rows and then of the recent ones, [B, h, G, l, kept + live].
    """
    length, old, live = q.shape[3], kept.keys.shape[2], recent.keys.shape[2]
    q = q.astype(mx.float32)
    now = _times_keys(q * scale, recent.keys)
    logits = [now]
    if length + later > 1:
        # All queries see what came before the first of them: no mask there, where parts are joined anyway.
        first = live - later - length if old else 0
        newest = mx.arange(live - later - length, live - later)[:, None]
        logits = [now[..., :first], mx.where(mx.arange(first, live) <= newest, now[..., first:], -mx.inf)]
    if old:
        bias = mx.where(kept.weight > 0, policy.alpha * mx.log(kept.weight), -mx.inf)[:, :, None, None]
        residual = min(kept.spread.shape[-1], old)
        of_residual = bias[..., :residual]
        if policy.kappa and residual:
            norms = (q * q).sum(axis=-1, keepdims=True)
            lift = mx.minimum(policy.kappa, 0.5 * scale**2 * kept.spread[:, :, None, None, :residual] * norms)
            of_residual = of_residual + lift
        past = _times_keys(q * scale, kept.keys)
        logits[:0] = [past[..., :residual] + of_residual, past[..., residual:] + bias[..., residual:]]
    if sinks is not None:
        sink = sinks.astype(mx.float32)[None, :, :, None, None]
        logits.append(mx.broadcast_to(sink, (*q.shape[:4], 1)))
    joined = mx.concatenate([x for x in logits if x.shape[-1]], axis=-1)
    return mx.softmax(joined, axis=-1)[..., : old + live]


def _after(x: mx.array, *done: mx.array) -> mx.array:
    """x, to be used only once ``done`` is computed: mlx would run independent tiles side by side, all in memory."""
    ready: mx.array = mx.depends(x, list(done))
    return ready


def _faded(
    kept: Kept, recent: Recent, on_kept: mx.array, on_recent: mx.array, fade: float
) -> tuple[mx.array, mx.array]:
    """fade · score + mass for both stores."""
    live, rows = on_recent.shape[2], recent.score.shape[2]
    now = fade * recent.score[:, :, :live] + on_recent
    return fade * kept.score + on_kept, mx.pad(now, [(0, 0), (0, 0), (0, rows - live)])


def _ordered(x: mx.array) -> mx.array:
    """x with -inf for NaN, which has no order: a model that overflows must not choose too few rows."""
    return mx.where(mx.isnan(x), -mx.inf, x)


def _ranks(flags: mx.array) -> mx.array:
    """For each true flag [..., n], how many true ones come before it."""
    return mx.cumsum(flags.astype(mx.int32), axis=-1) - 1


def _take(arrays: list[mx.array], rows: mx.array) -> list[mx.array]:
    """Rows [B, h, m] of arrays [B, h, n, …]: whole rows by one index, which is faster than element by element."""
    batch, heads, n = arrays[0].shape[:3]
    index = rows + mx.arange(0, batch * heads * n, n, dtype=mx.int32).reshape(batch, heads, 1)
    return [x.flatten(0, 2)[index] for x in arrays]


def _column_sums(p: mx.array, fade: mx.array) -> mx.array:
    """Σ_i fade[i] Σ_g p[..., g, i, j]."""
    factors = mx.broadcast_to(fade, p.shape[2:4]).reshape(1, -1)
    return (factors @ p.flatten(2, 3))[:, :, 0]


def _tiles(x: mx.array) -> Iterator[slice]:
    """Slices of the rows (axis 2) of x that take TILE_BYTES as float32; one slice if x is float32."""
    batch, heads, rows, width = x.shape
    step = rows if x.dtype == mx.float32 else TILE_BYTES // (4 * batch * heads * width)
    for begin in range(0, rows, max(1, step)):
        yield slice(begin, min(begin + max(1, step), rows))


def _times_keys(q: mx.array, keys: mx.array) -> mx.array:
    """q [B, h, G, l, D] times keys [B, h, n, D] → [B, h, G, l, n], in float32."""
    parts: list[mx.array] = []
    for t in _tiles(keys):
        parts.append(_dots(q.flatten(2, 3), _after(keys[:, :, t], *parts[-1:])))
    joined = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
    return joined.reshape(*q.shape[:4], keys.shape[2])


def _times_values(p: mx.array, values: mx.array) -> mx.array:
    """p [B, h, G, l, n] times values [B, h, n, Dv] → [B, h, G, l, Dv], in float32."""
    flat = p.flatten(2, 3)
    total = mx.array(0.0)
    for t in _tiles(values):
        total = total + flat[..., t] @ _after(values[:, :, t], total).astype(mx.float32)
    return mx.broadcast_to(total, (*flat.shape[:3], values.shape[-1])).reshape(*p.shape[:4], values.shape[-1])


def _dots(x: mx.array, y: mx.array) -> mx.array:
    """x [..., m, D] and y [..., n, D] → [..., m, n], in float32."""
    return x.astype(mx.float32) @ y.astype(mx.float32).swapaxes(-1, -2)
