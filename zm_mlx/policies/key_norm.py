"""Key norms (Devoto et al. 2024, arXiv 2406.11430): tokens whose keys are short get most attention."""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..state.layout import Layout
from ..state.mixed import numbers_of
from ..state.state import Scores, State
from .windowed import Windowed


@dataclass(frozen=True)
class KeyNorm(Windowed):
    """Keeps the tokens with the smallest ‖k‖₂.

    Where this departs from the paper: the first two layers are compressed like the others, as in kvpress
    (the paper leaves them whole in language modelling); S tokens are staged, and the newest one always stays.
    """

    numbers: ClassVar[bool] = True

    @property
    def window(self) -> int | None:
        """Attention decides nothing, so one query is enough."""
        return 1

    def importance(self, state: State, layout: Layout) -> Scores:
        """-‖k‖₂."""
        return Scores(_norm(numbers_of(state.kept.rows).keys), _norm(numbers_of(state.recent).keys))


def _norm(keys: mx.array) -> mx.array:
    return -mx.linalg.norm(keys.astype(mx.float32), axis=-1)
