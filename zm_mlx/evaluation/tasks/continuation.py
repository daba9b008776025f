"""The loss of a text's continuation after a compressed prompt.

256 tokens follow the prompt; they are taken by the cache under its cap, so that late ones see what was evicted
meanwhile. Reported is the loss in nats a token above the full cache's on the same tokens, by position too.

Traps: a text is mostly predicted from the tokens just before, so differences are small and a window does well,
the better the fewer the rows. The first positions show what the prompt's compression kept, the last ones what
decoding under the cap keeps. All caches take the continuation in one block, as they would token by token: a
block must neither hide mlx-lm's first tokens (``evaluation.window``) nor pass for a further prompt.
"""

from collections.abc import Sequence

from ..caches import Contender
from ..grading import Array, losses
from ..prefilled import continue_
from ..subject import Subject
from ..task import ROOM, Exam, Item, Metric, Values

PARTS = ((0, 32), (32, 128), (128, ROOM))  # of the continuation, by position


class Continuation:
    """The task."""

    name = "continuation"
    version = 2
    metrics = (Metric("loss", "loss above full (nats a token)"),)

    def items(self, items: Sequence[Item]) -> Sequence[Item]:
        return items

    def exam(self, subject: Subject, item: Item) -> Exam:
        return _Exam(subject, item)


class _Exam:
    def __init__(self, subject: Subject, item: Item) -> None:
        self.subject = subject
        prompt, self.next = split(subject, item)
        self.last, self.prompted = prompt[-1], subject.prompted(prompt[:-1])
        self.full = self._losses(Contender("full"))

    def _losses(self, contender: Contender) -> Array:
        caches = self.prompted.caches(contender)
        return losses(continue_(self.subject.model, caches, [self.last, *self.next[:-1]]), self.next)

    def measure(self, contender: Contender) -> Values:
        found = self.full if contender.name == "full" else self._losses(contender)
        above = found - self.full
        parts = {f"loss {begin + 1}-{end}": float(above[begin:end].mean()) for begin, end in PARTS}
        return {"loss": float(above.mean()), "nll": float(found.mean()), **parts}


def split(subject: Subject, item: Item) -> tuple[list[int], list[int]]:
    """The prompt, of ``item.prompt_tokens`` tokens, and the ``ROOM`` tokens that follow it."""
    tokens = [*subject.begin, *item.window()][: item.prompt_tokens + ROOM]
    return tokens[: item.prompt_tokens], tokens[item.prompt_tokens :]
