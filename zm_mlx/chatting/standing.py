"""Where a conversation stands between two turns; with its caches, this is all that there is of it."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

Place = Literal["empty", "open", "answered"]
PLACES = ("empty", "open", "answered")


@dataclass(frozen=True)
class Standing:
    """What the caches do not say.

    Args:
        place: nothing was said; the caches hold the beginning of a user's message; a turn was answered.
        system: the system prompt.
        turns: how many were begun.
        pending: tokens of the last turn that were not read (it was interrupted); they come before the next.
        stop: the token that ended the last answer, which the caches hold; ``None`` if the answer was cut off.
        adapter: the folder of the adapter that the model had.

    Raises:
        ValueError: a value is of the wrong type.
    """

    place: Place = "empty"
    system: str | None = None
    turns: int = 0
    pending: tuple[int, ...] = ()
    stop: int | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        texts = all(x is None or isinstance(x, str) for x in (self.system, self.adapter))
        tokens = all(type(x) is int and x >= 0 for x in (self.turns, *self.pending, self.stop or 0))
        if not (self.place in PLACES and texts and tokens):
            raise ValueError("what it says of its conversation is damaged")

    def text(self) -> str:
        """The form in which it is saved."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> "Standing":
        """The inverse of ``text``.

        Raises:
            ValueError: it is something else.
        """
        try:
            facts = json.loads(text)
            return cls(**{**facts, "pending": tuple(facts["pending"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError("what it says of its conversation is damaged, or of another version") from error
