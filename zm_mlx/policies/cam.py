"""CaM (Zhang et al., ICML 2024, openreview LCTmppB165): evicted values are merged into the tokens that follow."""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ..state.mixed import numbers_of
from ..state.state import State
from .selection import without_nan
from .streaming_llm import StreamingLLM


@dataclass(frozen=True)
class CaM(StreamingLLM):
    """Evicts as StreamingLLM does (as the official code), but adds the values of the evicted to those behind them.

    With a the sum of attention so far, token i is, one after the other in the order of positions,

        merged with probability  min(1, a[i] / mean(a[i + 1 … i + m])):   v[j] ← v[j] + v[i] / m,  j = i + 1 … i + m

    Where this departs from the code: it evicts at every token, here S tokens or a whole prompt are evicted at once.
    They still go one after the other, so that what was merged into an evicted token moves on with it,
    but by one and the same sums of attention. Those are of all query heads of a KV head. The draw depends on
    positions alone: the same prompt gives the same cache.

    Args:
        merged: m, tokens among which a value is divided: 32 in the official code.
    """

    merged: int = 32
    numbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.merged, int) and self.merged >= 1):
            raise ValueError(f"merged must be 1 token or more, not {self.merged!r}")

    @property
    def window(self) -> int | None:
        """Sums are of all queries."""
        return None

    def compacted(self, before: State, after: State) -> State:
        """``after`` with the values that the evicted leave to the rows behind them."""
        leaving = after.departed - before.departed
        first = max(0, self.sinks - before.departed)
        if leaving <= first or not after.filled:
            return after
        filled = slice(first, before.filled)
        draws = probabilities(before.scores.recent[:, :, filled], self.merged)[:, :, : leaving - first]
        joins = mx.random.bernoulli(draws, key=mx.random.key(before.departed))
        values = passed_on(numbers_of(before.recent).values[:, :, filled], joins, self.merged)
        stay = values[:, :, leaving - first :].astype(after.recent.dtype)
        rest = numbers_of(after.recent).values[:, :, after.filled :]
        return after.with_newest(after.newest._replace(values=mx.concatenate([stay, rest], axis=2)))


def probabilities(attention: mx.array, merged: int) -> mx.array:
    """min(1, a[i] / mean of the next ``merged``) of a [B, H, n]; 0 for the last, which nothing follows."""
    n = attention.shape[2]
    sums = mx.pad(mx.cumsum(attention, axis=2), [(0, 0), (0, 0), (1, 0)])
    begin = mx.minimum(mx.arange(1, n + 1), n)
    end = mx.minimum(begin + merged, n)
    mean = (sums[:, :, end] - sums[:, :, begin]) / mx.maximum(end - begin, 1)
    p = mx.where(attention > 0, attention / mx.maximum(mean, 0), 0)
    return mx.where(end > begin, mx.clip(without_nan(p), 0, 1), 0)


def passed_on(values: mx.array, joins: mx.array, merged: int) -> mx.array:
    """Values [B, H, n, Dv] after the first rows, as far as they join [B, H, e], gave theirs to the next ``merged``."""
    moved, shares = np.array(values.astype(mx.float32)), np.array(joins, np.float32)[..., None] / merged
    for i in range(shares.shape[2]):
        moved[:, :, i + 1 : i + 1 + merged] += shares[:, :, i : i + 1] * moved[:, :, i : i + 1]
    return mx.array(moved)
