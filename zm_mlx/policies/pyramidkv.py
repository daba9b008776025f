"""PyramidKV (Cai et al. 2024, arXiv 2406.02069): SnapKV with fewer rows in higher layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..state.layout import Layout
from . import allocation
from .snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Context rows fall linearly from the first layer to the last, which has 1 / ``beta`` of the mean.

        M_last = M / β,  M_first = 2 M - M / β

    β = 20, window 8 and maxima over 7 neighbours as in the paper and its code. The window is the same in all
    layers, and the rows of all layers are those of a uniform cache. Where this departs: the code caps the first
    layers at the prompt's length, which budgets below half of it never reach.

    Args:
        beta: how steep the pyramid is; 1 is uniform.
    """

    newest: int = 8
    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"beta must be 1 or more, not {self.beta!r}")

    def layouts(self, rows: int, heads: Sequence[int]) -> tuple[Layout, ...]:
        """As ``Policy.layouts``, in a pyramid."""
        uniform = super().layouts(rows, heads)
        context = allocation.pyramid(uniform[0].context[0], len(heads), self.beta)
        return tuple(replace(a, context=(m,) * a.heads) for a, m in zip(uniform, context, strict=True))
