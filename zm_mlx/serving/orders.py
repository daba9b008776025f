"""What happens between two steps of the batch: rank 0, which has the clients, decides it, and all ranks do it alike.

Ranks count sequences and snapshots, not bytes: these differ by rank where heads have unequal numbers of rows, and
ranks that let go of different snapshots would compute different things and wait for each other for ever.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from .job import Job, Prompt

Words = Callable[[Prompt, Any], Any]  # from a prompt and its request's arguments to what ends its answer


@dataclass
class Orders:
    """The end of the server, sequences whose clients have gone, and requests to let in, in this order.

    A request whose model is not loaded, and so not yet tokenised, is the only one: its model is loaded for it.
    """

    stop: bool = False
    gone: list[int] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    def told(self) -> Any:
        """All of it for other ranks, less what only the thread of a client needs; ``None`` if there is nothing."""
        if not (self.stop or self.gone or self.jobs):
            return None
        jobs = [(job.args, job.prompt and replace(job.prompt, context=None, stop=None)) for job in self.jobs]
        return self.stop, self.gone, jobs

    @classmethod
    def heard(cls, told: Any, words: Words) -> "Orders":
        """What rank 0 has told: its requests' clients are not here, and never leave."""
        if told is None:
            return cls()
        stop, gone, jobs = told
        return cls(
            stop, gone, [Job(None, args, prompt=prompt and _heard(prompt, args, words)) for args, prompt in jobs]
        )


def _heard(prompt: Prompt, args: Any, words: Words) -> Prompt:
    return replace(prompt, context=SimpleNamespace(_should_stop=False), stop=words(prompt, args))
