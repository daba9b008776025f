"""What the tasks of an evaluation have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .caches import Contender
from .documents import Document
from .subject import Subject

ROOM = 256  # tokens of a document behind the prompt, which it may be continued with

Values = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """A number that a task gives, for tables and figures."""

    key: str
    title: str
    lower: bool = True  # is better


@dataclass(frozen=True)
class Item:
    """What is asked of every cache: a place in a text, a seed and a length.

    Attributes:
        name, digest: of the document, which is what statistics pair and average by.
        window: the document's tokens for this seed: ``prompt_tokens`` of them and ``ROOM`` more.
        code: whether it is code.
        part: of the item, where a task asks it in parts.
        row: what a task has instead of a window.
    """

    name: str
    digest: str
    seed: int
    prompt_tokens: int
    window: Callable[[], list[int]]
    code: bool = False
    part: int = 0
    row: Any = None


class Exam(Protocol):
    """An item that is ready to be given to caches: the model has read its prompt."""

    def measure(self, contender: Contender) -> Values:
        """What comes of it.

        Raises:
            ValueError: this cache cannot take it, say since the budget is too small.
        """
        ...


class Task(Protocol):
    """One kind of measurement.

    Attributes:
        name: as ``--tasks`` calls it.
        version: changes with what is measured, so that older records no longer count.
        metrics: what is reported first; the first of them is what the figure shows.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def metrics(self) -> Sequence[Metric]: ...

    def items(self, items: Sequence[Item]) -> Sequence[Item]:
        """What the task asks, of one item for each document, seed and length."""
        ...

    def exam(self, subject: Subject, item: Item) -> Exam:
        """Let the model read the item's prompt."""
        ...


def items(subject: Subject, documents: Sequence[Document], seeds: Sequence[int], length: int) -> list[Item]:
    """One item for each document and seed, all documents of a seed first."""

    def window(document: Document, seed: int) -> Callable[[], list[int]]:
        return lambda: document.window(subject.encode, length + ROOM, seed)

    return [
        Item(document.name, document.digest, seed, length, window(document, seed), document.kind == "code")
        for seed in seeds
        for document in documents
    ]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
