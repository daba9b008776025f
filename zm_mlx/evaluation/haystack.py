"""Facts between the lines of a text, and the tokens of questions about them."""

from collections.abc import Sequence

import numpy as np

from .facts import Fact, Query
from .grading import Question
from .subject import Subject

COMMENT = "# "  # before facts and questions among code


def planted(subject: Subject, text: Sequence[int], facts: Sequence[Fact], length: int, mark: str = "") -> list[int]:
    """``length`` tokens: the text's, with each fact on a line of its own at the line's end nearest to its depth.

    Args:
        text: more tokens than are needed.
        mark: what comes before a fact on its line.

    Raises:
        ValueError: the facts alone are longer.
    """
    lines = [(f.depth, subject.encode(f"{mark}{f.text}\n")) for f in sorted(facts, key=lambda f: f.depth)]
    room = length - sum(len(line) for _, line in lines)
    if room < 1:
        raise ValueError(f"{length} tokens are too few for {len(facts)} facts; use longer prompts (--prompt-tokens)")
    filler = list(text[:room])
    ends, found, at = np.array([0, *subject.line_ends(filler)]), list[int](), 0
    for depth, line in lines:
        cut = max(at, int(ends[np.abs(ends - depth * room).argmin()]))
        found += [*filler[at:cut], *line]
        at = cut
    return found + filler[at:]


def question(subject: Subject, query: Query, before: str) -> Question:
    """The tokens of a question: words before it, then the answer's pieces."""
    tokens, scored = subject.encode(before), list[int]()
    for piece in query.pieces:
        tokens += subject.encode(piece.given)
        answer = subject.encode(f" {piece.answer}")
        first = next(i for i, token in enumerate(answer) if subject.tokenizer.decode([token]).strip())
        first += piece.hint and len(answer) > first + 1  # the space before an answer is no answer
        scored += range(len(tokens) + first, len(tokens) + len(answer))
        tokens += answer
    return Question(query.kind, tuple(tokens), tuple(scored), query.depth)
