"""Ctrl-C while the modules of a command still load: one line instead of a traceback.

mlx and mlx-lm take seconds to load, and ``python -m zm_mlx.generate`` loads the package before any line
of the command runs. So this module comes first in the package, imports nothing heavy, and acts on import.
"""

import contextlib
import os
import signal
import sys
from pathlib import PurePath
from typing import NoReturn

INTERRUPTED = 130  # exit code of a process that Ctrl-C ended
PACKAGE = "zm_mlx."


def command() -> str | None:
    """Which command of this package the process was started as, ``None`` for any other program."""
    started = sys.argv[0] if sys.argv else ""
    looking = started == "-m"  # Python looks for the module to run
    names = [word.removeprefix("-m") for word in sys.orig_argv] if looking else [PurePath(started).name]
    return next((name for name in names if name.startswith(PACKAGE)), None)


def leave(name: str) -> NoReturn:
    """End the process at once: half-loaded modules are not worth unwinding."""
    with contextlib.suppress(OSError):
        os.write(2, f"{name}: interrupted\n".encode())
    os._exit(INTERRUPTED)


def install() -> None:
    """Leave quietly on Ctrl-C, if this process is one of our commands and nobody else handles it."""
    name = command()
    if name is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: leave(name))


install()
