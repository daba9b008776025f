"""What all commands share at their edge: output that may fail, Ctrl-C, and errors as one line and an exit code."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from .errors import UnsupportedModelError, UserError
from .interrupts import INTERRUPTED
from .launched import ranked

USER_ERROR = 2
OUTPUT_ERROR = 1
CLOSED_PIPE = 141  # what a shell shows for a process that a closed pipe ended


def guarded(name: str, body: Callable[[], int], several: bool = False) -> int:
    """Run a command and return its exit code; whatever goes wrong in a known way is one line on stderr.

    Where ``mlx.launch`` started several processes, a command that is not for ``several`` is refused, once.

    ``body`` may raise ``UserError`` and ``UnsupportedModelError`` (2), ``KeyboardInterrupt`` (130),
    ``SystemExit`` (its own code) and ``OSError`` of the output: a closed pipe ends quietly (141), as it
    ends any program of a pipeline, and a full disk is said (1).
    """
    previous = _raise_on_interrupt()
    try:
        _prepare_streams()
        try:
            code = ranked(name, body, several)
        except SystemExit as leaving:  # argparse after --help
            code = int(leaving.code or 0)
        sys.stdout.flush()
        return code
    except (UserError, UnsupportedModelError) as error:
        complain(name, f"error: {one_line(error)}")
        return USER_ERROR
    except KeyboardInterrupt:
        complain(name, "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _mute(sys.stdout)
        _mute(sys.stderr)
        return CLOSED_PIPE
    except OSError as error:
        _mute(sys.stdout)
        complain(name, f"error: the output cannot be written: {error.strerror or error}")
        return OUTPUT_ERROR
    finally:
        _flush()
        if previous is not None:
            signal.signal(signal.SIGINT, previous)


def say(text: str = "", end: str = "\n") -> None:
    """Print at once, so that a closed pipe or a full disk is met here and not when the interpreter ends."""
    print(text, end=end, flush=True)


def warn(text: str) -> None:
    """One line on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def complain(name: str, text: str) -> None:
    """One line of a command on standard error, if that can be written."""
    with contextlib.suppress(OSError):
        print(f"{name}: {text}", file=sys.stderr, flush=True)


def prefill_bar(tokens: int, shown: bool) -> Any:
    """A progress bar for a prompt of so many tokens."""
    return tqdm(total=tokens, desc="Prefill", unit="token", leave=False, disable=not shown)


def one_line(error: object) -> str:
    return " ".join(str(error).split())


def _raise_on_interrupt() -> Any:
    """From here on Ctrl-C raises; returns the handler that was there, ``None`` if it is to stay."""
    previous = signal.getsignal(signal.SIGINT)
    if previous in (signal.SIG_IGN, signal.default_int_handler, None):
        return None
    with contextlib.suppress(ValueError):  # not the main thread
        return signal.signal(signal.SIGINT, signal.default_int_handler)
    return None


def _prepare_streams() -> None:
    if sys.stdin is None:  # or the next file gets descriptor 0, which MLX takes for a failure
        os.open(os.devnull, os.O_RDONLY)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    if sys.stdout is None:
        raise UserError("standard output is closed")
    for stream, instead in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows "?"
            stream.reconfigure(errors=instead)


def _flush() -> None:
    """What still waits in a buffer is written, or dropped without a word."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _mute(stream)


def _mute(stream: TextIO) -> None:
    """Let the rest go nowhere: the interpreter flushes once more at its end, and would complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
