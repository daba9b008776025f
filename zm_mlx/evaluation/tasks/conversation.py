"""A fact from the first turn of a conversation, asked for in the eighth, under one cap.

The first turn is a text with six facts between its lines; pieces of text follow as answers and further turns, a
quarter of all tokens. The cache compresses the first turn and takes everything after it under the cap, which is a
share of the whole conversation's bytes. Then each fact is asked for, of a copy. Turns go through the model's chat
template, where it has one.

Traps: after the first turn caches take tokens as in decoding, so methods that score a whole prompt at its end have
only their behaviour in decoding left. A small chat model may not answer in a conversation what it would complete.
"""

from collections.abc import Sequence

from ..asking import METRICS, Asking
from ..haystack import planted, question
from ..subject import Subject
from ..task import Exam, Item
from .recall import draw_of, mark_of

TURNS = 8
FIRST = 0.75  # of all tokens, in the first turn


class Conversation:
    """The task."""

    name = "conversation"
    version = 2
    metrics = METRICS

    def items(self, items: Sequence[Item]) -> Sequence[Item]:
        return items

    def exam(self, subject: Subject, item: Item) -> Exam:
        frame, window = subject.frame, item.window()
        answer, turn = subject.encode(frame.answer), subject.encode(frame.turn)
        quiz = draw_of(item).quiz(["single"])
        begin = int(FIRST * item.prompt_tokens)
        first = [*subject.opening]
        first += planted(subject, window, quiz.facts, begin - len(first), mark_of(item))
        speeches = 2 * (TURNS - 1) - 1  # an answer to each turn but the last, and the turns between
        length = (item.prompt_tokens - begin) // speeches
        later = list[int]()
        for i in range(speeches):
            between = answer if i % 2 == 0 else turn
            at = begin + i * length
            later += [*between, *window[at : at + max(1, length - len(between))]]
        later += turn
        questions = [question(subject, q, f"{q.words}{frame.answer}") for q in quiz.queries]
        share = len(first) / (len(first) + len(later))
        return Asking(subject, subject.prompted(first), questions, later, share)
