"""A request on its way: between the thread of its client and the thread that generates."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import Any

from .refusal import ClientLeft
from .reuse import Kind

POLL = 0.25  # seconds between two looks at a client's connection


@dataclass(frozen=True)
class Prompt:
    """A tokenised request.

    Args:
        key: of the model whose tokens these are.
        tokens: all of them, one or more.
        marks: after how many tokens a snapshot is taken, and of what kind it is.
        context: what mlx-lm's handler wants to know of an answer (``GenerationContext``).
        stop: sequences that end the answer, as mlx-lm finds them.
        user_turn: whether a user speaks last, and not a tool.
        keeps_answer: whether the next prompt of a conversation will hold the answer as it is.
    """

    key: Any
    tokens: list[int]
    marks: dict[int, Kind]
    context: Any
    stop: Any
    user_turn: bool
    keeps_answer: bool

    def segments(self, held: int) -> list[list[int]]:
        """What is left of the prompt after ``held`` tokens, cut so that generation stops at every mark.

        A mark in mid-prompt is reached by one token alone, which ends a piece of a prompt that is held beyond the
        budget: so a sequence goes on from there as one that begins with the snapshot.
        """
        cuts = {0, held, len(self.tokens)}
        for mark in self.marks:
            cuts |= {mark} if mark == len(self.tokens) - 1 else {mark - 1, mark}
        ends = sorted(c for c in cuts if c >= held)
        return [self.tokens[a:b] for a, b in pairwise(ends)]


@dataclass(eq=False)
class Job:
    """One request, its answer so far, and whether anybody still waits for it."""

    request: Any
    args: Any
    left: Callable[[], bool] = lambda: False
    prompt: Prompt | None = None
    stopped: bool = False
    born: float = field(default_factory=time.monotonic)
    _items: SimpleQueue[Any] = field(default_factory=SimpleQueue)

    def put(self, item: Any) -> None:
        """Something for the client: a context, a progress (a pair), a response, or a ``Refusal`` as the last."""
        self._items.put(item)

    def end(self) -> None:
        """The answer is complete."""
        self._items.put(None)

    @property
    def abandoned(self) -> bool:
        """Whether the client's thread has gone, by itself or because its client did."""
        return self.stopped or (self.prompt is not None and self.prompt.context._should_stop)

    def items(self, check: Callable[[], None]) -> Iterator[Any]:
        """What is put, as it comes, until the end; ``check`` is called every ``POLL`` seconds and may raise.

        Raises:
            ClientLeft: the client is gone.
            Refusal: one was put.
        """
        try:
            yield from self._until_end(check)
        finally:  # however it ended: an answer whose head could not be sent is nobody's either
            self.stopped = True

    def _until_end(self, check: Callable[[], None]) -> Iterator[Any]:
        looked = time.monotonic()
        while True:
            try:
                item = self._items.get(timeout=POLL)
            except Empty:
                item = self
            if item is self or time.monotonic() - looked > POLL:
                looked = time.monotonic()
                if self.left():
                    raise ClientLeft
                if item is self:
                    check()
                    continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
