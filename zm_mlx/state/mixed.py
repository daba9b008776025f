"""Rows of which some are numbers and some are codes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from .coded import Coded
from .rows import Dense


class Mixed(NamedTuple):
    """Numbers and codes, one behind the other along the axis of rows; ``newest``: the numbers are the last rows."""

    numbers: Dense
    coded: Coded
    newest: bool

    @property
    def parts(self) -> tuple[Dense | Coded, Dense | Coded]:
        """In the order of rows."""
        return (self.coded, self.numbers) if self.newest else (self.numbers, self.coded)

    @property
    def edge(self) -> int:
        """Rows of the first part."""
        return int(self.parts[0].shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one number a row."""
        *many, rows = self.numbers.shape
        return (*many, rows + self.coded.shape[-1])

    @property
    def dtype(self) -> mx.Dtype:
        return self.numbers.dtype

    @property
    def head_dim(self) -> int:
        return self.numbers.head_dim

    @property
    def value_dim(self) -> int:
        return self.numbers.value_dim

    def arrays(self) -> list[mx.array]:
        return [*self.coded.arrays(), *self.numbers.arrays()]

    def map(self, change: Callable[[mx.array], mx.array]) -> "Mixed":
        """Rows chosen or reshaped along the axes before that of rows, by the same change of all arrays."""
        return Mixed(self.numbers.map(change), self.coded.map(change), self.newest)

    def cut(self, begin: int, end: int) -> "Rows":
        """The rows from ``begin`` to ``end``; one part alone where they lie in it."""
        (first, last), edge = self.parts, self.edge
        if begin >= edge:
            return last.cut(begin - edge, end - edge)
        if end <= edge:
            return first.cut(begin, end)
        if self.newest:
            return Mixed(self.numbers.cut(0, end - edge), self.coded.cut(begin, edge), True)
        return Mixed(self.numbers.cut(begin, edge), self.coded.cut(0, end - edge), False)

    def write(self, begin: int, new: Dense) -> None:
        """Put ``new`` rows [B, H, l] in place among the newest, from row ``begin`` on."""
        self.numbers.write(begin - self.edge, new)

    def dense(self, tile: slice = slice(None)) -> Dense:
        """Rows as numbers in float32."""
        begin, end, _ = tile.indices(self.shape[-1])
        found = self.cut(begin, end)
        if isinstance(found, Mixed):
            return Dense.joined([x.dense() for x in found.parts], axis=-2)
        return found.dense()

    def dots(self, queries: mx.array) -> mx.array:
        """Queries [..., m, D] times the keys → [..., m, n], in float32."""
        return mx.concatenate([x.dots(queries) for x in self.parts], axis=-1)

    def weigh(self, weights: mx.array, onto: mx.array | None = None) -> mx.array:
        """Weights [..., m, n] times the values, added to ``onto`` → [..., m, Dv], in float32."""
        first, last = self.parts
        return last.weigh(weights[..., self.edge :], first.weigh(weights[..., : self.edge], onto))


Rows = Dense | Coded | Mixed


def numbers_of(rows: "Rows | Held") -> Dense:
    """Rows for operations that take numbers alone.

    Raises:
        TypeError: there are codes among them.
    """
    if not isinstance(rows, Dense):
        raise TypeError("rows are codes, and this operation takes numbers")
    return rows


def zipped(
    rows: Dense | Coded, others: Dense | Coded, change: Callable[[mx.array, mx.array], mx.array]
) -> Dense | Coded:
    """Two of a kind, put together by the same change of all pairs of arrays."""
    if isinstance(rows, Coded) and isinstance(others, Coded):
        return rows.zip(others, change)
    return numbers_of(rows).zip(numbers_of(others), change)


class Held(NamedTuple):
    """Kept rows of which the residual ones are numbers and the others codes.

    residual [B, H, R]; coded [B, K], all kept rows of a layer: those in the places of a head's residual rows hold
    tokens as long as no head's tokens are merged or evicted, and nothing afterwards.
    """

    residual: Dense
    coded: Coded

    @property
    def moving(self) -> Coded:
        """The rows that compactions move: all but the residual ones."""
        return self.coded

    def residual_rows(self, _: int) -> Dense:
        """The residual rows of each head."""
        return self.residual

    def with_residual(self, rows: Dense) -> "Held":
        return Held(rows, self.coded)

    @classmethod
    def joined(cls, parts: "Sequence[Held]") -> "Held":
        """Of neighbouring heads, whose coded rows are rectangles [B, h, rows]."""
        rows = [x.coded.map(lambda y: y.flatten(1, 2)) for x in parts]
        return cls(Dense.joined([x.residual for x in parts], axis=1), Coded.joined(rows, axis=1))

    @property
    def dtype(self) -> mx.Dtype:
        return self.residual.dtype

    def arrays(self) -> list[mx.array]:
        return [*self.residual.arrays(), *self.coded.arrays()]
