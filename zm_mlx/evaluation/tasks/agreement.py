"""How far a compressed cache's computation is from the full cache's.

- KL(full ‖ compressed) of the next token's distribution, on the first 128 tokens that follow the prompt in its text;
- the relative error ‖o − o_full‖ / ‖o_full‖ of each layer's attention output on the same tokens: every layer gets the
  queries, keys and values that the model computed with full caches, so errors do not add up over layers (the measure
  that the ZeroMerge paper, arXiv 2503.10714, compares compensation by);
- the first of the full cache's 64 greedy tokens that a compressed cache would not have given, with those before it
  given (64 if it gives them all).

Traps: greedy text of small models repeats itself, which any cache can continue; one early tie makes a first
divergence of a cache that is as good. Outputs of layers whose error is large may hardly matter to the model.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..caches import Contender
from ..grading import divergences
from ..observing import Observed, observe, replayed
from ..prefilled import continue_, fork
from ..subject import Subject
from ..task import Exam, Item, Metric, Values, mean
from .continuation import split

TEXT = 128  # tokens of the text's continuation
GREEDY = 64  # tokens of the full cache's own


class Agreement:
    """The task."""

    name = "agreement"
    version = 2
    metrics = (
        Metric("kl", "KL of the next token (nats)"),
        Metric("attention", "relative error of attention"),
        Metric("divergence", f"first divergence (of {GREEDY} tokens)", lower=False),
    )

    def items(self, items: Sequence[Item]) -> Sequence[Item]:
        return items

    def exam(self, subject: Subject, item: Item) -> Exam:
        return _Exam(subject, item)


class _Exam:
    def __init__(self, subject: Subject, item: Item) -> None:
        self.model = subject.model
        prompt, following = split(subject, item)
        self.prompted = subject.prompted(prompt[:-1])
        self.text = [prompt[-1], *following[: TEXT - 1]]
        self.logits, self.observed = observe(self.prompted, self.text)
        self.greedy = self._greedy(prompt[-1])

    def _greedy(self, last: int) -> list[int]:
        """The prompt's last token and what the full cache says after it."""
        caches, tokens = self.prompted.caches(Contender("full")), [last]
        for _ in range(GREEDY):
            tokens += np.array(continue_(self.model, caches, tokens[-1:]).argmax(axis=-1)).tolist()
        return tokens

    def measure(self, contender: Contender) -> Values:
        caches = self.prompted.caches(contender)
        kl = divergences(continue_(self.model, fork(caches), self.text), self.logits)
        guess = continue_(self.model, fork(caches), self.greedy[:-1]).argmax(axis=-1)
        differs = np.flatnonzero(np.array(guess) != np.array(self.greedy[1:]))
        outputs = replayed(self.prompted, caches, self.observed)
        errors = [relative_error(one, out) for one, out in zip(self.observed, outputs, strict=True)]
        layers = {f"attention {i}": e for i, e in enumerate(errors)}
        first = float(differs[0]) if differs.size else float(GREEDY)
        return {"kl": float(kl.mean()), "attention": mean(errors), "divergence": first, **layers}


def relative_error(observed: Observed, output: mx.array) -> float:
    """Mean over tokens of ‖o − o_full‖ / ‖o_full‖, over all heads together, of outputs [1, Hq, n, Dv]."""
    theirs = observed.output.astype(mx.float32)
    off = mx.sqrt(((output.astype(mx.float32) - theirs) ** 2).sum(axis=(1, 3)))
    size = mx.maximum(mx.sqrt((theirs**2).sum(axis=(1, 3))), 1e-12)
    return float(np.array((off / size).mean()))
