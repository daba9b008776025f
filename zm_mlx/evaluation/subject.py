"""The model under evaluation, and the last prompt that it has read."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ..calibration.finding import Found, Search, find
from ..calibration.fingerprint import fingerprint
from ..calibration.table import Table
from ..engine import Engine
from ..host.plan import context_of
from ..host.probe import probe
from ..host.turning import turns
from ..loading import folder_of
from ..phases import PIECE
from ..state.layout import LayerShape
from .frame import Frame, begins_with
from .prefilled import Prompted


class Subject:
    """A model with its tokenizer, as tasks need it."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.model, self.tokenizer = engine, engine.model, engine.tokenizer
        self._last: tuple[tuple[int, ...], Prompted] | None = None

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    @cached_property
    def shapes(self) -> list[LayerShape]:
        """What a token takes in each full-attention layer."""
        return probe(self.model)

    @cached_property
    def unmoved(self) -> int:
        """Layers whose rotation is not known, so that the default cannot replay their queries."""
        return sum(turn is None for turn in turns(self.model, self.shapes, PIECE))

    @cached_property
    def found(self) -> Found:
        """The model's table of rows per KV head, as the other commands find it, or why there is none."""
        return find(self.model, Search(folder_of(self.engine.name)), tuple(s.heads for s in self.shapes))

    @property
    def table(self) -> Table | None:
        return self.found.table

    @property
    def context(self) -> int | None:
        """Tokens that the model was trained on at most, where its configuration says."""
        return context_of(self.model)

    @cached_property
    def begin(self) -> list[int]:
        """What comes before any text."""
        return begins_with(self.tokenizer)

    @cached_property
    def chat(self) -> Frame | None:
        """The chat template, if there is one."""
        return Frame.of(self.tokenizer)

    @cached_property
    def frame(self) -> Frame:
        """The chat template, or blank lines instead."""
        return self.chat or Frame()

    @cached_property
    def opening(self) -> list[int]:
        """What comes before a user's first words."""
        return self.begin if self.chat is None else self.encode(self.chat.opening)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text alone."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def line_ends(self, tokens: Sequence[int]) -> list[int]:
        """Indices after those tokens that end a line; after every token if none does."""
        distinct, where = np.unique(np.asarray(tokens), return_inverse=True)
        ends = np.array([self.tokenizer.decode([int(t)]).endswith("\n") for t in distinct])[where]
        found: list[int] = (np.flatnonzero(ends) + 1).tolist()
        return found or list(range(1, len(tokens) + 1))

    def prompted(self, tokens: Sequence[int]) -> Prompted:
        """The prompt, read; the last one is remembered, since tasks may share it."""
        key = tuple(tokens)
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next one takes memory
            self._last = key, Prompted(self.model, tokens, self.tokenizer, table=self.table)
        return self._last[1]
