"""The arrays of one layer's cache: two stores, one rectangular, one ragged over heads."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from .layout import Group, Layout


class Recent(NamedTuple):
    """The newest tokens, oldest first, the same number of rows for all heads.

    keys [B, H, rows, D] and values [B, H, rows, Dv] in the model's dtype, score [B, H, rows]
    float32. Every row is a raw token of weight 1; row j holds the token at position ``left + j``.
    """

    keys: mx.array
    values: mx.array
    score: mx.array

    @classmethod
    def empty(cls, batch: int, heads: int, head_dim: int, value_dim: int, dtype: mx.Dtype, rows: int) -> "Recent":
        return cls(
            mx.zeros((batch, heads, rows, head_dim), dtype),
            mx.zeros((batch, heads, rows, value_dim), dtype),
            mx.zeros((batch, heads, rows), mx.float32),
        )

    def part(self, begin: int, count: int, rows: int) -> "Recent":
        """``count`` rows from ``begin`` on, in a store of ``rows`` rows."""

        def moved(x: mx.array) -> mx.array:
            behind = [(0, 0)] * 2 + [(0, rows - count)] + [(0, 0)] * (x.ndim - 3)
            return mx.pad(x[:, :, begin : begin + count], behind)

        return Recent(*map(moved, self))


class Kept(NamedTuple):
    """Residual and context rows, K = Σ_h (R + M_h) of them, each head's rows contiguous.

    Until tokens are first merged or evicted, a head's rows are raw tokens in order; afterwards its
    first R rows are residual, the others context in the order of their positions.

    keys [B, K, D] and values [B, K, Dv] in the model's dtype; weight, score [B, K] float32 and
    position [B, K] int32 (-1 unless raw); spread [B, H, R] float32, the variance of the keys behind
    a residual row averaged over dimensions; the exact float32 sums behind the residual rows:
    key_sum [B, H, R, D], value_sum [B, H, R, Dv] and square_sum [B, H, R] of ‖k‖².
    """

    keys: mx.array
    values: mx.array
    weight: mx.array
    score: mx.array
    position: mx.array
    spread: mx.array
    key_sum: mx.array
    value_sum: mx.array
    square_sum: mx.array

    @classmethod
    def empty(cls, batch: int, layout: Layout, head_dim: int, value_dim: int, dtype: mx.Dtype) -> "Kept":
        rows, sums = (batch, layout.starts[-1]), (batch, layout.heads, layout.residual)
        return cls(
            keys=mx.zeros((*rows, head_dim), dtype),
            values=mx.zeros((*rows, value_dim), dtype),
            weight=mx.zeros(rows, mx.float32),
            score=mx.zeros(rows, mx.float32),
            position=mx.full(rows, -1, mx.int32),
            spread=mx.zeros(sums, mx.float32),
            key_sum=mx.zeros((*sums, head_dim), mx.float32),
            value_sum=mx.zeros((*sums, value_dim), mx.float32),
            square_sum=mx.zeros(sums, mx.float32),
        )

    def of(self, group: Group) -> "Kept":
        """The rows of one group as rectangles: [B, K, …] becomes [B, heads, rows, …]."""
        rows = slice(group.first_row, group.stop_row)
        heads = slice(group.first_head, group.stop_head)

        def rectangle(x: mx.array) -> mx.array:
            return x[:, rows].reshape(x.shape[0], group.heads, group.rows, *x.shape[2:])

        return Kept(*[*map(rectangle, self.rows), *(x[:, heads] for x in self[5:])])

    @property
    def rows(self) -> tuple[mx.array, ...]:
        """The arrays with something for each row: keys, values, weight, score, position."""
        return self[:5]

    def with_rows(self, rows: Sequence[mx.array]) -> "Kept":
        """The same with other ``rows``."""
        return Kept(*[*rows, *self[5:]])

    @classmethod
    def join(cls, parts: "list[Kept]") -> "Kept":
        """The inverse of ``of`` over all groups."""
        flat = [p.with_rows([x.flatten(1, 2) for x in p.rows]) for p in parts]
        joined = [xs[0] if len(xs) == 1 else mx.concatenate(list(xs), axis=1) for xs in zip(*flat, strict=True)]
        return cls(*joined)


class Held(NamedTuple):
    """Rows of one head: keys [n, D], values [n, Dv], weight [n], score [n], position [n] (-1 if merged)."""

    keys: mx.array
    values: mx.array
    weight: mx.array
    score: mx.array
    position: mx.array


def held(kept: Kept, recent: Recent, layout: Layout, left: int, live: int, head: int, batch: int) -> Held:
    """The live rows of one of the model's heads: kept rows, then recent ones."""
    stored = layout.order.index(head)
    begin, end = layout.starts[stored : stored + 2]
    rows = slice(begin, min(end, begin + left))
    keys, values, score = (x[batch, stored, :live] for x in recent)
    position = mx.arange(left, left + live, dtype=mx.int32)
    pairs = zip(kept.rows, (keys, values, mx.ones((live,)), score, position), strict=True)
    return Held(*[mx.concatenate([x[batch, rows], y]) for x, y in pairs])


def to_storage(x: mx.array, layout: Layout, axis: int) -> mx.array:
    """KV heads, or the query heads of each, from the model's order into the order of storage."""
    return _reorder(x, layout, axis, layout.order)


def to_model(x: mx.array, layout: Layout, axis: int) -> mx.array:
    """The inverse of ``to_storage``."""
    return _reorder(x, layout, axis, sorted(range(layout.heads), key=layout.order.__getitem__))


def _reorder(x: mx.array, layout: Layout, axis: int, order: Sequence[int]) -> mx.array:
    if layout.in_model_order:
        return x
    split = x.reshape(*x.shape[:axis], layout.heads, x.shape[axis] // layout.heads, *x.shape[axis + 1 :])
    return mx.take(split, mx.array(list(order)), axis=axis).reshape(x.shape)
