"""ZeroMergeBatch: the caches of several sequences for one layer, behind the protocol of mlx-lm's batched caches."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask

from ..errors import UnsupportedModelError
from ..phases import Piece
from ..state.rows import after
from .cache import ZeroMergeCache


@dataclass(frozen=True)
class Columns:
    """What the columns to come hold for one row: ``left`` of padding, ``real`` tokens (``None``: no end), padding.

    ``right`` counts the columns of padding behind the tokens that went by: they are positions until ``finalize``.
    """

    left: int = 0
    real: int | None = None
    right: int = 0

    def take(self, length: int) -> "tuple[slice, Columns]":
        """Where the tokens are among the next ``length`` columns, and what follows."""
        begin = min(self.left, length)
        end = length if self.real is None else min(length, begin + self.real)
        real = None if self.real is None else self.real - (end - begin)
        return slice(begin, end), Columns(self.left - begin, real, self.right + length - end)


class _Part(NamedTuple):
    """The tokens of one row in an update: their columns, keys [1, H, l, D] and values [1, H, l, Dv]."""

    columns: slice
    keys: mx.array
    values: mx.array


class _Update(NamedTuple):
    """Keys and values of an update [B, H, L], and each row's part of it (``None``: padding alone)."""

    keys: mx.array
    values: mx.array
    parts: list[_Part | None]


class ZeroMergeBatch:
    """One ``ZeroMergeCache`` a sequence (``rows``), which may differ in budget, policy and phase.

    The rest of the model runs as a batch; each row takes its own tokens by itself, as if it were alone. Padding is
    cut off before a row sees it, and attention gives zeros for it. ``ZeroMergeCache.merge`` makes a batch.
    """

    def __init__(self, rows: Sequence[ZeroMergeCache]) -> None:
        self.rows = list(rows)
        self._columns = [Columns() for _ in self.rows]
        self._pending: _Update | None = None  # an update that was not attended yet
        self.attended: list[slice] = []  # columns of each row in the last one that was

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> "ZeroMergeBatch":
        """A batch of copies of single caches: these stay as they are, and cost memory once the batch writes.

        Raises:
            ValueError: one is no ``ZeroMergeCache``, or holds more than one sequence.
        """
        for cache in caches:
            if not isinstance(cache, ZeroMergeCache):
                raise ValueError(
                    f"a {type(cache).__name__} cannot join a batch of ZeroMerge caches: make the caches of all its "
                    "sequences with zm_mlx.make_prompt_cache"
                )
            if cache.layer is not None and cache.layer.recent.shape[0] != 1:
                raise ValueError(f"a cache of {cache.layer.recent.shape[0]} sequences cannot be one row of a batch")
        return cls([copy.deepcopy(cache) for cache in caches])

    # ---- padding

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padding among the columns to come, however many calls bring them.

        Args:
            left_padding: columns of padding before the tokens of each row.
            lengths: columns up to which each row's tokens go; what comes behind is padding until ``finalize``.
            right_padding: columns of padding behind them; follows from ``lengths``.

        Raises:
            ValueError: a list has not one number for each row, or right padding comes without lengths.
        """
        for given in (left_padding, lengths, right_padding):
            if given is not None and len(given) != len(self.rows):
                raise ValueError(f"{len(self.rows)} rows of a batch cannot take {len(given)} numbers of columns")
        if lengths is None and any(n > 0 for n in right_padding or ()):
            raise ValueError("right padding needs the lengths of the rows as well")
        for i, columns in enumerate(self._columns):
            left = columns.left + (0 if left_padding is None else int(left_padding[i]))
            real = columns.real if lengths is None else max(0, int(lengths[i]) - left)
            self._columns[i] = replace(columns, left=left, real=real)

    def finalize(self) -> None:
        """The announced tokens have come: what comes next is no padding."""
        self._columns = [Columns(left=c.left) for c in self._columns]

    # ---- the update, in two halves around the model's own call of attention

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take new keys [B, H, L, D] and values [B, H, L, Dv]; they are returned as they are.

        Raises:
            UnsupportedModelError: the last update never reached the attention hook.
            ValueError: shape or dtype differ from what the rows hold.
        """
        batch, _, length, _ = keys.shape
        if batch != len(self.rows):
            raise ValueError(f"new keys {keys.shape} do not fit a batch of {len(self.rows)} rows")
        parts: list[_Part | None] = []
        for i, row in enumerate(self.rows):
            columns, self._columns[i] = self._columns[i].take(length)
            if columns.start == columns.stop:
                parts.append(None)
                continue
            part = _Part(columns, *(x[i : i + 1, :, columns] for x in (keys, values)))
            row.update_and_fetch(part.keys, part.values)
            parts.append(part)
        self._pending = _Update(keys, values, parts)
        return keys, values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None = None,
        cap: float | None = None,
    ) -> mx.array:
        """Attention of new queries [B, Hq, L, D], each row's over its own rows and new tokens; stores the tokens.

        Returns:
            [B, Hq, L, Dv] in the dtype of the queries; zeros for padding.

        Raises:
            UnsupportedModelError: called twice for one update, or with other keys or values.
        """
        update, self._pending = self._pending, None
        if update is None:
            raise UnsupportedModelError("attention is called more than once for one update of its cache")
        if keys is not update.keys or values is not update.values:
            raise UnsupportedModelError("attention does not use the keys and values of its cache as they are")
        if queries.shape[2] != keys.shape[2]:
            raise UnsupportedModelError(f"queries {queries.shape} do not match the {keys.shape[2]} new tokens")
        self.attended = [slice(0, 0) if part is None else part.columns for part in update.parts]
        outputs: list[mx.array] = []
        for i, (row, part) in enumerate(zip(self.rows, update.parts, strict=True)):
            if part is None:
                outputs.append(mx.zeros((1, *queries.shape[1:3], values.shape[3]), queries.dtype))
                continue
            new = queries[i : i + 1, :, part.columns]
            if outputs and queries.shape[2] > 1:  # one row after the other, or the logits of all exist at once
                new = after(new, outputs[-1])
            out = row.attend(new, part.keys, part.values, scale, sinks, cap)
            outputs.append(padded(out, part.columns, queries.shape[2]))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=0)

    # ---- rows that come and go

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these rows, in this order; nothing is copied."""
        indices = [int(i) for i in _listed(batch_indices)]
        kept: list[ZeroMergeCache] = []
        for row in (self.rows[i] for i in indices):
            kept.append(copy.deepcopy(row) if any(row is x for x in kept) else row)
        self.rows, self._columns = kept, [self._columns[i] for i in indices]

    def extend(self, other: "ZeroMergeBatch") -> None:
        """Append copies of another batch's rows.

        Raises:
            ValueError: the other one is no batch of ZeroMerge caches.
        """
        if not isinstance(other, ZeroMergeBatch):
            raise ValueError(f"a {type(other).__name__} cannot join a batch of ZeroMerge caches")
        self.rows.extend(copy.deepcopy(row) for row in other.rows)
        self._columns.extend(other._columns)

    def extract(self, idx: int) -> ZeroMergeCache:
        """A copy of one row, as of now; the row goes on as if nothing had been taken.

        A streaming row that is reading a prompt holds a piece of it beyond its budget. The copy ends the piece with
        the tokens that it has, so it takes its budget and no more.
        """
        row = copy.deepcopy(self.rows[idx])
        if isinstance(row.phase, Piece):
            row.finish_prompt()
            mx.async_eval(row.layer and row.layer.arrays())  # type: ignore[no-untyped-call]
        return row

    # ---- the rest of the protocol

    @property
    def offset(self) -> mx.array:
        """[B] int32: the position of the next column of each row, a new array each time.

        It counts the tokens seen, less the padding to come before them, and more the padding behind them until
        ``finalize``.
        """
        pairs = zip(self.rows, self._columns, strict=True)
        return mx.array([row.offset - columns.left + columns.right for row, columns in pairs], mx.int32)

    @property
    def keys(self) -> mx.array | None:
        """The recent keys of the first row that has any (mlx-lm's pipelines assign it to order communication)."""
        return next((row.keys for row in self.rows if row.keys is not None), None)

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        first = True
        for row in self.rows:  # any of them may outlive the others
            if row.keys is not None:
                row.keys = keys if first else after(row.keys, keys)
                first = False

    @property
    def state(self) -> list[Any]:
        """The padding to come as one JSON string, and the states of all rows."""
        return [json.dumps([[c.left, c.real, c.right] for c in self._columns]), *(row.state for row in self.rows)]

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        columns, *rows = state
        self.rows = [ZeroMergeCache.from_state(row) for row in rows]
        self._columns = [Columns(*numbers) for numbers in json.loads(columns)]
        self._pending = None

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> "ZeroMergeBatch":
        """A batch with this state (how mlx-lm's ``load_prompt_cache`` makes one)."""
        batch = cls.__new__(cls)
        batch.state = state
        return batch

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of all rows."""
        return sum(row.nbytes for row in self.rows)

    def size(self) -> int:
        """Filled rows of the fullest head of any row."""
        return max((row.size() for row in self.rows), default=0)

    def empty(self) -> bool:
        """Whether no row has seen a token."""
        return all(row.empty() for row in self.rows)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """A causal mask over the new columns alone: padding is cut off, and the hook needs none."""
        return create_attention_mask(length, 0, return_array, window_size)

    def is_trimmable(self) -> bool:
        """Never: what was merged cannot be taken back."""
        return False

    def trim(self, n: int) -> int:
        """Trims nothing, and says so by returning 0."""
        return 0


def padded(out: mx.array, columns: slice, length: int) -> mx.array:
    """out [1, Hq, l, Dv] at its columns of ``length``, with zeros around."""
    if columns == slice(0, length):
        return out
    return mx.pad(out, [(0, 0), (0, 0), (columns.start, length - columns.stop), (0, 0)])


def _listed(indices: Sequence[int] | mx.array) -> list[int]:
    return indices.tolist() if isinstance(indices, mx.array) else list(indices)  # type: ignore[return-value]
