"""The budget of a model that is split: the same rows per head on all ranks, as in one process."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..budget import Budget, Request, Resolved, resolve
from ..policies import Policy
from ..state.layout import LayerShape, Layout
from . import ranks
from .heads import Sharing
from .part import Part


def resolved(
    part: Part | None, budget: Budget, shapes: Sequence[LayerShape], policy: Policy, request: Request
) -> Resolved:
    """Layouts of the whole model, with the fewest rows per head that any rank finds.

    Bytes are those of each rank, so each resolves them for its own ``shapes``.
    """
    if part is None:
        return resolve(budget, shapes, policy, request)
    if budget.kind == "table":
        return resolve(budget, part.whole, policy, request)

    def here() -> tuple[int, str]:
        found = resolve(budget, shapes, policy, request)
        return found.rows or 0, found.reason

    told = ranks.together(here)
    rows, reason = min(told, key=lambda one: one[0])
    if any(n != rows for n, _ in told):
        reason += f", least on rank {next(i for i, one in enumerate(told) if one[0] == rows)}"
    return Resolved(policy.layouts(rows, [s.heads for s in part.whole]), reason, rows)


def shared_out(part: Part | None, share: Callable[[], Sharing], uniform: Sequence[Layout]) -> Sharing:
    """How rank 0 shares out rows among the heads of the whole model: others may not have the table that it has."""
    if part is None:
        return share()

    def here() -> Any:
        if part.rank:
            return None
        found = share()
        return [a.context for a in found.layouts], found.reason, found.complaints

    contexts, reason, complaints = ranks.together(here)[0]
    layouts = tuple(replace(a, context=tuple(c)) for a, c in zip(uniform, contexts, strict=True))
    return Sharing(layouts, reason, tuple(complaints))


def tightest(part: Part | None, need: int, free: int | None) -> tuple[int, int | None]:
    """Of the bytes that ranks need and have, those of the rank with the least to spare."""
    if part is None:
        return need, free
    told = ranks.together(lambda: (need, free))
    found = min(told, key=lambda one: float("inf") if one[1] is None else one[1] - one[0])
    return found[0], found[1]
