"""The command line: what it prints, what it refuses, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import zm_mlx
from zm_mlx.generate import DEFAULT_MODEL, main, mlx_lm_generate
from zm_mlx.report import first_difference

TEXT = (Path(__file__).parent.parent / "zm_mlx" / "layout.py").read_text()


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT[:1500])
    return str(path)


def run(capsys, *argv):
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def document(out):
    return json.loads(out.splitlines()[-1])


def test_printed_budget_is_the_budget_of_the_caches(capsys, prompt_file):
    code, out, _ = run(
        capsys, "--prompt-file", prompt_file, "--kv-budget", "128", "--prefill", "streaming", "-m", "8", "--json"
    )
    told = document(out)
    assert code == 0
    assert "layers 0 to 3: 128 rows per head" in out
    assert told["budget"]["rows"] == [[128, 128]] * 4
    assert told["kv_bytes"] == told["budget"]["bytes"]
    assert told["full_kv_bytes"] > 3 * told["kv_bytes"]
    assert told["prefill"]["mode"] == "streaming"
    assert told["generation_tokens"] == 8


def test_fraction_budget_holds_a_fifth_of_the_bytes_and_says_which_prefill(capsys, prompt_file):
    code, out, _ = run(capsys, "--prompt-file", prompt_file, "--kv-budget", "0.2", "-m", "4", "--json")
    told = document(out)
    assert code == 0
    assert told["prefill"]["mode"] == "exact" and "fits into memory" in out
    assert 0.18 < told["kv_bytes"] / told["full_kv_bytes"] < 0.24
    assert "compressed" in out


def test_auto_budget_of_a_short_request_compresses_nothing_and_says_so(capsys):
    code, out, _ = run(capsys, "--prompt", "import os", "-m", "4")
    assert code == 0
    assert "not compressed" in out and "auto: prompt and new tokens" in out


def test_compare_shows_both_texts_sizes_and_the_first_difference(capsys, prompt_file):
    code, out, _ = run(capsys, "--prompt-file", prompt_file, "--kv-budget", "1.0", "-m", "1", "--compare", "--json")
    told = document(out)
    assert code == 0
    assert "--- full cache" in out and "--- zeromerge" in out and "prefill tokens/s" in out
    assert "The texts are the same (1 tokens)." in out
    assert told["full"]["text"] == told["text"]


def test_first_difference_counts_a_text_that_ends_early():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


@pytest.mark.parametrize("cache", ["full", "rotating"])
def test_other_caches_run_from_the_same_command(capsys, prompt_file, cache):
    code, out, _ = run(capsys, "--prompt-file", prompt_file, "--kv-budget", "64", "-m", "4", "--cache", cache, "--json")
    told = document(out)
    assert code == 0
    assert told["cache"] == cache and told["generation_tokens"] == 4
    assert (told["kv_bytes"] < told["full_kv_bytes"]) == (cache == "rotating")


def test_quiet_run_prints_the_text_only(capsys, prompt_file):
    code, out, err = run(capsys, "--prompt-file", prompt_file, "-m", "3", "--verbose", "False")
    assert code == 0
    assert "Budget" not in out and "KV cache" not in out and err == ""


def test_standard_input_is_read_for_a_dash(prompt_file):
    command = [sys.executable, "-m", "zm_mlx.generate", "--prompt", "-", "-m", "3", "--json"]
    with open(prompt_file) as stdin:
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert document(done.stdout)["prompt_tokens"] > 200
    assert "Prefill" in done.stderr


def test_prompt_past_the_trained_context_is_warned_about_and_served(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("zm_mlx.generate.context_of", lambda model: 100)
    path = tmp_path / "long.txt"
    path.write_text(TEXT[:600])
    code, out, err = run(capsys, "--prompt-file", str(path), "--kv-budget", "64", "-m", "2", "--json")
    assert code == 0
    assert "more than the 100 that the model was trained on" in err
    assert document(out)["generation_tokens"] == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", ""], "--prompt: the prompt is empty"),
        (["--prompt", " \n"], "--prompt: the prompt is empty"),
        (["--prompt-file", "no/such/file"], "--prompt-file no/such/file: No such file"),
        (["--prompt-file", "."], "--prompt-file .: Is a directory"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file"),
        (["--model", "no-such/model"], "--model no-such/model: not a local folder"),
        (["--model", "."], "--model .: cannot be loaded"),
        (["--kv-budget", "0"], "--kv-budget: a budget of 0"),
        (["--kv-budget", "-1"], "--kv-budget: a budget of -1"),
        (["--kv-budget", "1.5"], "--kv-budget: a budget of 1.5"),
        (["--kv-budget", "abc"], "--kv-budget: cannot read a budget of 'abc'"),
        (["--kv-budget", "5"], "the smallest that works here is 6"),
        (["--kv-budget", "1KB"], "the smallest that works is"),
        (["--max-tokens", "0"], "--max-tokens must be"),
        (["--max-tokens", "x"], "--max-tokens"),
        (["--prefill-step-size", "0"], "--prefill-step-size must be"),
        (["--kv-bits", "4"], "--kv-bits does not work here"),
        (["--max-kv-size", "64"], "use --kv-budget"),
        (["--draft-model", "x"], "--draft-model does not work here"),
        (["--system-prompt", "x"], "--system-prompt needs a chat template"),
        (["--prompt-cache-file", "no.safetensors"], "--prompt-cache-file: no prompt cache file at no.safetensors"),
        (["--compare", "--cache", "full"], "--compare"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(capsys, monkeypatch, argv, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert words in err and err.startswith("zm_mlx.generate: error:") and err.count("\n") == 1
    assert out == ""


def test_binary_file_is_refused(capsys, tmp_path):
    for name, data in (("utf", b"\xff\xfe\x00binary"), ("nul", b"text\0text")):
        path = tmp_path / name
        path.write_bytes(data)
        code, _, err = run(capsys, "--prompt-file", str(path))
        assert code == 2 and err.count("\n") == 1 and "text" in err


def test_saved_cache_continues_and_another_budget_is_refused(capsys, tmp_path):
    from mlx_lm import load

    model, tokenizer = load(DEFAULT_MODEL)
    caches = zm_mlx.make_prompt_cache(model, 64)
    for _ in mlx_lm_generate.stream_generate(model, tokenizer, TEXT[:400], max_tokens=1, prompt_cache=caches):
        pass
    path = str(tmp_path / "cache.safetensors")
    config = {"model": DEFAULT_MODEL, "tokenizer_config": "{}"}
    zm_mlx.save_prompt_cache(path, caches, config)
    code, out, _ = run(capsys, "--prompt-cache-file", path, "--prompt", "def f(", "-m", "3", "--json")
    assert code == 0 and document(out)["generation_tokens"] == 3
    code, _, err = run(capsys, "--prompt-cache-file", path, "--kv-budget", "128", "--prompt", "x")
    assert code == 2 and "--kv-budget 128" in err and "--prompt-cache-file" in err and "64 rows" in err
    code, _, err = run(capsys, "--prompt-cache-file", path, "--model", "other/model", "--prompt", "x")
    assert code == 2 and "--model other/model" in err and "--prompt-cache-file" in err


@pytest.mark.skipif(os.name != "posix", reason="SIGINT is sent as on a terminal")
def test_interrupt_ends_cleanly_with_the_statistics_so_far(prompt_file):
    command = [sys.executable, "-u", "-m", "zm_mlx.generate", "--prompt-file", prompt_file, "-m", "100000", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    seen = b""
    while seen.count(b"==========") < 1:  # the text begins
        seen += process.stdout.readline()
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    told = document((seen + out).decode())
    assert told["finish_reason"] == "interrupted"
