"""The state of one layer's cache: a value that operations replace and never edit.

One exception: new rows are written in place into the recent store, behind the filled ones. An older
state that shares the store does not see them, but two states that go on from it must not share it.
B sequences, H KV heads in the layout's order of storage, K = Σ_h (R + M_h) kept rows.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from .coded import Coded
from .coding import Coding
from .layout import Group, LayerShape, Layout
from .mixed import Held, Mixed, Rows, numbers_of
from .rows import Dense


class Scores(NamedTuple):
    """Importance of each row, float32: of the kept rows [B, K] and of the recent ones [B, H, n]."""

    kept: mx.array
    recent: mx.array

    @classmethod
    def zeros_like(cls, other: "Scores") -> "Scores":
        return cls(*map(mx.zeros_like, other))

    @classmethod
    def none_like(cls, other: "Scores") -> "Scores":
        """In place of importance that nobody uses: without elements."""
        return cls(*(x[..., :0] for x in other))


class Kept(NamedTuple):
    """Residual and context rows, each head's contiguous: rows [B, K], weight [B, K] float32, position [B, K] int32.

    Until tokens are first merged or evicted, a head's rows are raw tokens in order; afterwards its
    first R rows are residual, the others context in the order of their positions. A weight is the
    tokens behind a row (0: empty), a position that of a raw token (-1: none).
    """

    rows: Dense | Held
    weight: mx.array
    position: mx.array

    def of(self, group: Group, departed: int = 0) -> "KeptGroup":
        """The rows of one group as rectangles: [B, K, …] becomes [B, heads, rows, …].

        Where rows are codes, ``departed`` says whether a head's first rows are residual ones.
        """
        return KeptGroup(self._rows(group, departed), rectangle(self.weight, group), rectangle(self.position, group))

    def rectangles(self, group: Group) -> "Kept":
        """The rows of one group in the form in which they are stored, as rectangles."""
        heads = slice(group.first_head, group.stop_head)
        rows: Dense | Held
        if isinstance(self.rows, Dense):
            rows = self.rows.map(lambda x: rectangle(x, group))
        else:
            coded = self.rows.coded.map(lambda x: rectangle(x, group))
            rows = Held(self.rows.residual.map(lambda x: x[:, heads]), coded)
        return Kept(rows, rectangle(self.weight, group), rectangle(self.position, group))

    @classmethod
    def joined(cls, parts: "Sequence[Kept]") -> "Kept":
        """The inverse of ``rectangles`` over all groups."""
        stores = [x.rows for x in parts]
        held = [x for x in stores if isinstance(x, Held)]
        rows = (
            Held.joined(held)
            if held
            else Dense.joined([numbers_of(x).map(lambda y: y.flatten(1, 2)) for x in stores], axis=1)
        )
        return cls(rows, joined([x.weight for x in parts]), joined([x.position for x in parts]))

    def with_first(self, group: Group, row: Dense, weight: mx.array) -> "Kept":
        """With other first residual rows of a group's heads, [B, heads], and their weights."""
        places = mx.arange(group.first_row, group.stop_row, group.rows)
        row = row.map(lambda x: x.astype(self.rows.dtype))
        rows: Dense | Held
        if isinstance(self.rows, Dense):
            rows = self.rows.zip(row, lambda x, y: _with(x, places, y))
        else:
            heads = slice(group.first_head, group.stop_head)
            rows = self.rows._replace(residual=self.rows.residual.zip(row, lambda x, y: _with(x, (heads, 0), y)))
        return self._replace(rows=rows, weight=_with(self.weight, places, weight))

    def with_moving(self, moving: Dense | Coded) -> Dense | Held:
        """The store with others in place of the rows that compactions move."""
        return (
            Held(self.rows.residual, moving)
            if isinstance(self.rows, Held) and isinstance(moving, Coded)
            else numbers_of(moving)
        )

    def _rows(self, group: Group, departed: int) -> Rows:
        rows = self.rectangles(group).rows
        if isinstance(rows, Dense):
            return rows
        if departed <= group.rows or not group.residual:
            return rows.coded
        return Mixed(rows.residual, rows.coded.cut(group.residual, group.rows), False)


class KeptGroup(NamedTuple):
    """The kept rows of a group of heads: rows, weight and position [B, heads, rows]."""

    rows: Rows
    weight: mx.array
    position: mx.array

    def first(self, count: int) -> "KeptGroup":
        """The first ``count`` rows of each head."""
        return KeptGroup(self.rows.cut(0, count), self.weight[:, :, :count], self.position[:, :, :count])


class Residuals(NamedTuple):
    """The exact float32 sums behind the residual rows, and what follows from them.

    spread [B, H, R], the variance of the keys behind a row averaged over dimensions;
    key_sum [B, H, R, D], value_sum [B, H, R, Dv], square_sum [B, H, R] of ‖k‖².
    """

    spread: mx.array
    key_sum: mx.array
    value_sum: mx.array
    square_sum: mx.array

    def of(self, group: Group) -> "Residuals":
        return Residuals(*(x[:, group.first_head : group.stop_head] for x in self))


class Merged(NamedTuple):
    """Residual rows after a merge: rows, weight and score [B, H, R], and the sums behind them."""

    rows: Dense
    weight: mx.array
    score: mx.array
    residuals: Residuals


class Call(NamedTuple):
    """What one call of attention brings: queries [B, H * G, L, D], their scale, sinks [H * G] or none.

    With a cap (Gemma 2, arXiv 2408.00118, section 2) scores are ``cap * tanh(scale * queries·keys / cap)``.
    """

    queries: mx.array
    scale: float
    sinks: mx.array | None = None
    cap: float | None = None

    @property
    def length(self) -> int:
        return int(self.queries.shape[2])

    def at(self, begin: int, end: int) -> "Call":
        """The same with the queries from ``begin`` to ``end``."""
        return self._replace(queries=self.queries[:, :, begin:end])


class State(NamedTuple):
    """All arrays and clocks of one layer.

    Row j of the recent store, [B, H, n], is the raw token at position ``departed + j``; ``departed``
    tokens have left it for the kept store, ``filled`` rows of it are in use, and
    ``since_compaction`` tokens arrived after the last compaction.

    ``scores`` is importance by attention. ``reading`` is what a raw token was worth when it was read a
    second time, 0 if it was not; where the layout has no such column, it has no elements.

    Where rows become codes, those of the recent store that a compaction has passed are codes already, as many as are
    filled, and the residual rows alone are numbers in the kept one.
    """

    kept: Kept
    residuals: Residuals
    recent: Dense | Mixed
    scores: Scores
    reading: Scores
    departed: int
    filled: int
    since_compaction: int

    @classmethod
    def empty(cls, layout: Layout, like: Dense, recent_rows: int) -> "State":
        """No tokens yet, for rows ``like`` those to come.

        Compactions are aligned so that none merges anything before token ``layout.capacity``.

        Raises:
            ValueError: rows of these lengths cannot become the layout's codes.
        """
        batch, dims = like.shape[0], (like.head_dim, like.value_dim)
        rows, sums = (batch, layout.starts[-1]), (batch, layout.heads, layout.residual)
        recent = (batch, layout.heads, recent_rows)
        scores = Scores(mx.zeros(rows), mx.zeros(recent))
        kept: Dense | Held
        newest: Dense | Mixed = Dense.zeros(recent, *dims, like.dtype)
        if layout.coding is None:
            kept = Dense.zeros(rows, *dims, like.dtype)
        else:
            coding = Coding.fitting(layout.coding.bits, layout.coding.group, dims)
            kept = Held(Dense.zeros(sums, *dims, like.dtype), Coded.zeros(rows, *dims, like.dtype, coding))
            newest = Mixed(numbers_of(newest), Coded.zeros((*recent[:2], 0), *dims, like.dtype, coding), True)
        return cls(
            kept=Kept(kept, mx.zeros(rows), mx.full(rows, -1, mx.int32)),
            residuals=Residuals(mx.zeros(sums), mx.zeros((*sums, dims[0])), mx.zeros((*sums, dims[1])), mx.zeros(sums)),
            recent=newest,
            scores=scores,
            reading=(Scores.zeros_like if layout.reading else Scores.none_like)(scores),
            departed=0,
            filled=0,
            since_compaction=-layout.capacity % layout.staging,
        )

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self.departed + self.filled

    @property
    def reads(self) -> bool:
        """Whether rows carry the importance of a second reading."""
        return bool(self.reading.recent.shape[2])

    @property
    def recent_rows(self) -> int:
        """Rows that the recent store has room for."""
        return int(self.recent.shape[2])

    @property
    def newest(self) -> Dense:
        """The part of the recent store that new rows are written into."""
        return self.recent.numbers if isinstance(self.recent, Mixed) else self.recent

    @property
    def passed(self) -> Dense | Coded:
        """The rows that a compaction moves into the kept store, in the form in which this stores them."""
        return self.recent.coded if isinstance(self.recent, Mixed) else self.recent

    def with_newest(self, newest: Dense) -> "State":
        """The state with other arrays in place of ``newest``."""
        recent = self.recent._replace(numbers=newest) if isinstance(self.recent, Mixed) else newest
        return self._replace(recent=recent)

    @property
    def closed(self) -> int:
        """Rows of the recent store that are codes."""
        return self.recent.edge if isinstance(self.recent, Mixed) else 0

    @property
    def shape(self) -> LayerShape:
        """What a token takes in this state."""
        rows = self.recent
        return LayerShape(rows.shape[1], rows.head_dim, rows.value_dim, rows.dtype.size, str(rows.dtype))

    def takes(self, new: Dense) -> bool:
        """Whether new rows [B, H, L] have the batch, heads, dims and dtype of these."""
        keys, values = self.newest
        batch, heads, _, dim = keys.shape
        length = new.keys.shape[2]
        return bool(
            new.keys.shape == (batch, heads, length, dim)
            and new.values.shape == (batch, heads, length, values.shape[3])
            and new.keys.dtype == keys.dtype
        )

    def arrays(self) -> list[mx.array]:
        recent = self.recent.arrays()
        return [*self.kept.rows.arrays(), *self.kept[1:], *self.residuals, *recent, *self.scores, *self.reading]

    def branch(self) -> "State":
        """An equal state that may go on by itself: its recent store shares memory until either is written."""
        return self._replace(recent=self.recent.map(copy.copy))

    def appended(self, new: Dense) -> "State":
        """The state with new rows [B, H, L] behind the filled ones, for which there is room."""
        self.recent.write(self.filled, new)
        return self._replace(filled=self.filled + new.keys.shape[2])

    def with_recent_rows(self, rows: int, leaving: int = 0) -> "State":
        """The state without the ``leaving`` oldest recent rows, in a recent store of ``rows`` rows."""
        count = self.filled - leaving

        def moved(x: mx.array, begin: int = leaving, end: int = self.filled, rows: int = rows) -> mx.array:
            behind = [(0, 0)] * 2 + [(0, rows - (end - begin))] + [(0, 0)] * (x.ndim - 3)
            return mx.pad(x[:, :, begin:end], behind)

        recent = self.recent
        if isinstance(recent, Mixed):
            closed = recent.edge
            begin, end, room = max(0, leaving - closed), self.filled - closed, rows - max(0, closed - leaving)
            numbers = recent.numbers.map(lambda x: moved(x, begin, end, room))
            # Contiguous, or each launch of a kernel would copy what is left.
            coded = recent.coded.cut(leaving, closed).map(mx.contiguous) if leaving else recent.coded
            recent = Mixed(numbers, coded, True)
        else:
            recent = recent.map(moved)
        return self._replace(
            recent=recent,
            scores=self.scores._replace(recent=moved(self.scores.recent)),
            reading=self.reading._replace(recent=moved(self.reading.recent)) if self.reads else self.reading,
            departed=self.departed + leaving,
            filled=count,
        )

    def without_leaving(self, layout: Layout, leaving: int) -> "State":
        """The state without the ``leaving`` oldest recent rows, in a recent store of the layout's size."""
        rows = layout.open + max(0, self.closed - leaving)
        if not leaving and self.recent_rows == rows:
            return self
        return self.with_recent_rows(rows, leaving)

    def closing(self) -> "State":
        """The state that a compaction begins with: all rows but the staged ones are codes, where rows become codes."""
        if not isinstance(self.recent, Mixed):
            return self
        closed, stop = self.recent.edge, self.filled - self.since_compaction
        if stop <= closed:
            return self
        new = Coded.of(self.recent.numbers.cut(0, stop - closed), self.recent.coded.coding)
        coded = Coded.joined([self.recent.coded, new], axis=2) if closed else new
        numbers = self.recent.numbers.map(lambda x: x[:, :, stop - closed :])
        return self._replace(recent=Mixed(numbers, coded, True))

    def leaving(self, layout: Layout) -> int:
        """Recent rows that a compaction takes: all but the newest ``proximity`` and those staged since the last one."""
        return max(0, self.filled - layout.proximity - self.since_compaction)

    def competing(self, group: Group, layout: Layout) -> slice | None:
        """Kept rows of each head of a group that compete with the leaving ones in a compaction: those of raw tokens.

        ``None`` while all tokens that ever left the recent store fit: then none needs to compete.
        """
        if self.departed + self.leaving(layout) <= group.rows:
            return None
        return slice(0, self.departed) if self.departed <= group.rows else slice(layout.residual, group.rows)


class Bound(NamedTuple):
    """Attention for one token after the other until the next compaction.

    step: of the queries of a token and of a state in which it is filled: output and scores, evaluated together.
    keys: all kept keys as the step holds them, [B, heads, D, rows] of each group; none where it holds none.
    """

    step: Callable[[mx.array, State], tuple[mx.array, Scores]]
    keys: tuple[mx.array, ...] = ()

    def read(self, state: State) -> State:
        """The state with kept keys that follow from the step's own, and take memory only once they are read.

        Each reader takes its own, or what one has read would be held for all others, beside what the step holds.
        """
        if not self.keys:
            return state
        keys = mx.concatenate([x.swapaxes(2, 3).flatten(1, 2) for x in self.keys], axis=1)
        rows = Dense(keys, numbers_of(state.kept.rows).values)
        return state._replace(kept=state.kept._replace(rows=rows))


def rectangle(x: mx.array, group: Group) -> mx.array:
    """One group of an array with something for each kept row: [B, K, …] → [B, heads, rows, …]."""
    rows = x[:, group.first_row : group.stop_row]
    return rows.reshape(x.shape[0], group.heads, group.rows, *x.shape[2:])


def joined(parts: Sequence[mx.array]) -> mx.array:
    """The inverse of ``rectangle`` over all groups."""
    flat = [x.flatten(1, 2) for x in parts]
    return flat[0] if len(flat) == 1 else mx.concatenate(flat, axis=1)


def _with(x: mx.array, places: Any, new: mx.array) -> mx.array:
    """x [B, …] with ``new`` at some places."""
    x = mx.array(x)
    x[(slice(None), *places) if isinstance(places, tuple) else (slice(None), places)] = new
    return x


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
