"""Grades of logits: the loss of tokens that were to come, and whether greedy decoding would have given them."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .prefilled import continue_
from .subject import Subject

Array = npt.NDArray[np.float64]


def losses(logits: mx.array, targets: Sequence[int]) -> Array:
    """-log p of each target [n], in nats, from logits [n, V]."""
    chosen = mx.take_along_axis(logits, mx.array(list(targets))[:, None], axis=-1)[:, 0]
    return np.array(mx.logsumexp(logits, axis=-1) - chosen, np.float64)


def divergences(logits: mx.array, reference: mx.array) -> Array:
    """KL(reference ‖ logits) of each of n distributions, in nats, from logits [n, V]."""
    ours, theirs = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (logits, reference))
    return np.array((mx.exp(theirs) * (theirs - ours)).sum(axis=-1), np.float64)


@dataclass(frozen=True)
class Question:
    """Tokens that follow a prompt, some of which are an answer.

    Attributes:
        kind: what sort of question it is.
        tokens: the question and the answer.
        scored: indices of the answer's tokens; words between its parts are given.
        depth: where the fact stands in the prompt, as a share of it; ``None`` for several facts.
    """

    kind: str
    tokens: tuple[int, ...]
    scored: tuple[int, ...]
    depth: float | None = None


@dataclass(frozen=True)
class Grade:
    """Loss of an answer, in nats a token, and whether greedy decoding gives it exactly."""

    loss: float
    exact: bool


def graded(subject: Subject, caches: list[object], question: Question) -> Grade:
    """The grade of a question that is asked of caches, which take it.

    One call shows both: greedy decoding gives an answer if and only if each of its tokens is the most
    likely one after those before it.
    """
    logits = continue_(subject.model, caches, question.tokens[:-1])
    where = mx.array([i - 1 for i in question.scored])
    targets = [question.tokens[i] for i in question.scored]
    logits = logits[where]
    best = np.array(logits.argmax(axis=-1)).tolist()
    return Grade(float(losses(logits, targets).mean()), best == targets)
