"""The evaluation's command: what it prints and draws, what it refuses, how it stops and goes on."""

import json

import commands
import pytest
from evaluated import PROSE, subject

from zm_mlx import evaluate
from zm_mlx.errors import UserError
from zm_mlx.evaluation import run as running
from zm_mlx.evaluation import subject as subjects
from zm_mlx.evaluation.tasks.files import read_rows

# With a tiny model in place of the shipped one, where only the command is meant.
SMALL = "--documents 2 --prompt-tokens 512 --budgets 0.2 --caches streaming_llm zeromerge --tasks continuation".split()


def run(capsys, *argv):
    return commands.run(evaluate.main, capsys, *argv)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(PROSE)
    return str(path)


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setattr(evaluate, "_subject", lambda args: subject())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_the_shipped_model_is_evaluated_on_pythons_own_texts(capsys):
    code, out, _ = run(capsys, *SMALL, "--documents", "1")
    assert code == 0 and "continuation: loss above full (nats a token), 512 tokens, 1 documents" in out


@pytest.mark.usefixtures("tiny_model")
def test_a_run_shows_means_errors_and_differences_and_says_which_table_shares_rows_out(capsys, book):
    code, out, _ = run(capsys, "--texts", book, *SMALL, "--json")
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and "zeromerge: uniform rows per head: no table for this model" in out
    by_cache = {r["cache"]: r for r in told["results"]}
    assert set(by_cache) == {"full", "streaming_llm", "zeromerge"} and told["table"] is None
    ours = by_cache["zeromerge"]["metrics"]["loss"]
    shown = "{:.3f} ±{:.3f} ({:+.3f} ±{:.3f})".format(
        ours["mean"], ours["error"], ours["against_window"]["mean"], ours["against_window"]["error"]
    )
    assert shown.replace("±0.", "±.") in out
    assert told["settings"]["prompt_tokens"] == [512] and not told["interrupted"]


@pytest.mark.usefixtures("tiny_model")
def test_a_second_run_measures_nothing_and_says_the_same(capsys, book, monkeypatch):
    first = run(capsys, "--texts", book, *SMALL)[1]
    monkeypatch.setattr(running, "time", None)  # nothing may be measured
    code, out, err = run(capsys, "--texts", book, *SMALL)
    assert (code, out) == (0, first) and "6 of 6 measurements are in evaluate.jsonl already" in err


@pytest.mark.usefixtures("tiny_model")
def test_ctrl_c_shows_what_there_is_and_the_next_run_goes_on(capsys, book, folder, monkeypatch):
    whole = run(capsys, "--texts", book, *SMALL, "--output", "whole.jsonl")[1]
    count, append = [0], running.Records.append

    def interrupted(self, record):
        if count[0] == 4:
            raise KeyboardInterrupt
        count[0] += 1
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(running.Records, "append", interrupted)
        code, out, err = run(capsys, "--texts", book, *SMALL, "--json")
    assert code == 130 and "interrupted; run it again to go on, evaluate.jsonl has what was measured" in err
    assert json.loads(out.splitlines()[-1])["interrupted"] and "1 documents" not in out
    assert len((folder / "evaluate.jsonl").read_text().splitlines()) == 4
    code, out, err = run(capsys, "--texts", book, *SMALL)
    assert (code, out) == (0, whole) and "4 of 6 measurements" in err
    assert len((folder / "evaluate.jsonl").read_text().splitlines()) == 6


@pytest.mark.usefixtures("tiny_model")
def test_a_change_of_settings_leaves_the_other_results_out(capsys, book):
    run(capsys, "--texts", book, *SMALL)
    _, out, err = run(capsys, "--texts", book, *SMALL, "--seeds", "1", "--json")
    assert "already" not in err
    assert all(r["items"] == 2 for r in json.loads(out.splitlines()[-1])["results"])


@pytest.mark.usefixtures("tiny_model")
def test_a_figure_is_drawn_where_it_was_asked_for(capsys, book, folder):
    code, out, _ = run(capsys, "--texts", book, *SMALL, "--documents", "1", "--figure", "x.svg")
    drawn = (folder / "x.svg").read_text()
    assert code == 0 and "Figure: x.svg" in out and drawn.count(">zeromerge</text>") == 1 and "tiny" in drawn


@pytest.mark.usefixtures("tiny_model")
def test_only_the_full_cache_is_no_picture_and_no_error(capsys, book, folder):
    code, out, _ = run(capsys, "--texts", book, *SMALL, "--caches", "full", "--figure", "x.png", "--documents", "1")
    assert code == 0 and "Figure" not in out and not (folder / "x.png").exists()


# ---- files of a user


@pytest.mark.usefixtures("tiny_model")
def test_prompts_and_answers_of_a_file_are_scored(capsys, folder):
    rows = [
        {"prompt": "Count: one, two, three, " * 40, "answer": ["four", "five"], "max_tokens": 5},
        {"prompt": "The capital of France is " * 60, "reference": "Paris", "max_tokens": 5},
    ]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    argv = "--data x.jsonl --tasks files --caches streaming_llm zeromerge --budgets 0.3 --json".split()
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "files: exact match, 2 documents (higher is better)" in out
    for found in json.loads(out.splitlines()[-1])["results"]:
        assert set(found["metrics"]) == {"exact", "f1", "contained", "rouge1", "rouge2", "rougeL"}
        assert found["items"] == 2


def test_rows_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"prompt": "a\u2028b", "answer": "c"}\n\n{"prompt": "d", "reference": ["e", "f"], "max_tokens": 3}'
    )
    one, other = read_rows([str(path)])
    assert (one.prompt, one.right, one.max_tokens) == ("a\u2028b", ("c",), 128)
    assert (other.name, other.right, other.max_tokens) == (f"{path} line 3", ("e", "f"), 3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no JSON"),
        ("[]", 'a text "prompt"'),
        ('{"prompt": 1, "answer": "a"}', 'a text "prompt"'),
        ('{"prompt": "a"}', '"answer" or "reference"'),
        ('{"prompt": "a", "answer": []}', '"answer" or "reference"'),
        ('{"prompt": "a", "answer": [1]}', '"answer" or "reference"'),
        ('{"prompt": " ", "answer": "a"}', "prompt is empty"),
        ('{"prompt": "a", "answer": "b", "max_tokens": 0}', '"max_tokens" must be'),
        ('{"prompt": "a", "answer": "b", "max_tokens": true}', '"max_tokens" must be'),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')
    with pytest.raises(UserError) as error:
        read_rows([str(path)])
    assert f"--data {path} line 2" in str(error.value) and words in str(error.value)


def test_prompts_that_the_model_has_no_room_for_are_left_out_and_said(capsys, folder):
    (folder / "x.jsonl").write_text(json.dumps({"prompt": "word " * 5000, "answer": "a"}))
    code, _, err = run(capsys, *"--data x.jsonl --tasks files --caches zeromerge".split())
    assert code == 2 and "left out: files: x.jsonl line 1" in err and "more than the model's 4096" in err
    assert err.rstrip().endswith("nothing could be measured, for the reasons above")


# ---- what cannot be meant


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--caches rotatory", "--caches: no cache is called 'rotatory'; there are full, rotating"),
        ("--caches rotating-uniform-", "--caches: no cache is called"),
        ("--budgets 20", "--budgets must be a share of the full cache's bytes, above 0 and at most 1, not 20"),
        ("--budgets 0", "--budgets must be a share"),
        ("--budgets nan", "--budgets must be a share"),
        ("--documents 0", "--documents must be an integer from 1 up, not 0"),
        ("--documents few", "--documents must be an integer from 1 up, not 'few'"),
        ("--prompt-tokens 100", "--prompt-tokens must be an integer from 512 up"),
        ("--prompt-tokens 4000", "--prompt-tokens 4000: this model's context has room for 3712"),
        ("--seeds -1", "--seeds must be an integer from 0 up"),
        ("--tasks speed", "argument --tasks: invalid choice: 'speed'"),
        ("--tasks files", "--tasks files: give its prompts and answers by --data FILE"),
        ("--data none.jsonl", "--data none.jsonl: No such file"),
        ("--texts none.txt", "--texts none.txt: no such file or folder"),
        ("--texts short.txt", "give longer"),
        ("--output none/x.jsonl", "--output none/x.jsonl: there is no folder none"),
        ("--output .", "--output .: this is a folder"),
        ("--json none/x.json", "--json none/x.json: there is no folder none"),
        ("--figure x.jpeg", "--figure x.jpeg: the name must end in .png, .svg, .pdf"),
        ("--figure none/x.png", "--figure none/x.png: there is no folder none"),
        ("--model nowhere", "--model nowhere"),
        ("--model=", "--model needs a name"),
        ("--fast", "unrecognized arguments: --fast (--help lists the flags)"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_writes_nothing(capsys, folder, argv, words):
    (folder / "short.txt").write_text("too short\n" * 50)
    code, out, err = run(capsys, *argv.split())
    assert code == 2 and err.count("\n") == 1 and words in err, err
    assert out.startswith("zeromerge: uniform") or not out
    assert [p.name for p in folder.iterdir()] == ["short.txt"]


def test_texts_are_refused_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda source: 1 / 0)
    assert run(capsys, "--texts", "none.txt")[0] == 2


def test_a_figure_without_its_library_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, _, err = run(capsys, "--figure", "x.png")
    assert code == 2 and "pip install 'zm-mlx[evaluate]'" in err


@pytest.mark.usefixtures("tiny_model")
def test_a_cache_that_does_not_fit_is_left_out_and_the_others_are_shown(capsys, book):
    argv = [*SMALL, "--documents", "1", "--caches", "quantized", "streaming_llm", "--budgets", "0.05"]
    code, out, err = run(capsys, "--texts", book, *argv)
    assert code == 0 and "warning: left out: quantized at 5 %, continuation: mlx-lm's quantised cache takes" in err
    assert "streaming_llm" in out


def test_a_model_whose_rotation_is_not_known_is_said(capsys, book, monkeypatch):
    made = subjects.Subject(subject().engine)
    monkeypatch.setattr(subjects, "turns", lambda *_: [made.model, None])
    monkeypatch.setattr(evaluate, "_subject", lambda args: made)
    code, _, err = run(capsys, "--texts", book, *SMALL, "--documents", "1")
    assert code == 0 and "warning: zeromerge scores by attention alone in 1 of 2 layers" in err


@pytest.mark.usefixtures("tiny_model")
def test_a_damaged_output_file_is_said_and_used(capsys, book, folder):
    (folder / "evaluate.jsonl").write_text("nonsense\n")
    code, _, err = run(capsys, "--texts", book, *SMALL, "--documents", "1")
    assert code == 0 and "warning: evaluate.jsonl: 1 lines are no records" in err
