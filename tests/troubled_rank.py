"""A command as one of several ranks, of which one has a trouble: ``troubled_rank.py TROUBLE RANK MODULE ...``."""

import importlib
import os
import signal
import sys

from zm_mlx.engine import Engine
from zm_mlx.host import guard, plan, ranks

FEW = 60_000  # bytes that are free on a poor machine


def main(trouble, rank, module, *argv):
    if ranks.rank() == int(rank):
        {"killed-in-prefill": _killed, "killed-in-decode": _killed, "poor": _poor}[trouble](trouble)
    return importlib.import_module(module).main(list(argv))


def _poor(_):
    for place in (guard, plan):
        place.free_bytes = lambda reserve=0: FEW


def _killed(trouble):
    generate = Engine.generate

    def dying(self, tokens, caches, settings, progress=None, draft=None):
        def counted(done, total):
            if done and trouble == "killed-in-prefill":
                os.kill(os.getpid(), signal.SIGKILL)
            progress(done, total)

        for i, response in enumerate(generate(self, tokens, caches, settings, counted, draft)):
            if i == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield response

    Engine.generate = dying


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
