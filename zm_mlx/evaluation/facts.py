"""Facts to plant in a text and questions about them, drawn from a seed; numbers of 5 digits, in words of any model.

Five kinds, as in RULER (Hsieh et al. 2024, arXiv 2404.06654), in wordings that a model of 135 million
parameters answers with a full cache:

- single: facts that have nothing in common, from the beginning to the end of the text;
- keys: the same sentence of several people;
- values: several numbers of one person; each is asked for by its first digit or token, since nothing else says which;
- chain: a relation that is followed twice, and a number at its end (variable tracking);
- hops: a fact about a place, and a number of that place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Kind = Literal["single", "keys", "values", "chain", "hops"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SINGLE, KEYS, VALUES = 6, 4, 3  # questions of a prompt
DIGITS = 5
SHALLOWEST, DEEPEST = 0.05, 0.95

NAMES = (
    "Aldous Bertha Cedric Doreen Edmund Flora Gilbert Harriet Judith Kenneth Lavinia Morris Nadia Oscar Phoebe Quentin "
    "Rosalind Stanley Tabitha Walter Agnes Bernard Clara Duncan Esther Felix Gloria Howard Irene Leonard"
).split()
TOWNS = "Lisbon Oslo Cairo Prague Dublin Vienna Madrid Athens Warsaw Geneva Naples Havana".split()
THINGS = "piano camera bicycle telescope printer radio tractor compass lantern violin".split()
SUBJECTS = (  # of single facts
    "the locker number of {name}",
    "the serial number of the {thing}",
    "the price of a house in {town}",
    "the year in which {name} retires",
    "the weight of the {thing} in grams",
    "the number of trees in {town}",
    "the code of the door to the {thing}",
    "the account number of {name}",
)


@dataclass(frozen=True)
class Fact:
    """A sentence, and where in the text it stands, as a share of it."""

    depth: float
    text: str


@dataclass(frozen=True)
class Piece:
    """Words that are given and the part of an answer that follows them; ``hint`` gives its first token too."""

    given: str
    answer: str
    hint: bool = False


@dataclass(frozen=True)
class Query:
    """A question in words, and its answer in pieces; ``depth`` is that of a single fact."""

    kind: Kind
    words: str
    pieces: tuple[Piece, ...]
    depth: float | None = None


@dataclass(frozen=True)
class Quiz:
    """Facts and the questions about them."""

    facts: tuple[Fact, ...]
    queries: tuple[Query, ...]

    def of(self, kind: Kind) -> tuple[Query, ...]:
        return tuple(q for q in self.queries if q.kind == kind)


class Draw:
    """Draws facts; no name, town or thing is drawn twice."""

    def __init__(self, seed: Sequence[int]) -> None:
        self.rng = np.random.default_rng(list(seed))
        self.names, self.towns, self.things = (self.rng.permutation(x).tolist() for x in (NAMES, TOWNS, THINGS))

    def quiz(self, kinds: Sequence[Kind] = KINDS) -> Quiz:
        """Facts and questions of these kinds."""
        parts = [getattr(self, kind)() for kind in kinds]
        return Quiz(*(tuple(x for part in parts for x in getattr(part, name)) for name in ("facts", "queries")))

    def number(self) -> str:
        return "".join(map(str, self.rng.integers(0, 10, DIGITS)))

    def depths(self, count: int) -> list[float]:
        """Anywhere, in order."""
        return sorted(self.rng.uniform(SHALLOWEST, DEEPEST, count).tolist())

    def single(self) -> Quiz:
        facts, queries = [], []
        subjects = self.rng.permutation(SUBJECTS)[:SINGLE].tolist()
        for subject, depth in zip(subjects, np.linspace(SHALLOWEST, DEEPEST, SINGLE).tolist(), strict=True):
            about = subject.format(name=self.names[-1], town=self.towns[-1], thing=self.things[-1])
            for drawn, mark in ((self.names, "{name}"), (self.towns, "{town}"), (self.things, "{thing}")):
                if mark in subject:
                    drawn.pop()
            value, given = self.number(), f"{about[0].upper()}{about[1:]} is"
            facts.append(Fact(depth, f"{given} {value}."))
            queries.append(Query("single", f"What is {about}?", (Piece(given, value),), depth))
        return Quiz(tuple(facts), tuple(queries))

    def keys(self) -> Quiz:
        facts, queries = [], []
        for depth in self.depths(KEYS):
            name, value = self.names.pop(), self.number()
            given = f"The phone number of {name} is"
            facts.append(Fact(depth, f"{given} {value}."))
            queries.append(Query("keys", f"What is the phone number of {name}?", (Piece(given, value),)))
        return Quiz(tuple(facts), tuple(queries))

    def values(self) -> Quiz:
        name = self.names.pop()
        given, words = f"One of the numbers of {name} is", f"What are the numbers of {name}?"
        firsts = self.rng.permutation(10)[:VALUES]
        numbers = [f"{first}{self.number()[1:]}" for first in firsts]
        facts = [Fact(depth, f"{given} {value}.") for depth, value in zip(self.depths(VALUES), numbers, strict=True)]
        return Quiz(tuple(facts), tuple(Query("values", words, (Piece(given, n, hint=True),)) for n in numbers))

    def chain(self) -> Quiz:
        first, second, third = (self.names.pop() for _ in range(3))
        value, (a, b, c) = self.number(), self.depths(3)
        given = (f"{first} is the boss of", f"{second} is the boss of", f"{third} works in room")
        answers = (second, third, value)
        facts = [Fact(d, f"{g} {x}.") for d, g, x in zip((a, b, c), given, answers, strict=True)]
        words = f"Who works for {first}, who works for them, and in which room is that?"
        return Quiz(tuple(facts), (Query("chain", words, _pieces(given, answers)),))

    def hops(self) -> Quiz:
        name, town, value = self.names.pop(), self.towns.pop(), self.number()
        given, answers = (f"{name} lives in", f"The number of the museum in {town} is"), (town, value)
        depths = self.rng.permutation(self.depths(2)).tolist()
        facts = [Fact(d, f"{g} {x}.") for d, g, x in zip(depths, given, answers, strict=True)]
        words = f"What is the number of the museum in the town where {name} lives?"
        return Quiz(tuple(facts), (Query("hops", words, _pieces(given, answers)),))


def _pieces(given: Sequence[str], answers: Sequence[str]) -> tuple[Piece, ...]:
    """Sentences on lines of their own: a model of wrapped text would end a long line."""
    ends = ["", *[".\n"] * (len(given) - 1)]
    return tuple(Piece(end + g, a) for end, g, a in zip(ends, given, answers, strict=True))
