"""Commands that ``mlx.launch`` starts as two ranks on this machine, and models that they load from a folder."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from served import Served, answers

from zm_mlx.flags import DEFAULT_MODEL

TROUBLED = str(Path(__file__).with_name("troubled_rank.py"))


@contextlib.contextmanager
def launched(*command, output):
    """The process of ``mlx.launch -n 2 --backend ring`` with this command of Python, which writes into two files.

    Args:
        output: name of these files, to which ``.out`` and ``.err`` are added.
    """
    launch = str(Path(sys.executable).with_name("mlx.launch"))
    with (
        open(f"{output}.out", "w") as out,
        open(f"{output}.err", "w") as err,
        subprocess.Popen(
            [launch, "-n", "2", "--backend", "ring", "-p", str(_free_ports()), "--", sys.executable, *command],
            stdin=subprocess.PIPE,  # left open: at its end mlx.launch would read it again and again
            stdout=out,
            stderr=err,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(folder, *args):
    """A server of two ranks, until the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with launched("-m", "zm_mlx.server", "--port", str(port), *args, output=folder / "served") as process:
        server = Served(port, process, folder / "served.err")
        end = time.monotonic() + 120
        while not answers(server):
            assert process.poll() is None and time.monotonic() < end, server.log.read_text()
            time.sleep(0.1)
        yield server


def run(tmp_path, *command):
    """Standard output and standard error of a command, run to its end."""
    with launched(*command, output=tmp_path / "launched") as process:
        process.wait(timeout=120)
    return (tmp_path / "launched.out").read_text(), (tmp_path / "launched.err").read_text()


def saved(model, folder):
    """The name of a folder that holds a model and the small model's tokenizer; its norms tell it from others."""
    mx.random.seed(5)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.weight = 1 + 0.1 * mx.random.normal(module.weight.shape)
    folder.mkdir()
    config = {name: value for name, value in asdict(model.args).items() if value is not None}
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(DEFAULT_MODEL) / name, folder)
    return str(folder)


def _free_ports():
    """The first of two ports that nobody has."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError, OverflowError):
                other.bind(("127.0.0.1", one.getsockname()[1] + 1))
                return one.getsockname()[1]
