"""The server with little patience, whose next step fails when a file says so: ``faulty_server.py FILE flags…``."""

import sys
from pathlib import Path

from mlx_lm.generate import BatchGenerator

from zm_mlx import server
from zm_mlx.serving import loop, waiting

FAULT = Path(sys.argv[1])
step = BatchGenerator.next


def failing(self):
    if FAULT.exists():
        FAULT.unlink()
        raise RuntimeError("injected")
    return step(self)


waiting.QUEUE, loop.PATIENCE = 2, 2.0
BatchGenerator.next = failing
sys.exit(server.main(sys.argv[2:]))
