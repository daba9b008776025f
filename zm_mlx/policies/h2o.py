"""H2O (Zhang et al. 2023, arXiv 2306.14048): heavy hitters and the newest tokens."""

from dataclasses import dataclass
from typing import ClassVar

from .policy import Policy


@dataclass(frozen=True)
class H2O(Policy):
    """Half of the rows are the newest tokens, half those with the largest sum of attention from all queries so far.

        importance[j] = Σ_i Σ_g p_i[g, j]

    Where this departs from the paper: the query heads of a KV head share its rows, by their summed attention;
    and S tokens are staged between two evictions, where the paper evicts one at every token.
    """

    residual: int = 0
    proximity: float = 0.5
    decay: float = 1.0
    pool: int = 1

    shared: ClassVar[bool] = False
