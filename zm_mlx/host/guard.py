"""The memory guard: whether this machine has what a prompt will take at its peak.

It judges prompts, not the tokens generated after them: in a cache of fixed size those take no more.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from ..errors import MemoryGuardError
from ..phases import PIECE
from .beside import Beside, How
from .caches import CacheSet, zeromerge
from .memory import free_bytes
from .model_caches import zero_merge
from .part import least, most
from .plan import AS_ASKED, Plan
from .predicting import Load, Prediction, bound, caches_alone, predict
from .probe import probe
from .remedies import SMALLEST_STEP, remedies, shorter

__all__ = ["Beside", "Load", "Prediction", "guard", "settled"]

FAR = 2  # times as much is free as a bound says: nothing needs to be measured
NAMED = 0.97  # of what is free, which changes until a remedy is tried


def guard(model: nn.Module, plan: Plan, load: Load, force: bool = False, beside: Beside | None = None) -> Prediction:
    """What a load will take at its peak; call it in the thread that uses the model, before anything is allocated.

    Nothing is measured where far more is free than it could be. With a draft, of what both models take.

    Raises:
        MemoryGuardError: more than is free here, and not ``force``. The message names what would fit.
    """
    return _Judge(model, beside).require(plan, load, force)


def settled(
    model: nn.Module, caches: CacheSet, tokens: int, step: int, force: bool = False, beside: Beside | None = None
) -> CacheSet:
    """``guard`` for the caches of one prompt: those of this package, with nothing allocated or of a saved prompt.

    Returns:
        The caches, with what was predicted; where exact was chosen and does not fit, others that stream.

    Raises:
        MemoryGuardError: as ``guard``.
    """
    if caches.kind != "zeromerge":
        return caches
    judge = _Judge(model, beside)
    plan = caches.plan or _plan_of(model, caches)
    load = Load(tokens, step, held=caches.nbytes, seen=caches.before)
    if plan.prefill == "exact" and plan.prefill_reason != AS_ASKED and judge.over(plan, load):
        why = "the whole prompt would not leave enough memory to read it"
        caches = zeromerge(model, replace(plan, prefill="streaming", prefill_reason=why))
        plan = caches.plan or plan
    found = judge.require(plan, load, force)
    caches.predicted = found.peak if found.measured else None
    return caches


def _plan_of(model: nn.Module, caches: CacheSet) -> Plan:
    """What the caches of a saved prompt follow."""
    own = zero_merge(caches.every)
    exact = own[0].remaining
    return Plan(
        layouts=tuple(c.layout for c in own),
        shapes=tuple(probe(model)),
        policy=own[0].policy,
        prefill="streaming" if exact is None else "exact",
        prompt_length=exact,
        budget_reason="",
        prefill_reason=AS_ASKED,
        heads_reason="",
    )


class _Judge:
    """A model on this machine as it is now, and its draft."""

    def __init__(self, model: nn.Module, beside: Beside | None = None) -> None:
        mx.eval(model.parameters())
        mx.clear_cache()
        self.model = model
        self.beside = beside
        self.room = least(model, free_bytes(reserve=0))
        self._known: dict[tuple[Plan, Load], Prediction] = {}

    def require(self, plan: Plan, load: Load, force: bool) -> Prediction:
        found = self.prediction(plan, load)
        if self.room is None or found.new <= self.room or force:
            return found
        what = f"the prompt of {load.prompt_tokens} tokens" if load.sequences == 1 else f"{load.sequences} sequences"
        room = int(NAMED * self.room)
        fits = remedies(lambda p, x: self.prediction(p, x).new, plan, load, room, lambda n: least(self.model, n) or n)
        help = f"what fits: {' or '.join(fits)}" if fits else "no smaller budget or step fits either"
        raise MemoryGuardError(
            f"{what} would take {found.new / 1e9:.3f} GB beside the model ({found.caches / 1e9:.3f} GB for the KV "
            f"cache), and {self.room / 1e9:.3f} GB are free here; {help}; --force tries it all the same"
        )

    def over(self, plan: Plan, load: Load) -> bool:
        """Whether more is needed than is free."""
        return self.room is not None and self.prediction(plan, load).new > self.room

    def prediction(self, plan: Plan, load: Load) -> Prediction:
        """Measured, unless that could change nothing, or might itself take more than is free."""
        above, held = self._bound(plan, load), self._said(_alone, plan, load)
        if self.room is None or FAR * above.new < self.room:
            return above
        if held.new > self.room:
            return held
        steps = [load.whole_step]
        while steps[0] > SMALLEST_STEP and self._bound(plan, replace(load, step=steps[0])).new > self.room:
            steps.insert(0, shorter(steps[0]))
        if len(steps) == 1:
            return self._measured(plan, load)
        return self._climb(plan, [replace(load, step=step) for step in (shorter(steps[0]), *steps)], self.room)

    def _climb(self, plan: Plan, loads: Sequence[Load], room: int) -> Prediction:
        """Of the last load, whose calls are the longest; each other one has about half the length of the next.

        The shortest are measured first, and each next one if what it takes will fit, by a line through the last two: it
        grows with the length of calls, and hardly ever faster. Measuring what does not fit might end the process.
        """
        for short, load, longer in zip(loads, loads[1:], loads[2:], strict=False):
            expected = self._expected(plan, short, load, longer)
            if expected.new > room:  # on a busy machine more runs ahead than elsewhere, and is measured along
                self._measure_again(plan, (short, load))
                expected = self._expected(plan, short, load, longer)
            if expected.new > room:
                return expected
        return self._measured(plan, loads[-1])

    def _expected(self, plan: Plan, short: Load, load: Load, longer: Load) -> Prediction:
        """Of ``longer``, by a line through what the two shorter ones take."""
        before, now = self._measured(plan, short), self._measured(plan, load)
        more = max(0, 2 * (now.reading - before.reading))
        if plan.prefill == "streaming" and PIECE % longer.step and not PIECE % load.step:
            more = max(more, now.reading)  # pieces end inside of calls from here on, which hold two of them
        return replace(now, reading=now.reading + more, measured=False)

    def _measured(self, plan: Plan, load: Load) -> Prediction:
        """Each once: remedies ask again."""
        if (plan, load) not in self._known:
            self._known[plan, load] = self._said(predict, plan, load)
        return self._known[plan, load]

    def _measure_again(self, plan: Plan, loads: Sequence[Load]) -> None:
        """Know the less of two measurements of each."""
        for load in loads:
            known, found = self._measured(plan, load), self._said(predict, plan, load)
            self._known[plan, load] = min(known, found, key=lambda x: x.new)

    def _bound(self, plan: Plan, load: Load) -> Prediction:
        return self._said(bound, plan, load)

    def _said(self, how: How, plan: Plan, load: Load) -> Prediction:
        """The most that any rank of the model says: all go on alike, or one refuses and the others wait for ever."""
        if self.beside is None:
            found = how(self.model, plan, load)
        else:
            found = self.beside.together(how, self.model, plan, load)
        return replace(found, caches=most(self.model, found.caches), reading=most(self.model, found.reading))


def _alone(_: nn.Module, plan: Plan, load: Load) -> Prediction:
    return caches_alone(plan, load)
