"""The rows of one layer: how N rows per head divide into regions, and what they cost in bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import index

from .coding import Coding

MAX_STAGING = 256
STAGED, STAGED_BESIDE_CODES = 8, 16  # one row of so many is staged: what is staged takes no codes
MAX_ROWS = 2**31 - 1  # of one layer, all heads together: what an array's axis can count
FLOAT32 = 4


@dataclass(frozen=True)
class LayerShape:
    """What one full-attention layer stores for a token: KV heads, head dims, bytes an element, dtype's name.

    Where it is known, also how many query heads ask, and how many numbers mlx-lm's cache holds of a token and head if
    these are fewer; nothing stored depends on either.
    """

    heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    dtype: str = ""
    query_heads: int = field(default=0, compare=False)
    own_dims: int = field(default=0, compare=False)

    @property
    def dims(self) -> tuple[int, int]:
        return self.head_dim, self.value_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.heads * (self.head_dim + self.value_dim) * self.itemsize

    @property
    def own_bytes(self) -> int:
        """Bytes of one token in mlx-lm's cache."""
        return self.heads * self.own_dims * self.itemsize if self.own_dims else self.token_bytes

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's queries."""
        return self.query_heads * self.head_dim * self.itemsize


@dataclass(frozen=True)
class Group:
    """Neighbouring heads (in storage order) with equally many kept rows: a rectangle of the kept store."""

    first_head: int
    heads: int
    context: int
    first_row: int
    rows: int

    @property
    def residual(self) -> int:
        """Rows of each head that are residual ones once tokens were merged or evicted."""
        return self.rows - self.context

    @property
    def stop_head(self) -> int:
        return self.first_head + self.heads

    @property
    def stop_row(self) -> int:
        return self.first_row + self.heads * self.rows


@dataclass(frozen=True)
class Layout:
    """Regions of one layer: head h holds ``residual + context[h] + proximity + staging`` rows.

    Heads are stored in ``order``, largest first, so that equal heads lie next to each other and
    plain ops work on a few rectangles (``groups``).
    """

    residual: int
    context: tuple[int, ...]
    proximity: int
    staging: int
    reading: bool = False  # rows carry the importance of a second reading as well
    coding: Coding | None = None  # of the rows that a compaction has passed; residual ones stay numbers

    @classmethod
    def of(
        cls,
        rows: int | Sequence[int],
        heads: int,
        *,
        residual: int,
        proximity: float,
        staging: int | None,
        newest: int = 1,
        reading: bool = False,
        coding: Coding | None = None,
    ) -> "Layout":
        """Divide N rows per head, one number for all heads or one a head.

        S = clamp(mean N / 8, 1, 256), half of it beside codes, unless ``staging`` says otherwise; P is the share
        ``proximity`` of the mean C = N - S, or ``newest`` rows if that is more but no more than half of C, as far as
        the smallest head has room for it.

        Raises:
            ValueError: a head has too few rows (the message says the fewest that work), or the
                table does not have one number for each head.
        """
        table = whole_rows(rows, heads)
        if len(table) != heads:
            raise ValueError(f"a table of rows per head needs {heads} numbers, one for each KV head, not {len(table)}")
        mean = sum(table) / heads
        stage = staging if staging is not None else _staging(mean, coding is not None)
        least = smallest_rows(residual, staging if len(set(table)) == 1 else stage, coding is not None)
        if min(table) < least:
            raise ValueError(
                f"a budget of {min(table)} rows per head is too small: the smallest that works here is {least} "
                f"({residual} residual, {least - residual - 1} staging, 1 proximity)"
            )
        if sum(table) > MAX_ROWS:
            raise ValueError(f"a budget of {max(table)} rows per head is too large: {MAX_ROWS} rows is the most")
        share = max(round(proximity * (mean - stage)), min(newest, int(mean - stage) // 2))
        recent = max(1, min(share, min(table) - residual - stage))
        return cls(residual, tuple(n - residual - recent - stage for n in table), recent, stage, reading, coding)

    @property
    def heads(self) -> int:
        return len(self.context)

    @property
    def recent(self) -> int:
        """Rows of the recent store, the same for all heads."""
        return self.proximity + self.staging

    @property
    def open(self) -> int:
        """Rows of the recent store that hold numbers."""
        return self.recent if self.coding is None else self.staging

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """N_h of each head, in the model's order of heads."""
        return tuple(self.residual + m + self.recent for m in self.context)

    @property
    def capacity(self) -> int:
        """Tokens up to which no head merges or evicts anything."""
        return min(self.rows)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The model's head behind each stored head."""
        return tuple(sorted(range(self.heads), key=lambda h: -self.context[h]))

    @cached_property
    def in_model_order(self) -> bool:
        return self.order == tuple(range(self.heads))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First kept row of each stored head, and the number of kept rows at the end (H + 1 ints)."""
        starts = [0]
        for h in self.order:
            starts.append(starts[-1] + self.residual + self.context[h])
        return tuple(starts)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        found = []
        for context, members in groupby(range(self.heads), key=lambda i: self.context[self.order[i]]):
            first, *others = members
            found.append(Group(first, 1 + len(others), context, self.starts[first], self.residual + context))
        return tuple(found)

    def nbytes(self, shape: LayerShape, batch: int = 1) -> int:
        """Bytes of all arrays of one layer's cache."""
        width, scores = shape.head_dim + shape.value_dim, 1 + self.reading
        row = passed = width * shape.itemsize
        if self.coding is not None:
            passed = sum(self.coding.nbytes(d, shape.itemsize) for d in shape.dims)
        kept = self.starts[-1] * (passed + (2 + scores) * FLOAT32)  # weight, position
        recent = self.heads * (self.open * row + (self.recent - self.open) * passed + self.recent * scores * FLOAT32)
        sums = self.heads * self.residual * (width + 2) * FLOAT32  # sums, squares, spread
        if self.coding is not None:
            sums += self.heads * self.residual * row  # beside their places among the codes
        return batch * (kept + recent + sums)


def whole_rows(rows: int | Sequence[int], heads: int) -> list[int]:
    """A table of rows per head from one number for all heads or one a head.

    Raises:
        ValueError: something else than whole numbers.
    """
    try:
        return [index(n) for n in rows] if isinstance(rows, Iterable) else [index(rows)] * heads
    except TypeError as error:
        raise ValueError(f"rows per head are whole numbers, one or one for each KV head, not {rows!r}") from error


def smallest_rows(residual: int, staging: int | None, coded: bool = False) -> int:
    """The fewest rows per head that work: all residual rows, the staging region and one proximity row."""
    rows = residual + (staging or 1) + 1
    while staging is None and rows < residual + _staging(rows, coded) + 1:
        rows += 1
    return rows


def _staging(mean: float, coded: bool) -> int:
    each = STAGED_BESIDE_CODES if coded else STAGED
    return max(1, min(MAX_STAGING * STAGED // each, int(mean / each)))
