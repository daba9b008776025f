"""What this package does by default."""

from dataclasses import dataclass

import mlx.core as mx

from ..state.coded import Coded
from ..state.rows import Dense
from ..state.state import Merged
from .policy import Policy, Score


@dataclass(frozen=True)
class ZeroMerge(Policy):
    """Half of the context rows by attention so far, half by the prompt's own queries moved behind it (method.md 3).

    The settings were chosen on tuning texts with SmolLM2-135M-Instruct, under the cap; method.md 9 has the
    numbers, and what was tried besides.
    """

    residual: int = 1
    proximity: float = 0.2
    kappa: float = 0.0
    pool: int = 1
    newest: int = 32
    score: Score = "replay"

    @property
    def fits(self) -> bool:
        """Residual rows change at a prompt's end alone."""
        return self.residual > 0

    def merge(self, merged: Merged, victims: Dense | Coded, scores: mx.array, fresh: bool) -> Merged:
        """The residual rows as they are: victims are dropped, and at a prompt's end a row is fitted to them."""
        return (
            merged._replace(weight=mx.zeros_like(merged.weight), score=mx.zeros_like(merged.score)) if fresh else merged
        )
