"""--score of the commands: what they say of it, what it changes, and where it is refused."""

from pathlib import Path

import pytest
from commands import document, run

from zm_mlx import Policy, cache_prompt, generate
from zm_mlx.host import prefill

TEXT = (Path(__file__).parent.parent / "zm_mlx" / "state" / "layout.py").read_text()
BUDGET = ("--kv-budget", "64", "-m", "12", "--json")


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(prefill, "PIECE", 100)


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT[:1800])
    return str(path)


def made(capsys, *argv):
    code, out, err = run(generate.main, capsys, *BUDGET, *argv)
    assert code == 0 and "Warning" not in err, err
    return document(out), out


@pytest.mark.parametrize("taken", ["exact", "streaming"])
def test_a_prompt_is_read_twice_and_the_output_says_so(capsys, prompt_file, taken, monkeypatch):
    pieces, again = [], prefill._again

    def counted(model, piece, caches):
        pieces.append(piece.size)
        again(model, piece, caches)

    monkeypatch.setattr(prefill, "_again", counted)
    found, out = made(capsys, "--prompt-file", prompt_file, "--prefill", taken, "--score", "reread")
    tokens = found["prompt_tokens"]
    assert "Score: reread (pieces of up to 512 tokens are read twice)" in out and found["score"] == "reread"
    assert sum(pieces) == tokens - 1 and max(pieces) <= 100 and len(pieces) > 2
    assert found["prompt_tokens_done"] == tokens and found["generation_tokens"] == 12
    assert f"Prompt: {tokens} of {tokens} tokens" in out and f"Seen: {tokens + 12} tokens, compressed" in out
    assert found["kv_bytes"] == found["budget"]["bytes"]
    pieces.clear()
    plain, out = made(capsys, "--prompt-file", prompt_file, "--prefill", taken, "--score", "attention")
    assert not pieces and "Score: attention\n" in out and plain["score"] == "attention"


def test_a_prompt_that_fits_is_read_once_and_the_output_says_so(capsys):
    _, out = made(capsys, "--prompt", "import os", "--score", "reread")
    assert "Score: reread (the prompt fits and is read once)" in out


def test_the_default_is_the_policys(capsys, prompt_file):
    assert made(capsys, "--prompt-file", prompt_file)[0]["score"] == Policy().score


def test_a_saved_prompt_keeps_its_score(capsys, tmp_path, prompt_file):
    file = str(tmp_path / "cache.safetensors")
    argv = ("--prompt-file", prompt_file, "--prompt-cache-file", file, "--kv-budget", "64", "--score", "reread")
    code, out, _ = run(cache_prompt.main, capsys, *argv)
    assert code == 0 and "Score: reread" in out and ", compressed" in out
    for same in ([], ["--score", "reread"]):
        code, _, _ = run(
            generate.main, capsys, "--prompt-cache-file", file, "--prompt", TEXT[1800:2300], "-m", "2", *same
        )
        assert code == 0
    code, _, err = run(generate.main, capsys, "--prompt-cache-file", file, "--prompt", "x", "--score", "attention")
    assert code == 2 and "--score attention differs from the score" in err and "(reread): leave --score out" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cache", "full"], "--score reread is of --cache zeromerge, so --cache full does not go with it"),
        (["--cache", "rotating"], "--cache rotating does not go with it"),
        (["--prefill-step-size", "1"], "--score reread needs a --prefill-step-size of 2 or more"),
    ],
)
def test_where_it_cannot_work_it_is_refused(capsys, argv, message):
    code, _, err = run(generate.main, capsys, "--prompt", "x", "--score", "reread", *argv)
    assert code == 2 and message in err


def test_an_unknown_score_is_refused(capsys):
    code, _, err = run(generate.main, capsys, "--prompt", "x", "--score", "both")
    assert code == 2 and "--score: invalid choice: 'both'" in err
