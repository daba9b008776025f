"""Expected attention (Devoto et al. 2025, arXiv 2510.00636): attention of queries to come, from their distribution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from ..state.layout import Group, Layout
from ..state.mixed import numbers_of
from ..state.rows import Dense
from ..state.state import Scores, State, joined, rectangle
from . import allocation
from .windowed import Windowed


class Queries(NamedTuple):
    """Distribution of a layer's queries to come, as rotated on average and scaled.

    mean [H, G, D] and covariance [H, G, D, D], float32, in the model's order of heads.
    """

    mean: mx.array
    covariance: mx.array


@dataclass(frozen=True)
class ExpectedAttention(Windowed):
    """Keeps the tokens that normally distributed queries would attend to, times the norm of their values.

        â[g, j] = softmax_j (μ_g · k_j + ½ k_jᵀ Σ_g k_j),   importance[j] = (mean_g â[g, j] + ε) ‖v_j‖₂

    μ and Σ are of the prompt's queries before rotation, without the first 4, rotated by the average rotation of
    the 512 positions to come and scaled; the first 4 tokens stay. The heads of a layer share their rows as in Ada-KV.
    All this is kvpress's evaluation of it, ``AdaKVPress(ExpectedAttentionPress(epsilon=0.01))``; the paper
    has ‖W_O v‖ and ε = 0.02.

    Where this departs from both: the distribution is that of the prompt for good, also while decoding, where
    kvpress takes the last queries; and S tokens are staged, and the newest one always stays.

    Args:
        epsilon: ε.
        sinks: first tokens that stay.
        safeguard: the share of rows that all heads of a layer have alike.
        queries: the distribution, which ``zm_mlx.evaluation.expected`` finds; one policy a layer has its own.
    """

    epsilon: float = 0.01
    sinks: int = 4
    safeguard: float = 0.2
    queries: Queries | None = field(default=None, compare=False)
    numbers: ClassVar[bool] = True
    needs: ClassVar[str | None] = "the distribution of the prompt's queries"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("epsilon", math.inf), ("sinks", math.inf), ("safeguard", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be between 0 and {most}, not {getattr(self, name)!r}")

    @property
    def window(self) -> int | None:
        """The prompt's attention decides nothing, so one query is enough."""
        return 1

    def importance(self, state: State, layout: Layout) -> Scores:
        """The formula for all rows.

        Raises:
            ValueError: there is no distribution of queries.
        """
        if self.queries is None:
            raise ValueError(f"expected attention needs {self.needs}")
        kept, recent = [], []
        for group in layout.groups:
            of_group = self._group(group, state, layout, self.queries)
            kept.append(of_group[:, :, : group.rows])
            recent.append(of_group[:, :, group.rows :])
        return Scores(joined(kept), mx.concatenate(recent, axis=1))

    def fitted(self, layouts: Sequence[Layout], importance: Sequence[mx.array]) -> tuple[Layout, ...]:
        """As ``Policy.fitted``, each layer for itself."""
        pairs = zip(layouts, importance, strict=True)
        return tuple(allocation.safeguarded(a, x, self.safeguard) for a, x in pairs)

    def _group(self, group: Group, state: State, layout: Layout, queries: Queries) -> mx.array:
        """Importance of a group's kept and recent rows [B, h, rows + n]."""
        heads = slice(group.first_head, group.stop_head)
        order = mx.array(layout.order[heads])
        rows = Dense.joined(
            [numbers_of(x) for x in (state.kept.of(group).rows, state.recent.map(lambda x: x[:, heads]))], axis=2
        )
        weight, position = rectangle(state.kept.weight, group), rectangle(state.kept.position, group)
        recent = mx.arange(state.recent_rows)
        behind = (*weight.shape[:2], state.recent_rows)
        there = mx.concatenate([weight > 0, mx.broadcast_to(recent < state.filled, behind)], axis=2)
        position = mx.concatenate([position, mx.broadcast_to(recent + state.departed, behind)], axis=2)
        first = there & (position < self.sinks)
        keys = rows.keys.astype(mx.float32)[:, :, None]  # [B, h, 1, n, D]
        mean, covariance = queries.mean[order][None], queries.covariance[order][None]
        logits = (keys @ mean[..., None] + 0.5 * ((keys @ covariance) * keys).sum(axis=-1, keepdims=True))[..., 0]
        expected = mx.softmax(mx.where((there & ~first)[:, :, None], logits, -mx.inf), axis=-1).mean(axis=2)
        worth = (expected + self.epsilon) * mx.linalg.norm(rows.values.astype(mx.float32), axis=-1)
        return mx.where(first, mx.inf, worth)

    def as_dict(self) -> dict[str, Any]:
        """The settings without the distribution, which is no setting."""
        return {name: value for name, value in vars(self).items() if name != "queries"}
