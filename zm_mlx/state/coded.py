"""Rows of keys and values as codes of a few bits: ``mx.quantize`` rounds them once, and they move as they are.

Each ``group`` neighbouring numbers of a vector share a scale and a bias: number = scale · code + bias.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from .coding import Coding
from .rows import Dense, after

TILE_BYTES = 4 * 2**20  # of rows as float32 numbers, where they are made at all
FEW = 8  # vectors up to which mlx's product with codes takes no longer than making numbers of them, on a CPU


class Codes(NamedTuple):
    """Vectors [..., n, D]: codes uint32 [..., n, D * bits / 32], scales and biases [..., n, D / group]."""

    codes: mx.array
    scales: mx.array
    biases: mx.array


class Coded(NamedTuple):
    """keys [..., n, D] and values [..., n, Dv] as codes."""

    keys: Codes
    values: Codes
    coding: Coding

    @classmethod
    def of(cls, rows: Dense, coding: Coding) -> "Coded":
        """Rows rounded to codes."""
        keys, values = (Codes(*mx.quantize(x, coding.group, coding.bits)) for x in rows)
        return cls(keys, values, coding)

    @classmethod
    def zeros(cls, shape: Sequence[int], head_dim: int, value_dim: int, dtype: mx.Dtype, coding: Coding) -> "Coded":
        """Empty rows; ``shape`` is that of one number a row."""

        def vectors(dim: int) -> Codes:
            shared = (*shape, dim // coding.group)
            codes = mx.zeros((*shape, dim * coding.bits // 32), mx.uint32)
            return Codes(codes, mx.zeros(shared, dtype), mx.zeros(shared, dtype))

        return cls(vectors(head_dim), vectors(value_dim), coding)

    @classmethod
    def joined(cls, parts: "Sequence[Coded]", axis: int) -> "Coded":
        first, *others = parts
        for other in others:
            first = first.zip(other, lambda x, y: mx.concatenate([x, y], axis=axis))
        return first

    @property
    def parts(self) -> "tuple[Coded]":
        """What lies one behind the other along the axis of rows: this alone."""
        return (self,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one number a row."""
        return self.keys.codes.shape[:-1]

    @property
    def dtype(self) -> mx.Dtype:
        """Of the numbers that codes stand for."""
        return self.keys.scales.dtype

    @property
    def head_dim(self) -> int:
        return int(self.keys.scales.shape[-1]) * self.coding.group

    @property
    def value_dim(self) -> int:
        return int(self.values.scales.shape[-1]) * self.coding.group

    def arrays(self) -> list[mx.array]:
        return [*self.keys, *self.values]

    def map(self, change: Callable[[mx.array], mx.array]) -> "Coded":
        """Rows cut, chosen or reshaped along the axes before the last one, by the same change of all arrays."""
        return Coded(Codes(*map(change, self.keys)), Codes(*map(change, self.values)), self.coding)

    def zip(self, other: "Coded", change: Callable[[mx.array, mx.array], mx.array]) -> "Coded":
        """These rows and others, put together by the same change of all pairs of arrays."""
        keys, values = Codes(*map(change, self.keys, other.keys)), Codes(*map(change, self.values, other.values))
        return Coded(keys, values, self.coding)

    def cut(self, begin: int, end: int) -> "Coded":
        """The rows from ``begin`` to ``end``."""
        return self.map(lambda x: x[..., begin:end, :])

    def dense(self, tile: slice = slice(None)) -> Dense:
        """Rows as numbers in float32."""
        return Dense(*(self._numbers(Codes(*(a[..., tile, :] for a in x))) for x in self[:2]))

    def dots(self, queries: mx.array) -> mx.array:
        """Queries [..., m, D] times the keys → [..., m, n], in float32."""
        queries = queries.astype(mx.float32)
        if self._few(queries):
            return self._product(queries, self.keys, True)
        parts: list[mx.array] = []
        for t in self.tiles():
            tile = Codes(*(after(x[..., t, :], *parts[-1:]) for x in self.keys))
            parts.append(queries @ self._numbers(tile).swapaxes(-1, -2))
        return mx.concatenate(parts, axis=-1) if parts else mx.zeros((*queries.shape[:-1], 0))

    def weigh(self, weights: mx.array, onto: mx.array | None = None) -> mx.array:
        """Weights [..., m, n] times the values, added to ``onto`` → [..., m, Dv], in float32."""
        total = onto
        if self.shape[-1] and self._few(weights):
            given = self._product(weights, self.values, False)
            return given if total is None else total + given
        for t in self.tiles():
            done = [] if total is None else [total]
            values = self._numbers(Codes(*(after(x[..., t, :], *done) for x in self.values)))
            total = weights[..., t] @ values if total is None else mx.addmm(total, weights[..., t], values)
        return mx.zeros((*weights.shape[:-1], self.value_dim)) if total is None else total

    def tiles(self) -> Iterator[slice]:
        """Slices of the rows that take TILE_BYTES as float32."""
        *many, rows = self.shape
        width = 4 * max(self.head_dim, self.value_dim)
        for n in many:
            width *= n
        step = max(1, TILE_BYTES // max(1, width))
        for begin in range(0, rows, step):
            yield slice(begin, min(begin + step, rows))

    def _few(self, vectors: mx.array) -> bool:
        """Whether mlx's own product with codes is the better one.

        It takes rows that exist, and copies rows that many queries share along another axis (``ops.plain.half``).
        """
        shared = self.shape[:-1] != tuple(vectors.shape[:-2])
        return bool(self.shape[-1]) and not shared and (vectors.shape[-2] <= FEW or mx.default_device() == mx.gpu)

    def _product(self, x: mx.array, codes: Codes, transpose: bool) -> mx.array:
        coding, (words, scales, biases) = self.coding, _wide(codes)
        return mx.quantized_matmul(
            x, words, scales, biases, transpose=transpose, group_size=coding.group, bits=coding.bits
        )

    def _numbers(self, codes: Codes) -> mx.array:
        if not codes.codes.size:  # of which mlx makes no numbers
            return mx.zeros((*codes.scales.shape[:-1], codes.scales.shape[-1] * self.coding.group))
        words, scales, biases = _wide(codes)
        return mx.dequantize(words, scales, biases, group_size=self.coding.group, bits=self.coding.bits)


def _wide(codes: Codes) -> Codes:
    """With scales and biases in float32, in which everything is computed."""
    return Codes(codes.codes, codes.scales.astype(mx.float32), codes.biases.astype(mx.float32))
