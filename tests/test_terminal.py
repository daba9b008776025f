"""The edge of the commands: output that cannot be written, input that is closed, and Ctrl-C at any time."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest

from zm_mlx import interrupts
from zm_mlx.errors import UnsupportedModelError, UserError
from zm_mlx.terminal import guarded, say

COMMAND = [sys.executable, "-m", "zm_mlx.generate", "-m", "2"]


def raising(error):
    def body():
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\n lines"), 2, "x: error: two lines\n"),
        (UnsupportedModelError("no"), 2, "x: error: no\n"),
        (KeyboardInterrupt(), 130, "x: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "x: error: the output cannot be written: No space"),
        (BrokenPipeError(), 141, ""),
        (SystemExit(), 0, ""),
        (SystemExit(3), 3, ""),
    ],
)
def test_every_end_has_its_code_and_at_most_one_line(capsys, error, code, line):
    assert guarded("x", raising(error)) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == bool(line)


def test_an_error_of_the_program_itself_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        guarded("x", raising(ZeroDivisionError()))


def test_characters_that_a_terminal_lacks_are_replaced(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert guarded("x", lambda: say("a 😀 é \udc80") or 0) == 0
    assert narrow.buffer.getvalue() == b"a ? ? ?\n"


def test_closed_standard_output_is_said_before_anything_is_done(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert guarded("x", raising(AssertionError("ran"))) == 2
    assert capsys.readouterr().err == "x: error: standard output is closed\n"


def test_both_outputs_broken_end_without_an_exception(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", Broken())
    assert guarded("x", lambda: say("text") or 0) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_after_a_failure_the_interpreter_can_write_what_is_left(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert guarded("x", lambda: say("text") or 0) == 1
        say("more")


def run_with(redirections, *argv):
    command = f'"$@" {redirections}'
    return subprocess.run(["sh", "-c", command, "sh", *COMMAND, *argv], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("argv", [["--verbose", "False"], ["--help"]])
def test_a_full_disk_is_one_line(argv):
    done = run_with("> /dev/full", *argv)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "zm_mlx.generate: error: the output cannot be written: No space left on device\n"


def test_a_closed_pipe_ends_quietly_also_when_the_interpreter_ends():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, "--verbose", "False"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_closed_input_and_errors_do_not_keep_a_model_from_loading():
    """The next file that is opened gets the lowest free descriptor, and MLX takes 0 for a failure."""
    done = run_with("<&- 2>&-", "--verbose", "False", "--prompt", "import os")
    assert done.returncode == 0 and done.stdout


# ---- Ctrl-C while modules load


@pytest.mark.skipif(os.name != "posix", reason="SIGINT is sent as on a terminal")
@pytest.mark.parametrize("module", ["zm_mlx.generate", "zm_mlx.cache_prompt"])
def test_ctrl_c_while_modules_load_is_one_line(tmp_path, module):
    """A module that takes forever stands in for mlx, and presses Ctrl-C itself: no timing."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{module}: interrupted\n")


@pytest.mark.parametrize(
    ("argv", "original", "name"),
    [
        (["-m", "x"], ["python", "-u", "-m", "zm_mlx.generate", "x"], "zm_mlx.generate"),
        (["-m"], ["python", "-mzm_mlx.cache_prompt"], "zm_mlx.cache_prompt"),
        (["/bin/zm_mlx.generate"], ["python", "/bin/zm_mlx.generate"], "zm_mlx.generate"),
        (["script.py", "zm_mlx.generate"], ["python", "script.py", "zm_mlx.generate"], None),
        (["-c"], ["python", "-c", "import zm_mlx"], None),
        (["-m"], ["python", "-m", "pytest"], None),
        ([], [], None),
    ],
)
def test_only_a_command_of_this_package_takes_ctrl_c(monkeypatch, argv, original, name):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert interrupts.command() == name
    before = signal.getsignal(signal.SIGINT)
    try:
        interrupts.install()
        assert (signal.getsignal(signal.SIGINT) is before) == (name is None)
        if name is not None:  # while a command runs Ctrl-C raises, before and after it ends the process
            assert guarded("x", lambda: int(signal.getsignal(signal.SIGINT) is signal.default_int_handler)) == 1
            assert signal.getsignal(signal.SIGINT) not in (before, signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "zm_mlx.generate"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts.install()
        assert guarded("x", lambda: int(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)) == 1
    finally:
        signal.signal(signal.SIGINT, before)
