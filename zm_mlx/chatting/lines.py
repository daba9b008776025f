"""What someone types, or a pipe brings, as turns: one line each, or several that belong together."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from .. import prompts
from ..errors import UserError

with contextlib.suppress(ImportError):  # history and editing of lines, which ``input`` takes up by itself
    import readline  # noqa: F401

PROMPT, MORE = ">>> ", "... "
BLOCK = '"""'


@dataclass(frozen=True)
class Entry:
    """What was typed; a block is never a command."""

    text: str
    block: bool = False

    @property
    def command(self) -> bool:
        return self.text.startswith("/") and not self.block


def interactive() -> bool:
    """Whether someone sits there: both ends are a terminal."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def next_entry(read: Callable[[str], str]) -> Entry | None:
    """The next turn or command; ``None`` at the end of the input.

    A line that ends in a backslash goes on in the next one. A line of three quotes begins a block, which ends
    with another one; the end of the input ends it too.

    Args:
        read: a line without its end, for a prompt; raises ``EOFError`` at the end.

    Raises:
        UserError: the input is not text.
    """
    try:
        line = read(PROMPT)
    except EOFError:
        return None
    block = line.strip() == BLOCK
    lines = [] if block else [line]
    with contextlib.suppress(EOFError):
        if block:
            while (line := read(MORE)).strip() != BLOCK:
                lines.append(line)
        else:
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(read(MORE))
    text = "\n".join(lines)
    prompts.encodable("the input", text)
    return Entry(text, block)


def typed(prompt: str) -> str:
    """A line from the terminal."""
    try:
        return input(prompt)
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not text in UTF-8 (byte {error.start} of the line cannot be read)") from error


def piped(_prompt: str) -> str:
    """A line from a pipe or a file; nothing is shown."""
    if sys.stdin is None:
        raise EOFError
    try:
        line = sys.stdin.buffer.readline()
    except (OSError, ValueError) as error:  # a closed file is a ValueError
        raise UserError(f"standard input cannot be read ({error})") from error
    if not line:
        raise EOFError
    if b"\0" in line:
        raise UserError("standard input: this is a binary file, not text")
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not text in UTF-8 (byte {error.start} of a line cannot be read)") from error
