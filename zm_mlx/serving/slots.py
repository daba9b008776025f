"""How many sequences the memory for KV caches holds: known before the first request, because none of them grows."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..budget import total_bytes
from ..errors import UnsupportedModelError, UserError
from ..host.cache import ZeroMergeCache
from ..host.model_caches import members
from ..host.plan import Plan
from ..report import size


@dataclass(frozen=True)
class Cost:
    """Bytes.

    Args:
        sequence: of all caches of one sequence.
        piece: what a sequence takes on top while its prompt is read.
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

    @classmethod
    def of(cls, memory: int, cost: Cost, prompts: int) -> "Slots":
        """As many slots as fit, with as many prompts at a time as asked for, or fewer where slots are few.

        The total is 0 where not even one sequence fits.
        """
        for count in range(prompts, 0, -1):
            total = (memory - count * cost.piece - cost.store) // cost.sequence
            if total >= count or count == 1:
                return cls(memory, cost, max(0, total), count)
        raise ValueError(f"prompts must be 1 or more, not {prompts}")


def measure(model: nn.Module, plan: Plan, caches: Sequence[Any]) -> tuple[Cost, int]:
    """What a sequence costs, and the size of the model's vocabulary.

    Args:
        caches: empty ones of the plan; they are used up.

    Raises:
        UnsupportedModelError: a cache cannot be part of a batch.
    """
    for cache in members(caches):
        if not hasattr(cache, "merge"):
            raise UnsupportedModelError(f"it has a {type(cache).__name__}, which cannot be served in a batch")
    logits = model(mx.array([[0]]), cache=caches)  # its shape is known without its values
    others = sum(int(c.nbytes) for c in members(caches) if not isinstance(c, ZeroMergeCache))
    cost = Cost(
        sequence=plan.nbytes + max(others, plan.other_bytes),
        piece=plan.piece_bytes,
        store=max(a.nbytes(s) for a, s in zip(plan.layouts, plan.shapes, strict=True)),
    )
    return cost, int(logits.shape[-1])


def require(plan: Plan, slots: Slots) -> None:
    """Refuse a budget of which not one sequence fits.

    Raises:
        UserError: the message names the largest that works.
    """
    if slots.total >= 1:
        return
    cost, policy = slots.cost, plan.policy
    others = cost.sequence - plan.nbytes + cost.piece

    def need(rows: int) -> int:
        layouts = policy.layouts(rows, [s.heads for s in plan.shapes])
        store = max(a.nbytes(s) for a, s in zip(layouts, plan.shapes, strict=True))
        return total_bytes(layouts, plan.shapes) + store + others

    tried = range(policy.smallest, max(n for a in plan.layouts for n in a.rows) + 1)
    fit = bisect_right(tried, slots.memory, key=need)
    asked = f"--max-kv-memory {size(slots.memory)} does not hold one sequence of this budget, which takes"
    whole = size(cost.sequence + cost.piece + cost.store)
    if not fit:
        raise UserError(f"{asked} {whole}; the smallest one takes {size(need(policy.smallest))}")
    raise UserError(f"{asked} {whole} while its prompt is read: the largest that works is --kv-budget {tried[fit - 1]}")
