"""The budget of a model that is split: the same rows on all ranks as in one process."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..budget import Budget, Request, resolve, total_bytes
from ..policies import Policy
from ..state.layout import LayerShape, Layout
from . import ranks
from .heads import Sharing
from .part import Part

Share = Callable[[tuple[Layout, ...]], Sharing]  # from uniform layouts to those of a table, where there is one


def shared(
    part: Part | None, budget: Budget, shapes: Sequence[LayerShape], policy: Policy, request: Request, share: Share
) -> tuple[Sharing, str]:
    """Layouts of the whole model, and where their number of rows comes from.

    Bytes are those of each rank, and so is what memory allows: the rank that can have the fewest rows decides.

    Args:
        shapes: of the layers that are here.
        request: as far as this rank knows it.
    """
    if part is None or budget.kind == "table":
        found = resolve(budget, shapes if part is None else part.whole, policy, request)
        whole = Sharing(found.layouts, found.reason) if budget.kind == "table" else share(found.layouts)
        return whole, found.reason
    rows, reason = _fewest(budget, shapes, policy, request)
    while True:
        whole = _by_first(part, share, policy.layouts(rows, [s.heads for s in part.whole]))
        if budget.kind != "bytes" or rows <= policy.smallest:
            return whole, reason
        # The layers and heads of one rank may get more rows than those of the others.
        taken = total_bytes(part.of(whole.layouts), shapes) + request.other_bytes
        over = _largest(taken) / budget.value
        if over <= 1:
            return whole, reason
        rows = max(policy.smallest, min(rows - 1, int(rows / over)))


def tightest(part: Part | None, need: int, free: int | None) -> tuple[int, int | None]:
    """Of the bytes that ranks need and have, those of the rank with the least to spare."""
    if part is None:
        return need, free
    told = ranks.together(lambda: (need, free))
    found = min(told, key=lambda one: float("inf") if one[1] is None else one[1] - one[0])
    return found[0], found[1]


def _largest(number: int) -> int:
    return max(ranks.together(lambda: number))


def _fewest(budget: Budget, shapes: Sequence[LayerShape], policy: Policy, request: Request) -> tuple[int, str]:
    """The fewest rows per head that any rank finds, and why."""

    def here() -> tuple[int, str]:
        found = resolve(budget, shapes, policy, request)
        return found.rows or 0, found.reason

    told = ranks.together(here)
    rows, reason = min(told, key=lambda one: one[0])
    if any(n != rows for n, _ in told):
        reason += f", least on rank {next(i for i, one in enumerate(told) if one[0] == rows)}"
    return rows, reason


def _by_first(part: Part, share: Share, uniform: tuple[Layout, ...]) -> Sharing:
    """How rank 0 shares out rows among the heads of the whole model: others may not have the table that it has."""

    def here() -> Any:
        if part.rank:
            return None
        found = share(uniform)
        return [a.context for a in found.layouts], found.reason, found.complaints

    contexts, reason, complaints = ranks.together(here)[0]
    layouts = tuple(replace(a, context=tuple(c)) for a, c in zip(uniform, contexts, strict=True))
    return Sharing(layouts, reason, tuple(complaints))
