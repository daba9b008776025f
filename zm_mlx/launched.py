"""A command that ``mlx.launch`` started several times: one printout, one message, and an end when a rank has ended."""

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from .errors import UnsupportedModelError, UserError
from .host import ranks
from .interrupts import INTERRUPTED

USER_ERROR = 2
FAILED = 1
TERMINATED = 143
PATIENCE = 10.0  # seconds between a signal to end and the end, where MLX's code does not come back before
LOOK = 1.0  # seconds between two looks at whether mlx.launch is still there

# Seconds without a sign of life, then between questions, how many of them; how long to send again (Linux, macOS).
_OPTIONS = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
KEEP_ALIVE = {getattr(socket, name): value for name, value in _OPTIONS.items() if hasattr(socket, name)}
if sys.platform == "darwin":
    KEEP_ALIVE[0x80] = 30  # TCP_RXT_CONNDROPTIME

ALONE = "this command runs in one process: start it without mlx.launch, which is for zm_mlx.generate and zm_mlx.server"


class _Terminated(BaseException):
    """Somebody wants this process to end: ``mlx.launch`` does, once another rank has ended with an error."""


def ranked(name: str, body: Callable[[], int], several: bool) -> int:
    """Run a command and return its exit code; one of several processes ends instead.

    Rank 0 alone prints. An error that all ranks raise is one line. Any other error of one rank, such as that another
    one is lost, is a line of its own and ends this process at once: MLX would wait for the others.

    Args:
        several: whether the command is for several processes.

    Raises:
        BaseException: what ``body`` raises, where there is one process. Of several also ``KeyboardInterrupt``,
            ``SystemExit`` and ``OSError``.
    """
    try:
        count = ranks.count()
    except (RuntimeError, ValueError) as error:  # MLX cannot reach the others
        raise UserError(f"mlx.launch: {error}") from error
    if count == 1:
        return body()
    global _current
    _current = _Rank(name)
    return _current.run(body, several)


def fail(error: Exception) -> None:
    """End, where this is one of several processes, because of an error that others need not have."""
    if _current is not None:
        _current.fail(error)


class _Rank:
    """This process, one of several."""

    def __init__(self, name: str) -> None:
        self.name, self.rank = name, ranks.rank()
        self._errors = sys.stderr
        self._interrupted = False
        if self.rank:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
            warnings.filterwarnings("ignore")
            logging.disable()
            signal.signal(signal.SIGINT, self._note)  # rank 0 ends the text, and so the others
        _notice_lost_machines()
        signal.signal(signal.SIGTERM, _raise)
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read, os.getppid()), daemon=True).start()

    def run(self, body: Callable[[], int], several: bool) -> NoReturn:
        """Run a command and end: what MLX has begun and nobody waits for would crash or stop the interpreter's end."""
        try:
            if not several:
                raise UserError(ALONE)
            code = body()
            sys.stdout.flush()
            if code != INTERRUPTED:
                ranks.wait_for_all()
            _leave(code)
        except (UserError, UnsupportedModelError) as error:
            if several and not ranks.agreed_error(error):
                self.end(str(error), USER_ERROR)
            if self.rank == 0:
                self._say(str(error), "")
            ranks.wait_for_all()  # the first that ends takes the others with it
            _leave(USER_ERROR)
        except _Terminated:
            self.end("ended from outside, as mlx.launch does when a rank has ended with an error", TERMINATED)
        except (OSError, KeyboardInterrupt):
            raise
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> NoReturn:
        """End because of an error that only this rank has."""
        if ranks.LOST not in str(error):
            traceback.print_exception(error, file=self._errors)
            self.end(f"{type(error).__name__}: {error}", FAILED)
        if self._interrupted:
            _leave(INTERRUPTED)
        self.end("another rank is lost: it has ended, or its machine or the network has", FAILED)

    def end(self, message: str, code: int) -> NoReturn:
        """Say why, and end without waiting for anything."""
        self._say(message, f"rank {self.rank}: ")
        _leave(code)

    def _say(self, message: str, who: str) -> None:
        with contextlib.suppress(OSError):
            print(f"{self.name}: {who}error: {' '.join(message.split())}", file=self._errors, flush=True)

    def _note(self, *_: object) -> None:
        self._interrupted = True

    def _watch(self, signals: int, parent: int) -> None:
        """End where MLX waits for ever: some time after a signal to end, or when ``mlx.launch`` itself is gone."""
        while os.getppid() == parent:
            if select.select([signals], [], [], LOOK)[0] and signal.SIGTERM in os.read(signals, 64):
                time.sleep(PATIENCE)
                self.end("ended from outside, as mlx.launch does when a rank has ended with an error", TERMINATED)
        self.end("mlx.launch has ended", FAILED)


_current: _Rank | None = None


def _notice_lost_machines() -> None:
    """Let connections to other ranks fail half a minute after a machine has gone without a word, as without power.

    MLX itself would wait for ever, or as long as the system sends again what nobody confirms.
    """
    for name in os.listdir("/dev/fd"):
        try:
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # no socket, or the folder itself, which is closed by now
            continue
        with found:
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in KEEP_ALIVE.items():
                    with contextlib.suppress(OSError):
                        found.setsockopt(socket.IPPROTO_TCP, option, value)


def _raise(*_: object) -> NoReturn:
    raise _Terminated


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
