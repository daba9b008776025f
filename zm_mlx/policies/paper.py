"""ZeroMerge as published (arXiv 2503.10714; v2 and v3 call it ZSMerge)."""

from dataclasses import dataclass
from typing import ClassVar

from .policy import Policy


@dataclass(frozen=True)
class Paper(Policy):
    """Compensated by the number of merged tokens alone, selected by unpooled importance (method.md 2, 4)."""

    kappa: float = 0.0
    pool: int = 1

    shared: ClassVar[bool] = False
