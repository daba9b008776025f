"""Requests that wait for a slot: how many, how long, and what a client hears when it is too many or too long."""

from collections import deque
from threading import Condition

from .job import Job
from .refusal import Refusal

QUEUE = 64  # requests that wait at most
PATIENCE = 60.0  # seconds that one waits at most
RETRY_AFTER = 5  # seconds, told to clients that are turned away


def busy(why: str) -> Refusal:
    return Refusal(503, f"the server is busy: {why}", "busy", RETRY_AFTER)


class Waiting:
    """A queue between the threads of clients and the one that generates."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._changed = Condition()

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> None:
        """Let a request wait.

        Raises:
            Refusal: too many wait already.
        """
        with self._changed:
            if len(self._jobs) >= QUEUE:
                raise busy(f"{QUEUE} requests wait already")
            self._jobs.append(job)
            self._changed.notify()

    def first(self) -> Job | None:
        """The request that has waited longest."""
        with self._changed:
            return self._jobs[0] if self._jobs else None

    def take(self, job: Job) -> bool:
        """Take a request out; ``False`` if somebody else has."""
        with self._changed:
            if job not in self._jobs:
                return False
            self._jobs.remove(job)
            return True

    def drain(self) -> list[Job]:
        """Take all requests out."""
        with self._changed:
            jobs, self._jobs = list(self._jobs), deque()
            return jobs

    def wait(self, seconds: float) -> None:
        """Sleep until a request waits, ``seconds`` at most."""
        with self._changed:
            if not self._jobs:
                self._changed.wait(seconds)
