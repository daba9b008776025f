"""Ada-KV (Feng et al. 2024, arXiv 2407.11550): SnapKV with one pool of rows for the heads of a layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..state.layout import Layout
from . import allocation, selection
from .snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """The H · M most important tokens of a layer's heads together say how many rows each head gets.

    The formula is in ``allocation.safeguarded``. Safeguard α = 0.2, window 32 and maxima over 7 neighbours, as in the
    paper and its code (``floor_alpha``; its rounding may lose rows, this does not). Rows are shared out once,
    for the prompt, and stay so while decoding. Without a prompt's importance (streaming) all heads have the same
    rows, which is SnapKV.

    Args:
        safeguard: α, the share of rows that all heads have alike.
    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard must be a share between 0 and 1, not {self.safeguard!r}")

    def fitted(self, layouts: Sequence[Layout], importance: Sequence[mx.array]) -> tuple[Layout, ...]:
        """As ``Policy.fitted``, each layer for itself."""
        pooled = [selection.pooled(x, self.pool) for x in importance]
        return tuple(allocation.safeguarded(a, x, self.safeguard) for a, x in zip(layouts, pooled, strict=True))
