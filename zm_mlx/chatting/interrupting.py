"""Ctrl-C as a question that is asked between two tokens."""

import contextlib
import signal
from types import FrameType
from typing import Any


class Interrupts:
    """Notes Ctrl-C while it is entered, instead of raising.

    An exception in the middle of a call of the model would leave layers that have taken a token beside
    layers that have not. Nothing is lost in speed: MLX evaluates in one piece, which no signal ends.
    """

    def __init__(self) -> None:
        self.noted = False
        self._previous: Any = None

    def __enter__(self) -> "Interrupts":
        previous = signal.getsignal(signal.SIGINT)
        if previous not in (signal.SIG_IGN, None):
            with contextlib.suppress(ValueError):  # not the main thread
                self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.noted = True
