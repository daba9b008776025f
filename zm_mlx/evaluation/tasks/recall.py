"""Facts between the lines of a text, asked for after the text.

``recall`` asks after the prompt was compressed, which is blind: nothing told what would be asked. All questions are
asked of one compressed prompt, each of a copy. ``recall-before`` states questions before the text and one of them
again at its end, and compresses then: the answer is decoded from a cache that saw what was wanted. Each of
its questions ends a prompt of its own, so it asks fewer.

Reported are the loss of the answer (nats a token, above the full cache's on the same answer) and whether greedy
decoding gives it exactly, over all questions and for each kind of ``facts``, single facts by depth too.

Questions are sentences that the answer completes, without a chat template: models of all sizes, base or chat, are
better at that. Of ``chain`` and ``hops`` the words between the parts of an answer are given, so they say whether
all facts are still there, not whether the model can reason.

Traps: a loss above full is bounded by what guessing costs, about log 10 a digit; where the full cache itself does
not answer (see its exact match), neither number says much. Methods that score by the last queries of a prompt are
made for ``recall-before`` and cannot do well blind.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace

from ..asking import METRICS, Asking
from ..facts import KINDS, Draw, Query
from ..grading import Question
from ..haystack import COMMENT, planted, question
from ..subject import Subject
from ..task import Exam, Item, Metric

BREAK = "\n\n"  # between a text and what is asked
ASKED = 4  # questions of a document before it was read: two single ones, one of keys, one of another kind


class Recall:
    """The task ``recall``."""

    name = "recall"
    version = 1
    metrics = (*METRICS, Metric("single loss", "the same, single facts only"))

    def items(self, items: Sequence[Item]) -> Sequence[Item]:
        return items

    def exam(self, subject: Subject, item: Item) -> Exam:
        quiz, mark, begin = draw_of(item).quiz(), mark_of(item), subject.begin
        text = planted(subject, item.window(), quiz.facts, item.prompt_tokens - len(begin), mark)
        questions = [question(subject, q, BREAK + mark) for q in quiz.queries]
        return Asking(subject, subject.prompted([*begin, *text]), questions)


class RecallBefore:
    """The task ``recall-before``; each of its questions is an item."""

    name = "recall-before"
    version = 1
    metrics = (METRICS[1], METRICS[0])

    def items(self, items: Sequence[Item]) -> Sequence[Item]:
        return [replace(item, part=i) for item in items for i in range(ASKED)]

    def exam(self, subject: Subject, item: Item) -> Exam:
        draw, mark = draw_of(item), mark_of(item)
        quiz = draw.quiz()
        asked = self._asked(draw, quiz.queries)
        words = " ".join(q.words for q in asked)
        begin = [*subject.begin, *subject.encode(f"{mark}Questions: {words}\n{mark}The answers are below.{BREAK}")]
        text = planted(subject, item.window(), quiz.facts, item.prompt_tokens - len(begin), mark)
        query = asked[item.part]
        end, rest = before_answer(question(subject, query, f"{BREAK}{mark}{query.words}\n{mark}"))
        return Asking(subject, subject.prompted([*begin, *text]).followed_by(end), [rest])

    def _asked(self, draw: Draw, queries: Sequence[Query]) -> list[Query]:
        """The same for all parts of an item."""
        by_kind = {kind: draw.rng.permutation([i for i, q in enumerate(queries) if q.kind == kind]) for kind in KINDS}
        other = draw.rng.choice(["values", "chain", "hops"])
        chosen = [*by_kind["single"][:2], by_kind["keys"][0], by_kind[other][0]]
        return [queries[int(i)] for i in chosen]


def before_answer(asked: Question) -> tuple[list[int], Question]:
    """The question up to what predicts its answer, which is compressed with the prompt, and the rest."""
    cut = asked.scored[0] - 1
    rest = replace(asked, tokens=asked.tokens[cut:], scored=tuple(i - cut for i in asked.scored))
    return list(asked.tokens[:cut]), rest


def draw_of(item: Item) -> Draw:
    """The facts of an item: of its seed and document, the same for all lengths."""
    return Draw((item.seed, zlib.crc32(item.name.encode())))


def mark_of(item: Item) -> str:
    return COMMENT if item.code else ""
