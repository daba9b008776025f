"""The documents of an evaluation: places in the texts, each a cluster of the statistics."""

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .texts import Kind, Text

Encode = Callable[[str], list[int]]

PLACES = 64  # at most; a power of two
ROOM = 1.5  # of a place's length to that of the longest window, so that seeds see different parts of it
SAMPLE = 20_000  # characters from which the length of a token is estimated


@dataclass(frozen=True)
class Document:
    """A place in all texts of one kind.

    Attributes:
        name: as records call it: the kind, and the place's number among those of its kind.
        text: what begins there; after the end of all texts comes their beginning.
        slack: characters after which a window may begin.
    """

    name: str
    kind: Kind
    text: str
    slack: int

    @property
    def digest(self) -> str:
        """What tells it from any other document."""
        return hashlib.sha256(f"{self.slack} {self.text}".encode()).hexdigest()[:16]

    def window(self, encode: Encode, count: int, seed: int) -> list[int]:
        """``count`` tokens from somewhere in the document, beginning with a paragraph or a line."""
        rng = np.random.default_rng((seed, zlib.crc32(self.name.encode())))
        begin = line_after(self.text, int(rng.integers(self.slack + 1)))
        end = begin
        while end < len(self.text):
            end += 6 * count
            tokens = encode(self.text[begin:end])
            if len(tokens) >= count:
                return tokens[:count]
        raise UserError(f"--texts: {self.name} has fewer than {count} tokens; give longer texts")


def documents(texts: Sequence[Text], encode: Encode, count: int, tokens: int) -> list[Document]:
    """``count`` documents with room for windows of so many tokens, of prose and code in turns if there are both.

    Which ones they are depends on the texts and on ``tokens`` alone: with a higher count come others, and
    the first stay.

    Raises:
        UserError: the texts have room for fewer.
    """
    kinds = sorted({t.kind for t in texts}, reverse=True)  # prose first
    found: list[Document] = []
    rooms = {kind: _places([t.text for t in texts if t.kind == kind], encode, tokens) for kind in kinds}
    for i in range(count):
        kind, number = kinds[i % len(kinds)], i // len(kinds)
        text, places = rooms[kind]
        if number >= places:
            fit = len(kinds) * min(n for _, n in rooms.values())
            raise UserError(
                f"--documents {count}: the texts have room for {fit} of {tokens} tokens; "
                "give more --texts, fewer --documents or fewer --prompt-tokens"
            )
        begin = line_after(text, len(text) * _spread(number, places) // places)
        slack = max(0, int(len(text) / places * (1 - 1 / ROOM)))
        onward = text[begin:] + "\n\n" + text
        found.append(Document(f"{kind} {number}", kind, onward[: slack + 4 * len(text) // places], slack))
    return found


def line_after(text: str, at: int) -> int:
    """Where the next paragraph begins, or the next line, or word, if none is near."""
    if at == 0:
        return 0
    for mark in ("\n\n", "\n", " "):
        found = text.find(mark, at, at + 2000)
        if found >= 0:
            return found + len(mark)
    return at


def _places(texts: Sequence[str], encode: Encode, tokens: int) -> tuple[str, int]:
    """All texts in one, and the number of places in it."""
    whole = "\n\n".join(texts)
    middle = max(0, len(whole) // 2 - SAMPLE // 2)
    sample = whole[middle : middle + SAMPLE]
    need = ROOM * tokens * len(sample) / max(1, len(encode(sample)))
    places = PLACES
    while places > 1 and len(whole) < places * need:
        places //= 2
    if len(whole) * ROOM < need:
        raise UserError(
            f"--texts: {len(whole):,} characters are too few for {tokens} tokens; "
            "give longer ones or fewer --prompt-tokens"
        )
    return whole, places


def _spread(number: int, places: int) -> int:
    """The number-th place: 0, then those that halve the gaps (the digits of a binary number, reversed)."""
    bits = places.bit_length() - 1
    return int(f"{number:0{bits}b}"[::-1], 2) if bits else 0
