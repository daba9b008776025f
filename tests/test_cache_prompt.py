"""python -m zm_mlx.cache_prompt: a saved prompt goes on as if it had never been saved, or nothing is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import document, run, templated_model
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.utils import load_tokenizer
from test_generate import Interrupting

from zm_mlx import cache_prompt, generate
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.host import saved

TEXT = (Path(__file__).parent.parent / "zm_mlx" / "state" / "layout.py").read_text()
OPENING, REST = TEXT[:900].rpartition("\n")[0] + "\n", "def f("


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "cache.safetensors")


@pytest.fixture
def opening(tmp_path):
    path = tmp_path / "opening.txt"
    path.write_text(OPENING)
    return str(path)


def make(capsys, *argv):
    return run(cache_prompt.main, capsys, *argv)


def go_on(capsys, file, *argv):
    return run(generate.main, capsys, "--prompt-cache-file", file, "-m", "12", "--json", *argv)


@pytest.mark.parametrize("budget", [["--kv-budget", "64", "--prefill", "streaming"], ["--kv-budget", "1024"], []])
def test_a_saved_prompt_goes_on_as_one_generation_over_the_whole(capsys, tmp_path, file, opening, budget):
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    joined = tokenizer.encode(OPENING) + tokenizer.encode(REST, add_special_tokens=False)
    assert tokenizer.encode(OPENING + REST) == joined  # or there is nothing to compare
    code, out, _ = make(capsys, "--prompt-file", opening, "--prompt-cache-file", file, *budget)
    assert code == 0 and "Saved: " in out and file in out
    code, out, _ = go_on(capsys, file, "--prompt", REST)
    assert code == 0 and f"Seen: {len(joined) + 12} tokens" in out
    whole = tmp_path / "whole.txt"
    whole.write_text(OPENING + REST)
    _, other, _ = run(generate.main, capsys, "--prompt-file", str(whole), "-m", "12", "--json", *budget)
    assert document(out)["text"] == document(other)["text"]


def test_a_budget_of_auto_leaves_room_for_what_comes_after(capsys, file, opening):
    make(capsys, "--prompt-file", opening, "--prompt-cache-file", file)
    _, out, _ = go_on(capsys, file, "--prompt", REST)
    assert "not compressed, everything fits" in out


def test_a_fraction_is_one_of_the_saved_prompt(capsys, file, opening):
    code, out, _ = make(capsys, "--prompt-file", opening, "--prompt-cache-file", file, "--kv-budget", "0.5")
    tokens = len(load_tokenizer(DEFAULT_MODEL).encode(OPENING))
    caches, _ = saved.read(file)
    assert code == 0 and f"Seen: {tokens} tokens, compressed" in out
    assert {(c.offset, c.layout.capacity) for c in caches} == {(tokens, -(-tokens // 2))}


def test_a_chat_goes_on_after_its_opening(capsys, tmp_path, file):
    model = templated_model(tmp_path / "model")
    tokenizer = load_tokenizer(model)
    code, _, _ = make(capsys, "--model", model, "--prompt", "import os\n", "--prompt-cache-file", file)
    assert code == 0
    assert saved.read(file)[0][0].offset == len(tokenizer.encode("<s><user>\nimport os\n", add_special_tokens=False))
    code, out, _ = go_on(capsys, file, "--prompt", REST, "--chat-template-config", '{"think": "no"}')
    rest = tokenizer.encode("def f(</>\n<assistant>\n(no)", add_special_tokens=False)
    assert code == 0 and document(out)["prompt_tokens"] == len(rest)
    code, _, err = go_on(capsys, file, "--prompt", REST, "--chat-template-config", '{"tone": "rude"}')
    assert code == 2 and "--chat-template-config" in err
    code, _, err = go_on(capsys, file, "--prompt", REST, "--system-prompt", "x")
    assert code == 2 and "--system-prompt" in err


def test_the_file_says_what_mlx_lm_says_of_model_and_tokenizer(capsys, file):
    assert make(capsys, "--prompt", "import os", "--prompt-cache-file", file, "--eos-token", "def")[0] == 0
    metadata = saved.read(file)[1]
    assert metadata["model"] == DEFAULT_MODEL
    assert json.loads(metadata["tokenizer_config"]) == {"trust_remote_code": False, "eos_token": "def"}


def test_the_prompt_comes_from_standard_input_for_a_dash(file):
    command = [sys.executable, "-m", "zm_mlx.cache_prompt", "--prompt", "-", "--prompt-cache-file", file]
    done = subprocess.run(command, input=OPENING, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Prefill" in done.stderr, done.stderr
    assert saved.read(file)[0][0].offset == len(load_tokenizer(DEFAULT_MODEL).encode(OPENING))


def test_ctrl_c_in_the_prompt_writes_nothing_and_keeps_the_old_file(capsys, monkeypatch, tmp_path, file):
    make(capsys, "--prompt", "import os", "--prompt-cache-file", file)
    before = Path(file).read_bytes()
    monkeypatch.setattr(cache_prompt, "prefill_bar", lambda *_: Interrupting(1))
    code, _, err = make(capsys, "--prompt", OPENING, "--prompt-cache-file", file)
    tokens = len(load_tokenizer(DEFAULT_MODEL).encode(OPENING))
    told = f"interrupted after {tokens - 1} of {tokens} tokens, nothing was saved"
    assert (code, err) == (130, f"zm_mlx.cache_prompt: {told}\n")
    assert Path(file).read_bytes() == before and os.listdir(tmp_path) == ["cache.safetensors"]


def test_ctrl_c_while_saving_keeps_the_old_file(capsys, monkeypatch, tmp_path, file):
    make(capsys, "--prompt", "import os", "--prompt-cache-file", file)
    before = Path(file).read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved.os, "replace", interrupt)
    assert make(capsys, "--prompt", "x", "--prompt-cache-file", file)[0] == 130
    assert Path(file).read_bytes() == before and os.listdir(tmp_path) == ["cache.safetensors"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", "x", "--prompt-cache-file", "a.safetensors", "--prefill-step-size", "1"], "2 or more here"),
        (["--prompt", "x", "--prompt-cache-file", "a.safetensors", "--prefill-step-size", "0"], "an integer from 1 up"),
        (["--prompt-cache-file", "a.safetensors"], "--prompt or --prompt-file is needed"),
        (["--prompt", "x"], "--prompt-cache-file"),
        (["--prompt", "x", "--prompt-cache-file", ""], "--prompt-cache-file needs a name"),
        (["--prompt", "x", "--prompt-cache-file", "a.bin"], "ends in .safetensors"),
        (["--prompt", "x", "--prompt-cache-file", "no/such/a.safetensors"], "there is no folder no/such"),
        (["--prompt", "x", "--prompt-cache-file", "folder.safetensors"], "this is a folder"),
        (["--prompt", "", "--prompt-cache-file", "a.safetensors"], "the prompt is empty"),
        (["--prompt", "x", "--prompt-cache-file", "a.safetensors", "--kv-budget", "1"], "--kv-budget"),
        (["--prompt", "x", "--prompt-cache-file", "a.safetensors", "--kv-budget", "x"], "--kv-budget"),
        (["--prompt", "x", "--prompt-cache-file", "a.safetensors", "--model", "."], "--model .: cannot be loaded"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(capsys, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    code, out, err = make(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err
    assert os.listdir(tmp_path) == ["folder.safetensors"]


def test_a_file_of_mlx_lms_own_is_refused_by_generate(capsys, file):
    mlx_lm_cache.save_prompt_cache(file, [mlx_lm_cache.KVCache() for _ in range(4)], {"model": DEFAULT_MODEL})
    code, _, err = go_on(capsys, file, "--prompt", "x")
    assert code == 2 and err.count("\n") == 1 and "python -m zm_mlx.cache_prompt" in err
