"""Questions that are asked of a compressed prompt, each of a copy of its caches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .caches import Contender
from .grading import Grade, Question, graded
from .prefilled import Prompted, continue_, fork
from .subject import Subject
from .task import Metric, Values, mean

METRICS = (
    Metric("loss", "loss of answers above full (nats a token)"),
    Metric("exact", "exact match", lower=False),
)


class Asking:
    """An exam of questions about one prompt.

    Args:
        prompted: the prompt, or its first part.
        questions: asked one by one.
        later: tokens that the caches take under their cap, after ``prompted`` and before the questions.
        share: of ``prompted`` in all that is there before the questions; budgets are shares of all that.
    """

    def __init__(
        self,
        subject: Subject,
        prompted: Prompted,
        questions: Sequence[Question],
        later: Sequence[int] = (),
        share: float = 1.0,
    ) -> None:
        self.subject, self.prompted, self.questions = subject, prompted, questions
        self.later, self.share = later, share
        self.full = self._grades(Contender("full"))

    def measure(self, contender: Contender) -> Values:
        found = self.full if contender.name == "full" else self._grades(contender)
        return summary(self.questions, found, self.full)

    def _grades(self, contender: Contender) -> list[Grade]:
        caches = self._caches(contender)
        return [graded(self.subject, fork(caches), q) for q in self.questions]

    def _caches(self, contender: Contender) -> list[Any]:
        caches = self.prompted.caches(replace(contender, budget=min(1.0, contender.budget / self.share)))
        if self.later:
            continue_(self.subject.model, caches, self.later)
        return caches


def summary(questions: Sequence[Question], found: Sequence[Grade], full: Sequence[Grade]) -> Values:
    """Means of loss above full and of exact answers: over all questions, for each kind, for each depth."""
    groups: dict[str, list[int]] = {"": []}
    for i, q in enumerate(questions):
        groups[""].append(i)
        groups.setdefault(f"{q.kind} ", []).append(i)
        if q.depth is not None:
            groups.setdefault(f"depth {100 * q.depth:.0f} ", []).append(i)
    values: Values = {}
    for name, members in groups.items():
        values[f"{name}loss"] = mean([found[i].loss - full[i].loss for i in members])
        values[f"{name}exact"] = mean([float(found[i].exact) for i in members])
    return {**values, "nll": mean([g.loss for g in found])}
