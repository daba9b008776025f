"""python -m zm_mlx.chat: pipes see answers alone, mistakes are one line, and Ctrl-C ends no conversation."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from commands import document, run, templated_model

from zm_mlx import cache_prompt, chat, generate
from zm_mlx.chatting import lines, session
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.host import guard

PLAIN = "warning: this model has no chat template: text goes in as it is, and its continuation comes out\n"


def piped(monkeypatch, text):
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def talk(monkeypatch, capsys, text, *argv):
    """Exit code, standard output and standard error for lines from a pipe."""
    piped(monkeypatch, text)
    return run(chat.main, capsys, "-m", "6", *argv)


def typed(monkeypatch, *entries):
    """Someone at a terminal types lines; a function among them is called in place of a line."""
    rest = iter(entries)

    def read(_prompt):
        entry = next(rest, None)
        if entry is None:
            raise EOFError
        return entry if isinstance(entry, str) else entry()

    monkeypatch.setattr(lines, "interactive", lambda: True)
    monkeypatch.setattr(lines, "typed", read)


def press():
    signal.raise_signal(signal.SIGINT)
    return "never typed"


def test_the_flags_of_mlx_lm_keep_their_names_and_defaults():
    theirs = {a.dest: a for a in chat.mlx_lm_chat.setup_arg_parser()._actions}
    ours = {a.dest: a for a in chat.setup_arg_parser()._actions}
    assert theirs.keys() <= ours.keys()
    for name in ("temp", "top_p", "xtc_probability", "xtc_threshold", "seed", "prefill_step_size", "max_tokens"):
        assert (ours[name].default, ours[name].option_strings) == (theirs[name].default, theirs[name].option_strings)


def test_from_a_pipe_each_line_is_a_turn_and_only_answers_come_out(monkeypatch, capsys):
    code, out, err = talk(monkeypatch, capsys, "import os\n\n   \nimport sys")
    assert code == 0 and err == PLAIN
    first = document(run(generate.main, capsys, "-p", "import os", "-m", "6", "--json")[1])["text"]
    assert out.startswith(first + "\n") and len(out) > len(first) + 1
    assert ">>>" not in out and "Budget" not in out


def test_a_conversation_through_a_template_hears_what_was_said_before(monkeypatch, capsys, tmp_path):
    model = templated_model(tmp_path / "model")
    alone = talk(monkeypatch, capsys, "x = 1\n", "--model", model)
    both = talk(monkeypatch, capsys, "the code is 12345\nx = 1\n/stats\n", "--model", model, "--system-prompt", "s")
    assert alone[0] == both[0] == 0 and alone[2] == ""
    assert both[1].count("rows per head") == 1 and "tokens in 2 turns" in both[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os\n/unknown\nimport sys\n", "there is no command /unknown"),
        ("import os\n/load missing.safetensors\nimport sys\n", "/load: no prompt cache file at missing.safetensors"),
        ("import os\n/system x\nimport sys\n", "/system needs a chat template"),
        (b"import os\n\xff\nimport sys\n", "not text in UTF-8"),
        (b"import os\na\0b\nimport sys\n", "this is a binary file"),
    ],
)
def test_a_mistake_in_a_pipe_ends_it_with_one_line(monkeypatch, capsys, text, words):
    code, out, err = talk(monkeypatch, capsys, text)
    good = talk(monkeypatch, capsys, "import os\n")[1]
    assert code == 2 and out == good
    assert err.startswith(PLAIN) and words in err and err.count("\n") == 2


def test_closed_input_is_an_empty_conversation(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert run(chat.main, capsys)[:2] == (0, "")


def test_closed_output_ends_the_command_quietly():
    command = f"printf 'import os\\nimport sys\\n' | {sys.executable} -m zm_mlx.chat -m 400 | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 141 and done.stderr == PLAIN


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--kv-budget", "0.2"], "--kv-budget 0.2 is a fraction of the prompt"),
        (["--kv-budget", "1"], "--kv-budget: "),
        (["--kv-budget", "x"], "--kv-budget: cannot read a budget"),
        (["--max-kv-size", "64"], "--max-kv-size does not work here: use --kv-budget"),
        (["--pipeline"], "--pipeline does not work here"),
        (["--max-tokens", "0"], "--max-tokens must be"),
        (["--temp", "-1"], "--temp must be"),
        (["--system-prompt", "x"], "--system-prompt needs a chat template"),
        (["--score", "reread", "--prefill-step-size", "1"], "--score reread needs a --prefill-step-size"),
        (["--prompt-cache-file", "a.safetensors"], "--prompt-cache-file: no prompt cache file"),
        (["--prompt-cache-file", "a.safetensors", "--system-prompt", "x"], "--system-prompt does not go with"),
        (["--prompt-cache-file", "a.safetensors", "--head-rows", "none"], "--head-rows does not go with"),
        (["--unknown"], "--help lists the flags"),
    ],
)
def test_wrong_flags_are_one_line(monkeypatch, capsys, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = talk(monkeypatch, capsys, "x\n", *argv)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["one", "two"], [("one", False), ("two", False)]),
        (["one\\", "two\\", "three", "four"], [("one\ntwo\nthree", False), ("four", False)]),
        (["one\\"], [("one", False)]),
        (['"""', "/one", "two\\", '"""', "three"], [("/one\ntwo\\", True), ("three", False)]),
        (['"""', "one"], [("one", True)]),
        (["", "/help"], [("", False), ("/help", False)]),
    ],
)
def test_lines_that_belong_together_are_one_turn(given, expected):
    rest = iter(given)

    def read(_prompt):
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    found = []
    while (entry := lines.next_entry(read)) is not None:
        found.append((entry.text, entry.block))
    assert found == expected


def test_only_a_line_that_begins_with_a_slash_is_a_command():
    assert lines.Entry("/x").command
    assert not lines.Entry("/x", block=True).command and not lines.Entry(" /x").command


def test_a_budget_of_auto_is_the_models_context(monkeypatch, capsys):
    code, out, _ = talk(monkeypatch, capsys, "/stats\n", "--kv-budget", "auto")
    assert code == 0 and "0 of 4,096 rows per head" in out


def test_a_turn_without_memory_is_refused_and_the_conversation_goes_on(monkeypatch, capsys):
    room = iter([10**5])
    monkeypatch.setattr(guard, "free_bytes", lambda reserve=0: next(room, 10**12))
    typed(monkeypatch, "import os", "import os", "/stats")
    code, out, err = run(chat.main, capsys, "-m", "4")
    assert code == 0 and "tokens in 1 turns" in out and out.count("[read") == 1
    assert "0.000 GB are free here" in err and "--force tries it all the same" in err


def test_force_goes_on_without_memory_and_a_pipe_ends_there(monkeypatch, capsys):
    monkeypatch.setattr(guard, "free_bytes", lambda reserve=0: 10**5)
    assert talk(monkeypatch, capsys, "import os\n")[0] == 2
    assert talk(monkeypatch, capsys, "import os\n", "--force")[0] == 0


def test_the_wired_limit_is_left_alone_where_it_is_asked_for(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(chat, "leave_wired_limit", lambda: called.append(True))
    assert talk(monkeypatch, capsys, "import os\n")[0] == 0 and not called
    assert talk(monkeypatch, capsys, "import os\n", "--no-wired-limit")[0] == 0 and called


def test_a_long_conversation_is_warned_of_once_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(session, "context_of", lambda _: 24)
    text = "import os\n" + "import sys " * 30 + "\nimport re\n"
    code, out, err = talk(monkeypatch, capsys, text, "--kv-budget", "64")
    assert code == 0 and out.count("\n") >= 3
    assert err.count("the conversation is longer than the 24 tokens that the model was trained on") == 1


def test_ctrl_c_in_an_answer_ends_it_and_the_conversation_goes_on(monkeypatch, capsys):
    shown = []

    def say(text="", end="\n"):
        shown.append(text)
        if len(shown) == asked[0] + 3:
            signal.raise_signal(signal.SIGINT)

    asked = [10**9]

    def first():
        asked[0] = len(shown)
        return "import os"

    monkeypatch.setattr(chat, "say", say)
    typed(monkeypatch, first, "/stats", "import sys", "/exit", "import re")
    code, out, err = run(chat.main, capsys, "-m", "40")
    closing = [line for line in shown if line.startswith("[read")]
    assert code == 0 and len(closing) == 2
    assert "answered 3, " in closing[0] and closing[0].endswith("interrupted]")
    assert "answered 40, " in closing[1] and closing[1].endswith("ended by --max-tokens 40]")
    assert "tokens in 1 turns" in out and "import re" not in err


def test_ctrl_c_at_the_prompt_and_mistakes_keep_someone_in_the_conversation(monkeypatch, capsys):
    typed(monkeypatch, "import os", press, "/unknown", "/load missing.safetensors", "/stats")
    code, out, err = run(chat.main, capsys, "-m", "4")
    assert code == 0 and "(/exit or Ctrl-D leaves)" in out and "tokens in 1 turns" in out
    assert err.splitlines()[1:] == [
        "zm_mlx.chat: there is no command /unknown (/help lists them; with a space before it, it is a message)",
        "zm_mlx.chat: /load: no prompt cache file at missing.safetensors",
    ]


def test_ctrl_c_in_a_pipe_ends_the_command(monkeypatch, capsys):
    printed = []

    def say(text="", end="\n"):
        printed.append(text)
        if len(printed) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "say", say)
    code, _, err = talk(monkeypatch, capsys, "import os\nimport sys\n")
    assert code == 130 and len(printed) == 3 and err == PLAIN + "zm_mlx.chat: interrupted\n"


def test_what_cache_prompt_and_save_wrote_begin_a_chat(monkeypatch, capsys, tmp_path):
    model, file = templated_model(tmp_path / "model"), str(tmp_path / "a.safetensors")
    run(cache_prompt.main, capsys, "--model", model, "--prompt", "import os\n", "--prompt-cache-file", file)
    code, whole, _ = talk(monkeypatch, capsys, "import sys\nx = 1\nx = 2\n", "--prompt-cache-file", file)
    assert code == 0
    code, first, _ = talk(monkeypatch, capsys, f"import sys\nx = 1\n/save {file}\n", "--prompt-cache-file", file)
    answers, _, saved = first.partition("Saved: ")
    assert code == 0 and "tokens of 2 turns" in saved and whole.startswith(answers)
    code, rest, _ = talk(monkeypatch, capsys, "x = 2\n", "--prompt-cache-file", file)
    assert code == 0 and whole == answers + rest
    code, _, err = talk(monkeypatch, capsys, "x\n", "--prompt-cache-file", file, "--kv-budget", "64")
    assert code == 2 and "--kv-budget 64 differs from the budget" in err
    code, _, err = talk(monkeypatch, capsys, "x\n", "--prompt-cache-file", file, "--model", DEFAULT_MODEL)
    assert code == 2 and f"--model {DEFAULT_MODEL} differs from the model" in err


def test_in_a_terminal_lines_are_asked_for_and_ctrl_d_leaves():
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-m", "zm_mlx.chat", "-m", "4"])

    def until(text):
        seen, end = b"", time.monotonic() + 200
        while text not in seen:
            assert time.monotonic() < end and select.select([terminal], [], [], 200)[0], seen
            seen += os.read(terminal, 65536)
        return seen.decode()

    try:
        head = until(b">>> ")
        assert "Budget: " in head and "/help lists them" in head
        os.write(terminal, b"import os\n")
        assert "ended by --max-tokens 4]" in until(b"\n>>> ")
        os.write(terminal, b"/stats\n")
        assert "of 2,048 rows per head" in until(b"\n>>> ")
        os.write(terminal, b"import")
        until(b"import")
        time.sleep(0.2)  # the line is waited for again: Python hears no signal that comes just before that
        os.write(terminal, b"\x03")
        assert "(/exit or Ctrl-D leaves)" in until(b"\n>>> ")
        os.write(terminal, b"\x04")
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(terminal)
    assert code == 0
