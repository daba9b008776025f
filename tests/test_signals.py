"""SIGINT and SIGKILL in the middle of a command: a good file stays as it was, and Ctrl-C leaves nothing behind.

The commands run as processes and press Ctrl-C, or kill themselves, at an exact place: no timing.
"""

import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from commands import run

from zm_mlx import cache_prompt
from zm_mlx.host import saved

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are sent as on a terminal")

TEXT = (Path(__file__).parent.parent / "zm_mlx" / "state" / "layout.py").read_text()[:900]
# Which call of which function the signal comes in: after a part of the prompt, at a token of the answer, and when a
# file is written and has not taken the old one's place.
PLACES = {
    "prefill": ("tqdm.std", "tqdm.update", 2),
    "decode": ("mlx.core", "async_eval", 4),
    "save": ("os", "fsync", 1),
}
PRESSING = """
import importlib, os
module, name, left = os.environ["ZM_TEST_PLACE"].split()
*outer, name = name.split(".")
owner, left = importlib.import_module(module), [int(left)]
for x in outer:
    owner = getattr(owner, x)
called = getattr(owner, name)

def pressing(*args, **more):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), int(os.environ["ZM_TEST_SIGNAL"]))
    return called(*args, **more)

setattr(owner, name, pressing)
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A saved prompt."""
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    assert cache_prompt.main(["--prompt", "import os\n", "--kv-budget", "64", "--prompt-cache-file", str(path)]) == 0
    return path.read_bytes()


@pytest.fixture
def file(tmp_path, good):
    path = tmp_path / "files" / "a.safetensors"
    path.parent.mkdir()
    path.write_bytes(good)
    return path


def interrupted(tmp_path, which, place, command, *argv, **more):
    """A command that gets a signal: exit code, standard output and standard error."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(PRESSING)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "ZM_TEST_PLACE": " ".join(map(str, PLACES[place])),
        "ZM_TEST_SIGNAL": str(int(which)),
    }
    line = [sys.executable, "-m", f"zm_mlx.{command}", *argv]
    done = subprocess.run(line, env=environment, timeout=200, **{"capture_output": True, "text": True, **more})
    assert "Traceback" not in (done.stderr or "")
    return done.returncode, done.stdout, done.stderr


def assert_good(file, good, which):
    """The file is as it was; Ctrl-C leaves nothing beside it, and what a killed process leaves has another name."""
    assert file.read_bytes() == good and saved.read(file)[0]
    beside = [name for name in os.listdir(file.parent) if name != file.name]
    assert not beside if which == signal.SIGINT else all(name.startswith(".zm_mlx-") for name in beside)


def full(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("which", "place"),
    [
        (signal.SIGINT, "save"),
        (signal.SIGKILL, "save"),
        full(signal.SIGINT, "prefill"),
        full(signal.SIGKILL, "prefill"),
    ],
)
def test_a_saved_prompt_is_replaced_by_a_whole_one_or_not_at_all(tmp_path, file, good, which, place):
    argv = ("--prompt", TEXT, "--kv-budget", "64", "--prefill-step-size", "64", "--prompt-cache-file", str(file))
    code, out, err = interrupted(tmp_path, which, place, "cache_prompt", *argv)
    assert code == (130 if which == signal.SIGINT else -9)
    assert "Saved:" not in out
    if which == signal.SIGINT:
        said = err.splitlines()[-1]
        assert said.startswith("zm_mlx.cache_prompt: interrupted")
        assert place == "save" or said.endswith("tokens, nothing was saved")
    assert_good(file, good, which)


@pytest.mark.parametrize(
    ("which", "place"),
    [
        (signal.SIGINT, "save"),
        full(signal.SIGKILL, "save"),
        full(signal.SIGINT, "prefill"),
        full(signal.SIGKILL, "prefill"),
        full(signal.SIGINT, "decode"),
        full(signal.SIGKILL, "decode"),
    ],
)
def test_a_chat_that_goes_on_from_a_file_leaves_it_whole(tmp_path, file, good, which, place):
    argv = ("--prompt-cache-file", str(file), "-m", "30", "--prefill-step-size", "2")
    code, out, err = interrupted(tmp_path, which, place, "chat", *argv, input=f"import sys, re\n/save {file}\n")
    assert code == (130 if which == signal.SIGINT else -9)
    assert "Saved:" not in out
    if which == signal.SIGINT:
        assert err.splitlines()[-1] == "zm_mlx.chat: interrupted"
    assert_good(file, good, which)


@pytest.mark.parametrize(
    ("which", "place"),
    [
        (signal.SIGINT, "prefill"),
        full(signal.SIGKILL, "prefill"),
        full(signal.SIGINT, "decode"),
        full(signal.SIGKILL, "decode"),
    ],
)
def test_generate_leaves_its_file_and_a_usable_terminal(tmp_path, file, good, which, place):
    """All output goes to a terminal, whose settings must be as before, with the cursor in a line of its own."""
    mine, theirs = pty.openpty()
    try:
        before = termios.tcgetattr(theirs)
        argv = ("--prompt", TEXT, "-m", "30", "--prefill-step-size", "64", "--prompt-cache-file", str(file))
        streams = {"capture_output": False, "stdin": theirs, "stdout": theirs, "stderr": theirs}
        code, *_ = interrupted(tmp_path, which, place, "generate", *argv, **streams)
        assert code == (130 if which == signal.SIGINT else -9)
        assert termios.tcgetattr(theirs) == before
        shown = os.read(mine, 2**20).decode()
    finally:
        os.close(mine)
        os.close(theirs)
    assert "\x1b[?25l" not in shown and "Traceback" not in shown  # no hidden cursor
    if which == signal.SIGINT:
        assert shown.endswith("\n") and "Seen: " in shown  # the statistics so far
        assert place == "decode" or "Prompt: 64 of " in shown
    assert_good(file, good, which)


def test_what_a_killed_process_left_is_no_prompt_that_is_found(capsys, tmp_path, file, good):
    """The next save works, whatever lies beside the file."""
    (file.parent / ".zm_mlx-0123456789abcdef.safetensors").write_bytes(good[: len(good) // 2])
    argv = ("--prompt", "import re\n", "--kv-budget", "64", "--prompt-cache-file", str(file))
    assert run(cache_prompt.main, capsys, *argv)[0] == 0
    assert file.read_bytes() != good and saved.read(file)[0]
