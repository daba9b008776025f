"""One residual row a head that stands for all victims of a prompt, fitted to what queries give them (method.md 4)."""

from collections.abc import Sequence

import mlx.core as mx

from ...state.layout import Group, Layout
from ...state.mixed import Rows
from ...state.rows import Dense, after
from ...state.state import Call, State
from .attention import block_length, capped

DISTANCE = 64  # tokens; what a query gives to nearer victims says little about queries to come
RIDGE = 0.02  # of the mean square of a query's element
NOTHING = 1e-12  # lost beside the bias's 1
DISCOUNT = 1.2  # nats; the fit's errors cost more above the truth than below
LARGEST = 60.0  # of a logarithm that becomes a weight
SAMPLES = 4  # queries for each number of a row; with more the row is hardly another, and takes longer


def fit(before: State, left: State, call: Call, layout: Layout) -> State:
    """The state that a compaction left, with the first residual row of each head for the victims.

    With y(q) = log Σ exp(s q·k) over a head's victims, for some of the last queries q of a prompt and victims at
    least ``DISTANCE`` tokens before them, the row has

        k, b = least squares of y(q) ≈ s q·k + b (ridge),  w = exp(b - DISCOUNT),  v = Σ p v / Σ p

    where p is the attention among the victims, summed over the queries. So the row gets about a third of what the
    victims together would get of any query, and gives what they would give on average. The old residual row
    is a victim too.

    Args:
        before: the state that was compacted.
        left: what was left of it.
        call: the newest queries [B, H * G, W, D].
    """
    each = call.queries.shape[1] // layout.heads
    for group in layout.groups:
        if left.departed <= group.rows:  # all tokens are there, also in the first row
            continue
        mine = call._replace(queries=call.queries[:, each * group.first_head : each * group.stop_head])
        row, mass = _row(group, mine, before, left)
        left = left._replace(kept=left.kept.with_first(group, row, mass))
    return left


def _row(group: Group, call: Call, before: State, left: State) -> tuple[Dense, mx.array]:
    """A group's fitted rows [B, h] and their weights [B, h] float32, 0 where there is no victim."""
    heads = slice(group.first_head, group.stop_head)
    old = before.kept.of(group, before.departed)
    old = old if before.departed else old.first(0)
    parts = [old.rows, before.recent.map(lambda x: x[:, heads]).cut(0, before.filled)]
    batch, count = old.rows.shape[0], old.rows.shape[2] + before.filled
    recent = mx.broadcast_to(
        mx.arange(before.departed, before.seen, dtype=mx.int32), (batch, group.heads, before.filled)
    )
    position = mx.concatenate([old.position, recent], axis=2)
    logs = mx.concatenate([mx.where(old.weight > 0, mx.log(old.weight), -mx.inf), mx.zeros(recent.shape)], axis=2)
    logs = mx.where(_victims(group, position, left), logs, -mx.inf)

    queries = call.queries.reshape(batch, group.heads, -1, call.queries.shape[3]).astype(mx.float32) * call.scale
    at = mx.tile(mx.arange(before.seen - call.length, before.seen), queries.shape[2] // call.length)
    each = max(1, queries.shape[2] // (SAMPLES * (queries.shape[3] + 1)))
    queries, at = queries[:, :, ::each], at[::each]
    total, given = [], mx.zeros((batch, group.heads, count))
    step = block_length(queries, count)
    for begin in range(0, queries.shape[2], step):
        # One block after the other, or the logits of all exist at once.
        block, end = after(queries[:, :, begin : begin + step], given), begin + step
        far = position[:, :, None] <= at[begin:end, None] - DISTANCE
        logits = mx.where(far, capped(_dots(block, parts), call.cap) + logs[:, :, None], -mx.inf)
        most = mx.maximum(logits.max(axis=-1, keepdims=True), -1e30)
        mass = mx.exp(logits - most)
        sums = mass.sum(axis=-1, keepdims=True)
        given = given + (mass / mx.maximum(sums, 1e-30)).sum(axis=2)
        total.append((most + mx.log(sums))[..., 0])
    y = mx.concatenate(total, axis=2)
    key, bias, known = _least_squares(queries, y)
    edge = old.rows.shape[2]
    total_value = parts[1].weigh(given[:, :, None, edge:], parts[0].weigh(given[:, :, None, :edge]))
    value = total_value / mx.maximum(given.sum(axis=-1), 1e-30)[..., None, None]
    mass = mx.where(known, mx.exp(mx.minimum(bias - DISCOUNT, LARGEST)), 0)
    return Dense(key, value[:, :, 0]), mass


def _dots(queries: mx.array, parts: Sequence[Rows]) -> mx.array:
    """Queries times the keys of rows one behind the other."""
    found = [x.dots(queries) for x in parts if x.shape[2]]
    return found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)


def _victims(group: Group, position: mx.array, left: State) -> mx.array:
    """Which rows at these positions [B, h, n] were raw and are not in the state that was left, or were merged."""
    kept = left.kept.position[:, group.first_row : group.stop_row].reshape(*position.shape[:2], group.rows)
    stays = mx.zeros((*position.shape[:2], left.departed + 1), mx.bool_)  # the last one is for rows without position
    slots = mx.where(kept < 0, left.departed, kept)
    stays = mx.put_along_axis(stays, slots, mx.ones(slots.shape, mx.bool_), axis=-1)
    seen = mx.take_along_axis(stays, mx.clip(position, 0, left.departed), axis=-1)
    return (position < left.departed) & ((position < 0) | ~seen)


def _least_squares(queries: mx.array, y: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """key [B, h, D] and bias [B, h] with queries·key + bias ≈ y, and whether there was any finite y to fit."""
    some = mx.isfinite(y)
    share = some.astype(mx.float32)[..., None]
    x = mx.concatenate([queries, mx.ones(y.shape)[..., None]], axis=-1) * share
    count = mx.maximum(share.sum(axis=(2, 3)), 1)[..., None, None]
    # Not of the bias, unless there is nothing to fit: a singular matrix has no solution, not even one to leave out.
    ridge = mx.where(mx.arange(x.shape[-1]) < queries.shape[-1], RIDGE, NOTHING)
    square = x.swapaxes(-1, -2) @ x / count + mx.diag(ridge)
    right = x.swapaxes(-1, -2) @ mx.where(some, y, 0)[..., None] / count
    found = mx.linalg.solve(square, right, stream=mx.cpu)[..., 0]
    return found[..., :-1], found[..., -1], some.any(axis=-1)
