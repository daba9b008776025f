"""What methods have in common that evict tokens and keep a number of the newest ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..state.layout import Layout
from .policy import Policy


@dataclass(frozen=True)
class Windowed(Policy):
    """Plain eviction: ``newest`` rows are the newest tokens, all others context.

    S tokens are staged between two compactions, as kvpress's ``DecodingPress`` evicts: so a head holds between
    N - S and N rows, where the papers evict at every token.

    Args:
        newest: P, rows of the newest tokens; fewer where a head has not so many.
    """

    residual: int = 0
    decay: float = 1.0
    pool: int = 1
    newest: int = 1

    shared: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.newest, int) and self.newest >= 1):
            raise ValueError(f"newest must be 1 row or more, not {self.newest!r}")

    def layout(self, rows: int | Sequence[int], heads: int) -> Layout:
        """As ``Policy.layout``, with ``newest`` proximity rows whatever their share."""
        return with_newest(super().layout(rows, heads), self.newest)


def with_newest(layout: Layout, newest: int) -> Layout:
    """The layout with ``newest`` proximity rows, at least 1 and no more than its smallest head has room for."""
    newest = max(1, min(newest, layout.proximity + min(layout.context)))
    context = tuple(m + layout.proximity - newest for m in layout.context)
    return replace(layout, context=context, proximity=newest)
