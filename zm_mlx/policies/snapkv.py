"""SnapKV (Li et al. 2024, arXiv 2404.14469): the attention of an observation window at the prompt's end."""

from dataclasses import dataclass

from ..state.state import Scores, State
from .windowed import Windowed


@dataclass(frozen=True)
class SnapKV(Windowed):
    """Keeps the last ``newest`` tokens, whose queries vote on the others, max-pooled over neighbours.

        importance[j] = max over |j' - j| ≤ pool / 2 of Σ_(i in window) Σ_g p_i[g, j']

    Window 32, pooling by maxima over 7 as in the paper's experiments on LongBench; the official code's defaults and
    kvpress's pool by means over 5. The query heads of a KV head vote together (mean), as in kvpress and Ada-KV's code.

    The paper compresses a prompt once and keeps all that is generated. Here, under a fixed number of rows, a
    compaction follows after every S tokens, and the queries since the last one are its observation window.
    Neighbours are then rows next to each other, whose positions may be apart.
    """

    pool: int = 7
    newest: int = 32

    @property
    def window(self) -> int | None:
        """The observation window of a prompt."""
        return self.newest

    def compacted(self, before: State, after: State) -> State:
        """Votes begin anew."""
        return after._replace(scores=Scores.zeros_like(after.scores))
