"""TOVA (Oren et al. 2024, arXiv 2401.06104): token omission via attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..state.layout import Layout
from ..state.state import Scores, State
from .windowed import Windowed


@dataclass(frozen=True)
class Tova(Windowed):
    """Keeps the tokens to which the last query attends most, averaged over all heads of the layer.

        importance[j] = mean over heads g of p_last[g, j]

    No token is privileged, neither old nor new; all heads of a layer keep the same tokens. Where this departs
    from the paper: S tokens are staged between two evictions, and the newest token always stays (as in kvpress).
    """

    decay: float = 1e-9  # of two queries only the later one counts

    def layout(self, rows: int | Sequence[int], heads: int) -> Layout:
        """As ``Windowed.layout``.

        Raises:
            ValueError: heads differ in their rows.
        """
        layout = super().layout(rows, heads)
        if len(set(layout.context)) > 1:
            raise ValueError("TOVA keeps the same tokens in all heads of a layer: they cannot have different rows")
        return layout

    @property
    def window(self) -> int | None:
        """The last query."""
        return 1

    def importance(self, state: State, layout: Layout) -> Scores:
        """The scores, averaged over heads."""
        kept, recent = state.scores
        by_head = kept.reshape(kept.shape[0], layout.heads, -1)
        return Scores(_average(by_head).reshape(kept.shape), _average(recent))


def _average(x: mx.array) -> mx.array:
    """x [B, H, n] with the mean over heads for each head."""
    return mx.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)
