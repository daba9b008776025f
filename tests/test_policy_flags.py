"""--policy and --score of the commands: what they say of them, what they change, and where they are refused."""

from pathlib import Path

import pytest
from commands import document, run

from zm_mlx import cache_prompt, generate
from zm_mlx.host import prefill
from zm_mlx.policies import BY_NAME, OFFERED

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


def test_the_default_is_zeromerge_with_its_own_score(capsys, prompt_file):
    found, out = made(capsys, "--prompt-file", prompt_file)
    assert (found["policy"], found["score"]) == ("zeromerge", "replay")
    assert "Policy: zeromerge\nScore: replay\n" in out


@pytest.mark.parametrize("name", OFFERED)
@pytest.mark.parametrize("taken", ["exact", "streaming"])
def test_every_policy_that_is_offered_works_and_is_named(capsys, prompt_file, name, taken):
    found, out = made(capsys, "--prompt-file", prompt_file, "--policy", name, "--prefill", taken)
    own = BY_NAME[name]
    assert found["policy"] == name and f"Policy: {name}\n" in out
    assert ("Score:" in out) == (own.importance is BY_NAME["compensated"].importance)
    assert found["kv_bytes"] == found["budget"]["bytes"] and "compressed" in out


def test_a_policy_changes_the_text_and_a_score_what_it_keeps(capsys, prompt_file):
    texts = {
        made(capsys, "--prompt-file", prompt_file, *argv)[0]["text"]
        for argv in ([], ["--policy", "compensated"], ["--policy", "key_norm"])
    }
    assert len(texts) > 1
    assert made(capsys, "--prompt-file", prompt_file, "--policy", "paper", "--score", "replay")[0]["score"] == "replay"


def test_policies_that_need_more_than_a_cache_knows_are_not_offered(capsys):
    for name in ("kvzip", "expected_attention", "adakv"):
        code, _, err = run(generate.main, capsys, "--prompt", "x", "--policy", name)
        assert code == 2 and f"--policy: invalid choice: '{name}'" in err


def test_a_model_whose_rotation_is_not_known_is_told(capsys, prompt_file, monkeypatch):
    monkeypatch.setattr("zm_mlx.host.plan.turns", lambda model, shapes, by: [None] * len(shapes))
    found, out = made(capsys, "--prompt-file", prompt_file)
    layers = len(found["budget"]["rows"])
    assert f"Score: replay (attention alone in {layers} of {layers} layers, whose rotation is not known)" in out


def test_a_saved_prompt_keeps_its_policy_and_score(capsys, tmp_path, prompt_file):
    file = str(tmp_path / "cache.safetensors")
    argv = ("--prompt-file", prompt_file, "--prompt-cache-file", file, "--kv-budget", "64")
    code, out, _ = run(cache_prompt.main, capsys, *argv, "--score", "reread", "--policy", "compensated")
    assert code == 0 and "Policy: compensated\nScore: reread" in out and ", compressed" in out
    for same in ([], ["--score", "reread"], ["--policy", "compensated"]):
        code, _, _ = run(
            generate.main, capsys, "--prompt-cache-file", file, "--prompt", TEXT[1800:2300], "-m", "2", *same
        )
        assert code == 0
    code, _, err = run(generate.main, capsys, "--prompt-cache-file", file, "--prompt", "x", "--score", "attention")
    assert code == 2 and "--score attention differs from the score" in err and "(reread): leave --score out" in err
    code, _, err = run(generate.main, capsys, "--prompt-cache-file", file, "--prompt", "x", "--policy", "paper")
    assert code == 2 and "--policy paper differs from the policy" in err and "(compensated): leave --policy out" in err


REREAD = ["--score", "reread"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*REREAD, "--cache", "full"], "--score reread is of --cache zeromerge, so --cache full does not go with it"),
        ([*REREAD, "--cache", "rotating"], "--cache rotating does not go with it"),
        ([*REREAD, "--prefill-step-size", "1"], "--score reread needs a --prefill-step-size of 2 or more"),
        (["--policy", "paper", "--cache", "full"], "--policy paper is of --cache zeromerge, so --cache full"),
        (
            ["--policy", "tova", "--score", "replay"],
            "--score replay does not go with --policy tova: tova has an importa",
        ),
        (["--policy", "key_norm", "--score", "attention"], "--score attention does not go with --policy key_norm"),
    ],
)
def test_where_it_cannot_work_it_is_refused(capsys, argv, message):
    code, _, err = run(generate.main, capsys, "--prompt", "x", *argv)
    assert code == 2 and message in err


def test_it_is_refused_before_the_model_is_loaded(capsys, tmp_path):
    argv = ("--model", str(tmp_path / "none"), "--prompt", "x", "--policy", "cam", "--score", "reread")
    for main, more in (
        (generate.main, ()),
        (cache_prompt.main, ("--prompt-cache-file", str(tmp_path / "x.safetensors"))),
    ):
        code, _, err = run(main, capsys, *argv, *more)
        assert code == 2 and "--score reread does not go with --policy cam" in err


def test_an_unknown_score_is_refused(capsys):
    code, _, err = run(generate.main, capsys, "--prompt", "x", "--score", "both")
    assert code == 2 and "--score: invalid choice: 'both'" in err
