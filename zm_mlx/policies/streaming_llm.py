"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): attention sinks and a sliding window."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..state.layout import Layout
from ..state.state import Scores, State
from .policy import Policy
from .windowed import with_newest


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keeps the first ``sinks`` tokens and the newest of the others, whatever attention they get.

    Where this departs from the paper: tokens keep the positions at which their keys were rotated, as in
    kvpress and mlx-lm's rotating cache, while the paper counts positions within the cache; and S tokens are
    staged, so that the window is between N - S - 4 and N - 4 tokens.

    Args:
        sinks: first tokens that stay, 4 in the paper.
    """

    residual: int = 0
    decay: float = 1.0
    pool: int = 1
    sinks: int = 4

    shared: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.sinks, int) and self.sinks >= 0):
            raise ValueError(f"sinks must be 0 tokens or more, not {self.sinks!r}")

    def layout(self, rows: int | Sequence[int], heads: int) -> Layout:
        """As ``Policy.layout``, with all rows but the sinks' and the staged ones for the newest tokens."""
        layout = super().layout(rows, heads)
        return with_newest(layout, layout.proximity + min(layout.context) - self.sinks)

    @property
    def window(self) -> int | None:
        """Attention decides nothing, so one query is enough."""
        return 1

    def importance(self, state: State, layout: Layout) -> Scores:
        """The older, the more."""
        recent = mx.arange(state.departed, state.departed + state.recent_rows, dtype=mx.float32)
        return Scores(-state.kept.position.astype(mx.float32), mx.broadcast_to(-recent, state.scores.recent.shape))
