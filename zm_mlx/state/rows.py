"""Rows of keys and values as arrays of the model's dtype.

All that a cache does with rows goes through these methods, so that rows may be stored otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

TILE_BYTES = 64 * 2**20  # rows of 16-bit dtypes are converted in tiles of this size, in float32


class Dense(NamedTuple):
    """keys [..., n, D] and values [..., n, Dv]."""

    keys: mx.array
    values: mx.array

    @classmethod
    def zeros(cls, shape: Sequence[int], head_dim: int, value_dim: int, dtype: mx.Dtype) -> "Dense":
        """Empty rows; ``shape`` is that of one number a row."""
        return cls(mx.zeros((*shape, head_dim), dtype), mx.zeros((*shape, value_dim), dtype))

    @classmethod
    def joined(cls, parts: "Sequence[Dense]", axis: int) -> "Dense":
        if len(parts) == 1:
            return parts[0]
        return cls(*(mx.concatenate(list(x), axis=axis) for x in zip(*parts, strict=True)))

    @property
    def parts(self) -> "tuple[Dense]":
        """What lies one behind the other along the axis of rows: this alone."""
        return (self,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one number a row."""
        return self.keys.shape[:-1]

    @property
    def dtype(self) -> mx.Dtype:
        return self.keys.dtype

    @property
    def head_dim(self) -> int:
        return int(self.keys.shape[-1])

    @property
    def value_dim(self) -> int:
        return int(self.values.shape[-1])

    def arrays(self) -> list[mx.array]:
        return [self.keys, self.values]

    def map(self, change: Callable[[mx.array], mx.array]) -> "Dense":
        """Rows cut, chosen or reshaped along the axes before the last one, by the same change of all arrays."""
        return Dense(change(self.keys), change(self.values))

    def zip(self, other: "Dense", change: Callable[[mx.array, mx.array], mx.array]) -> "Dense":
        """These rows and others, put together by the same change of all pairs of arrays."""
        return Dense(change(self.keys, other.keys), change(self.values, other.values))

    def cut(self, begin: int, end: int) -> "Dense":
        """The rows from ``begin`` to ``end``."""
        return Dense(self.keys[..., begin:end, :], self.values[..., begin:end, :])

    def dense(self, tile: slice = slice(None)) -> "Dense":
        """Rows as numbers in float32."""
        return Dense(*(x[..., tile, :].astype(mx.float32) for x in self))

    # ---- as a kept store, all of whose rows are numbers (see ``mixed.Held``)

    @property
    def moving(self) -> "Dense":
        """The rows that compactions move."""
        return self

    def residual_rows(self, count: int) -> "Dense":
        """The ``count`` residual rows of each head, which are its first ones."""
        return self.map(lambda x: x[:, :, :count])

    def with_residual(self, rows: "Dense") -> "Dense":
        """With other residual rows, written in place."""
        self.write(0, rows)
        return self

    # ---- arithmetic

    def write(self, begin: int, new: "Dense") -> None:
        """Put ``new`` rows [B, H, l] in place, from row ``begin`` on."""
        end = begin + new.keys.shape[2]
        self.keys[:, :, begin:end] = new.keys
        self.values[:, :, begin:end] = new.values

    def dots(self, queries: mx.array) -> mx.array:
        """Queries [..., m, D] times the keys → [..., m, n], in float32."""
        parts: list[mx.array] = []
        for t in self.tiles():
            parts.append(products(queries, after(self.keys[..., t, :], *parts[-1:])))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def weigh(self, weights: mx.array, onto: mx.array | None = None) -> mx.array:
        """Weights [..., m, n] times the values, added to ``onto`` → [..., m, Dv], in float32."""
        total = onto
        for t in self.tiles():
            values = self.values[..., t, :].astype(mx.float32) if total is None else self._values_after(t, total)
            total = weights[..., t] @ values if total is None else mx.addmm(total, weights[..., t], values)
        return mx.zeros((*weights.shape[:-1], self.value_dim)) if total is None else total

    def _values_after(self, tile: slice, done: mx.array) -> mx.array:
        """A tile of values in float32; of 16-bit ones no more than a tile at a time."""
        values = self.values[..., tile, :]
        return values if self.dtype == mx.float32 else after(values, done).astype(mx.float32)

    def tiles(self) -> Iterator[slice]:
        """Slices of the rows that take TILE_BYTES as float32; one slice if they are float32."""
        rows = self.keys.shape[-2]
        width = 4 * self.keys.size // max(1, rows)
        step = rows if self.dtype == mx.float32 else max(1, TILE_BYTES // max(1, width))
        for begin in range(0, rows, max(1, step)):
            yield slice(begin, min(begin + step, rows))


def products(x: mx.array, y: mx.array) -> mx.array:
    """x [..., m, D] and y [..., n, D] → [..., m, n], in float32."""
    return x.astype(mx.float32) @ y.astype(mx.float32).swapaxes(-1, -2)


def after(x: mx.array, *done: mx.array) -> mx.array:
    """x, to be used only once ``done`` is computed: mlx would run independent tiles side by side, all in memory."""
    ready: mx.array = mx.depends(x, list(done)) if done else x
    return ready
