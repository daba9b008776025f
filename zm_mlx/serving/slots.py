"""How many sequences the memory for KV caches holds: known before the first request, because none of them grows."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import MemoryGuardError, UnsupportedModelError, UserError
from ..host.beside import Beside, log_bytes
from ..host.cache import ZeroMergeCache
from ..host.guard import Load, guard
from ..host.memory import free_bytes
from ..host.model_caches import members
from ..host.part import least, most
from ..host.plan import Plan, context_of
from ..host.remedies import with_rows
from ..phases import PIECE
from ..report import size

MB = 10**6
TRIES = 4  # of a smaller memory, before one is named


@dataclass(frozen=True)
class Cost:
    """Bytes.

    Args:
        sequence: of all caches of one sequence, a draft model's too.
        piece: what a sequence takes on top while its prompt is read, or while drafts can be taken back.
        store: of the largest layer, which a compaction holds twice for a moment.
    """

    sequence: int
    piece: int
    store: int


@dataclass(frozen=True)
class Slots:
    """How ``memory`` bytes are used: ``total`` sequences and snapshots, ``prompts`` of which are read at a time."""

    memory: int
    cost: Cost
    total: int
    prompts: int

    @property
    def used(self) -> int:
        """Bytes of ``memory`` that are ever in use."""
        return self.total * self.cost.sequence + self.prompts * self.cost.piece + self.cost.store

    @classmethod
    def of(cls, memory: int, cost: Cost, prompts: int, most: int) -> "Slots":
        """As many slots as fit, ``most`` at most, and as many prompts at a time as asked for, or fewer with few slots.

        The total is 0 where not even one sequence fits.
        """
        for count in range(prompts, 0, -1):
            total = (memory - count * cost.piece - cost.store) // cost.sequence
            if total >= count or count == 1:
                return cls(memory, cost, max(0, min(total, most)), count)
        raise ValueError(f"prompts must be 1 or more, not {prompts}")


def measure(model: nn.Module, plan: Plan, caches: Sequence[Any], beside: Beside | None = None) -> tuple[Cost, int]:
    """What a sequence costs, on the rank where it costs the most, and the size of the model's vocabulary.

    Args:
        caches: empty ones of the plan; they are used up.
        beside: the draft.

    Raises:
        UnsupportedModelError: a cache cannot be part of a batch.
    """
    for cache in members(caches):
        if not hasattr(cache, "merge"):
            raise UnsupportedModelError(f"it has a {type(cache).__name__}, which cannot be served in a batch")
    logits = model(mx.array([[0]]), cache=caches)  # its shape is known without its values
    others = sum(int(c.nbytes) for c in members(caches) if not isinstance(c, ZeroMergeCache))
    found = _cost(plan, max(others, plan.other_bytes), beside)
    cost = Cost(most(model, found.sequence), most(model, found.piece), most(model, found.store))
    return cost, int(logits.shape[-1])


def _cost(plan: Plan, others: int, beside: Beside | None) -> Cost:
    """What a sequence costs whose bounded caches of mlx-lm take ``others`` bytes."""
    store = max(a.nbytes(s) for a, s in zip(plan.layouts, plan.shapes, strict=True))
    own = None if beside is None else beside.plan_beside(plan)
    if beside is None or own is None:
        return Cost(plan.nbytes + others, plan.piece_bytes, store)
    log = log_bytes(plan, beside.count) + log_bytes(own, beside.count)
    return Cost(plan.nbytes + own.nbytes + others, max(plan.piece_bytes + own.piece_bytes, log), store)


def require(plan: Plan, slots: Slots, beside: Beside | None = None) -> None:
    """Refuse a budget of which not one sequence fits.

    Raises:
        UserError: the message names the largest that works.
    """
    if slots.total >= 1:
        return
    cost, policy = slots.cost, plan.policy
    others = cost.sequence - _cost(plan, 0, beside).sequence

    def need(rows: int) -> int:
        found = _cost(with_rows(plan, rows), others, beside)
        return found.sequence + found.piece + found.store

    tried = range(policy.smallest, max(n for a in plan.layouts for n in a.rows) + 1)
    fit = bisect_right(tried, slots.memory, key=need)
    asked = f"--max-kv-memory {size(slots.memory)} does not hold one sequence of this budget, which takes"
    whole = size(cost.sequence + cost.piece + cost.store)
    if not fit:
        raise UserError(f"{asked} {whole}; the smallest one takes {size(need(policy.smallest))}")
    raise UserError(f"{asked} {whole} while its prompt is read: the largest that works is --kv-budget {tried[fit - 1]}")


def require_memory(
    model: nn.Module, plan: Plan, slots: Slots, step: int, force: bool, beside: Beside | None = None
) -> None:
    """Refuse what this machine cannot hold with all slots in use and as many prompts read as there may be.

    Args:
        step: tokens of each prompt in one call of the model.
        beside: the draft.

    Raises:
        MemoryGuardError: the message names what would fit.
    """
    room = least(model, free_bytes(reserve=0))
    rows = most(model, max(n for layout in plan.layouts for n in layout.rows)) + 2 * PIECE

    def need(tried: Slots) -> int:
        tokens = min(rows, context_of(model) or rows)  # longer prompts take no more
        return guard(model, plan, Load(tokens, step, tried.total, tried.prompts), force=True, beside=beside).new

    if force or room is None or (new := need(slots)) <= room:
        return
    fewer, remedy = slots, "a smaller --prefill-step-size or --prompt-concurrency takes less"
    for _ in range(TRIES):
        memory = (fewer.used - (need(fewer) - room)) // MB * MB
        fewer = Slots.of(memory, slots.cost, slots.prompts, slots.total)
        if not fewer.total:
            break
        if need(fewer) <= room:
            remedy = f"--max-kv-memory {memory // MB}MB fits"
            break
    raise MemoryGuardError(
        f"{slots.total} slots and reading {slots.prompts} prompts at a time would take {size(new)} beside the model, "
        f"and {size(room)} are free here: {remedy}; --force starts all the same"
    )
