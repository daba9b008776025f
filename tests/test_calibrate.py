"""Calibration: heads that use old tokens get the rows, the same ones every time, and the table is used afterwards."""

import json
import shutil
from pathlib import Path

import commands
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.utils import load_model

from zm_mlx import calibrate, generate
from zm_mlx.calibration import importance, shares
from zm_mlx.calibration.finding import BESIDE
from zm_mlx.calibration.fingerprint import lineage
from zm_mlx.calibration.table import Table
from zm_mlx.evaluation import recording
from zm_mlx.evaluation.recording import Layer
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.ops.plain import attention
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Call

MEASURES = [importance.long_range, importance.reread]


def text(length=300, seed=0):
    return tiny.prompt(length, seed)[0].tolist()


def flat(points):
    return np.array([[x for layer in found for x in layer] for _, found in points])


# ---- importance


def layer(sinks=None, heads=2, groups=2, count=40, seed=0):
    q, k, v = tiny.tokens(seed, count, heads=heads, groups=groups)
    return Layer(Dense(k, v), Call(q, 0.5, sinks))


@pytest.mark.parametrize("sinks", [None, mx.array([0.5, 2.0, -1.0, 0.0])])
def test_far_attention_is_the_maximum_from_afar_of_a_softmax_over_all(sinks):
    made, far = layer(sinks), 7
    q, k = (tiny.f64(x)[0] for x in (made.call.queries, made.rows.keys))
    expected = np.zeros((2, 40))
    for h in range(4):
        for i in range(40):
            e = np.exp(0.5 * k[h // 2, : i + 1] @ q[h, i])
            p = e / (e.sum() + (0 if sinks is None else np.exp(sinks[h].item())))
            for j in range(max(0, i - far + 1)):
                expected[h // 2, j] = max(expected[h // 2, j], p[j])
    np.testing.assert_allclose(importance.far_attention(made, far), expected, atol=1e-6)
    assert not expected[:, -far:].any() and (expected[:, :-far] > 0).all()


def test_blocks_of_queries_change_nothing(monkeypatch):
    whole = importance.far_attention(layer(), 5)
    monkeypatch.setattr(attention, "LOGIT_BYTES", 4 * 4 * 40 * 3)
    np.testing.assert_allclose(importance.far_attention(layer(), 5), whole, atol=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_token_of_every_head_is_measured(measure):
    found = measure(tiny.model(), text())
    assert [x.shape for x in found] == [(2, 300)] * 2
    old = mx.stack(found)[..., :200]
    assert mx.isfinite(old).all() and (old > 0).all() and (old <= 1).all()


# ---- shares


def test_rows_go_to_the_heads_of_the_most_important_tokens():
    far, near = mx.arange(40.0).reshape(1, 40) + 100, mx.arange(40.0).reshape(1, 40)
    found = shares.counted([mx.concatenate([near, far]), mx.concatenate([near, near])])
    assert found[0.025] == ((0.0, 4.0), (0.0, 0.0))
    assert found[0.2] == ((0.0, 4.0), (0.0, 0.0))  # 32 of 160 tokens
    layers = found[0.4]  # 64: all 40 of the far ones, and 8 of each of the others
    assert layers == ((8 / 16, 40 / 16), (8 / 16, 8 / 16))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_calibration_is_the_same_every_time_and_for_any_cut_of_the_text(measure, monkeypatch):
    model, texts = tiny.model(), [text(300, 1), text(300, 2)]
    first = shares.calibrated(model, texts, measure)
    assert shares.calibrated(model, texts, measure) == first
    monkeypatch.setattr(recording, "STEP", 37)
    monkeypatch.setattr(attention, "LOGIT_BYTES", 4 * 8 * 300 * 11)
    again = shares.calibrated(model, texts, measure)
    np.testing.assert_allclose(flat(again), flat(first), atol=0.05)
    assert flat(first).std(axis=1).min() > 0.05  # or nothing was compared


def test_shares_are_those_of_the_texts_on_average():
    model, texts = tiny.model(), [text(280, 1), text(280, 2)]
    each = [flat(shares.calibrated(model, [t], importance.long_range)) for t in texts]
    both = flat(shares.calibrated(model, texts, importance.long_range))
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2, atol=1e-3)
    np.testing.assert_allclose(both.mean(axis=1), 1, atol=1e-3)
    with pytest.raises(ValueError, match="needs a text"):
        shares.calibrated(model, [], importance.long_range)


# ---- the command


def run(capsys, *argv):
    return commands.run(calibrate.main, capsys, *argv)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Line {i}: the {i * 7 % 13} of {i * 5 % 11}, and so on.\n" for i in range(400)))
    return str(path)


@pytest.fixture
def prompt(file, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(Path(file).read_text()[:700])
    return str(path)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "some_model"
    shutil.copytree(DEFAULT_MODEL, path)
    return path


SMALL = ["--documents", "2", "--prompt-tokens", "256"]


def test_a_table_is_made_and_used_by_itself_afterwards(capsys, folder, file, prompt, tables):
    code, out, _ = run(capsys, "--model", str(folder), "--texts", file, *SMALL)
    made = tables / f"{lineage(load_model(folder)[0])}.json"
    assert code == 0 and f"Saved: {made}" in out and "some_model" in out
    table = Table.read(made)
    assert table.made == {"importance": "second reading", "texts": 2, "tokens": 256}
    assert [f for f, _ in table.points] == list(shares.FRACTIONS) and table.heads == (2,) * 4
    try:
        for model in (str(folder), DEFAULT_MODEL):  # the same weights
            ask = ["--model", model, "--prompt-file", prompt, "--kv-budget", "100", "-m", "1"]
            code, out, _ = commands.run(generate.main, capsys, *ask)
            assert code == 0 and "by the table of some_model" in out and str(made) in out
    finally:
        made.unlink()


def test_a_table_beside_its_model_is_used_too(capsys, folder, file, prompt):
    assert run(capsys, "--model", str(folder), "--texts", file, *SMALL, "--output", str(folder / BESIDE))[0] == 0
    _, out, _ = commands.run(
        generate.main, capsys, "--model", str(folder), "--prompt-file", prompt, "--kv-budget", "100", "-m", "1"
    )
    assert "by the table of some_model" in out


def test_the_same_texts_make_the_same_file(capsys, file, tmp_path):
    made = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in made:
        assert run(capsys, "--texts", file, *SMALL, "--output", str(path))[0] == 0
    assert made[0].read_text() == made[1].read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--documents", "0"], "--documents must be an integer from 1 up"),
        (["--prompt-tokens", "255"], "--prompt-tokens must be an integer from 256 up"),
        (["--prompt-tokens", "5000"], "--prompt-tokens 5000 is more than the 4096"),
        (["--texts", "/nowhere/x.txt"], "--texts /nowhere/x.txt"),
        (["--output", "/nowhere/x.json"], "no folder /nowhere"),
        (["--output", "."], "this is a folder"),
        (["--model", "nowhere"], "--model nowhere"),
        (["--fast"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_writes_nothing(capsys, monkeypatch, tmp_path, tables, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and err.count("\n") == 1 and words in err
    assert not list(tables.iterdir()) and not list(tmp_path.iterdir())


def test_texts_that_are_too_short_are_said(capsys, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short\n" * 100)
    code, out, err = run(capsys, "--texts", str(short), *SMALL, "--output", str(tmp_path / "x.json"))
    assert (code, out) == (2, "") and "--texts" in err and not (tmp_path / "x.json").exists()


def test_ctrl_c_writes_nothing_and_ends_in_one_line(capsys, monkeypatch, file, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "calibrated", interrupted)
    old = tmp_path / "x.json"
    old.write_text("old")
    code, out, err = run(capsys, "--texts", file, *SMALL, "--output", str(old))
    assert (code, out) == (130, "") and err.endswith("zm_mlx.calibrate: interrupted\n")
    assert old.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["book.txt", "x.json"]


def test_a_table_says_in_plain_json_what_it_is(capsys, file, tmp_path):
    path = tmp_path / "x.json"
    assert run(capsys, "--texts", file, *SMALL, "--output", str(path))[0] == 0
    found = json.loads(path.read_text())
    assert found["name"] == "small_model" and set(found["shares"]) == {str(f) for f in shares.FRACTIONS}
