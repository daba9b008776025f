"""KVzip (Kim et al. 2025, arXiv 2505.23416): importance by reconstructing the context."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx

from ..state.layout import Layout
from ..state.state import Scores, State
from . import allocation
from .windowed import Windowed


@dataclass(frozen=True)
class KVzip(Windowed):
    """Keeps what the model attends to while it repeats the context; one pool of rows for all heads of all layers.

        importance[j] = max over queries i of the repetition and query heads g of p_i[g, j]

    The importance is ``State.reading``, which ``zm_mlx.evaluation.kvzip`` makes of a prompt. Where this
    departs from the paper: it keeps all that is asked and generated after the context, while here, under a fixed
    number of rows, these tokens have no importance and leave with the window of ``newest`` tokens (32; the paper
    has none in the context).
    """

    newest: int = 32
    needs: ClassVar[str | None] = "the prompt read a second time, while it is repeated"

    @property
    def reads(self) -> bool:
        """Importance is ``State.reading``."""
        return True

    @property
    def window(self) -> int | None:
        """The attention of the prompt itself decides nothing, so one query is enough."""
        return 1

    def importance(self, state: State, layout: Layout) -> Scores:
        """The reading."""
        return state.reading

    def fitted(self, layouts: Sequence[Layout], importance: Sequence[mx.array]) -> tuple[Layout, ...]:
        """As ``Policy.fitted``, all layers together."""
        total = sum(sum(a.context) for a in layouts)
        if sum(x.size for x in importance) <= total:
            return tuple(layouts)
        counts = allocation.adaptive(importance, total)
        return tuple(replace(a, context=c) for a, c in zip(layouts, counts, strict=True))
