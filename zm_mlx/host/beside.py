"""What a draft model takes beside the model that it drafts for: for the memory guard, and for a server's slots."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.nn as nn

from .plan import Plan
from .predicting import Load, Prediction
from .remedies import with_rows

How = Callable[[nn.Module, Plan, Load], Prediction]


@dataclass(frozen=True)
class Beside:
    """A draft model, loaded, and its caches.

    Args:
        model: the draft model; ``None`` where drafts come without one.
        plan: of its caches; ``None`` where they are full ones, which grow.
        count: tokens proposed at a time, at most.
        held: bytes of its caches that exist already.
        answer: tokens after the prompt, at most; ``None`` without a limit.
    """

    model: nn.Module | None
    plan: Plan | None
    count: int
    held: int = 0
    answer: int | None = None

    def together(self, how: How, main: nn.Module, plan: Plan, load: Load) -> Prediction:
        """What both models take, as ``how`` says it of each.

        Both read a part of the prompt in turn, and while one does the other holds its own part. Nothing can be taken
        back while a prompt is read, so the states that are held for this come in the place of that.
        """
        found = how(main, plan, load)
        own = self.plan_beside(plan)
        if own is None or self.model is None:
            return replace(found, reading=max(found.reading, self._log(plan, load)))
        other = how(self.model, own, replace(load, held=self.held))
        held = load.prompts * (plan.full_bytes(load.prompt_tokens) if plan.prefill == "exact" else plan.piece_bytes)
        return Prediction(
            active=found.active,
            caches=found.caches + other.caches,
            reading=max(
                found.reading + load.prompts * own.piece_bytes,
                other.reading + held,
                self._log(plan, load) + self._log(own, load),
            ),
            measured=found.measured and other.measured,
        )

    def _log(self, plan: Plan, load: Load) -> int:
        """Bytes that are held to take drafts back: none where all tokens fit, for nothing is compacted then."""
        fits = self.answer is not None and load.seen + load.prompt_tokens + self.answer <= plan.capacity
        return 0 if fits else load.prompts * log_bytes(plan, self.count)

    def plan_beside(self, plan: Plan) -> Plan | None:
        """The plan of the draft model's caches beside another one of the model's: with as many rows on average."""
        return None if self.plan is None else with_rows(self.plan, rows_beside(plan))


def rows_beside(plan: Plan) -> int:
    """Rows per head of a draft model's caches beside a plan's: as many as its heads have on average."""
    rows = [n for layout in plan.layouts for n in layout.rows]
    return sum(rows) // len(rows)


def log_bytes(plan: Plan, count: int) -> int:
    """Bytes of the states that caches hold beside their own in a scope of ``rollback``, at most.

    At most 2 ``count`` + 2 tokens can be taken back, and each compaction among them makes another store (method.md 5).
    """
    staging = min(layout.staging for layout in plan.layouts)
    return plan.nbytes * (1 + (2 * count + 1) // staging)
