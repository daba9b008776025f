"""The command line: what it prints, what it refuses, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import mlx.core as mx
import pytest
import tiny
from commands import document
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

import zm_mlx
from zm_mlx import generate
from zm_mlx.errors import UserError
from zm_mlx.generate import DEFAULT_MODEL, main, mlx_lm_generate
from zm_mlx.host import caches
from zm_mlx.host.caches import Wish
from zm_mlx.host.plan import plan_cache
from zm_mlx.loading import WIDENED, widen
from zm_mlx.report import first_difference

TEXT = (Path(__file__).parent.parent / "zm_mlx" / "state" / "layout.py").read_text()


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT[:1500])
    return str(path)


def run(capsys, *argv):
    return commands.run(main, capsys, *argv)


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
    assert "--- full cache" in out and "--- zeromerge" in out and "--- rotating" not in out
    assert "zeromerge: the text of full (1 tokens)." in out
    assert told["full"]["text"] == told["text"]
    assert told["first_difference"] == {"from": "full", "zeromerge": None}


def test_several_caches_are_compared_in_one_table_with_the_full_one_first(capsys):
    prompt = f"The code for Titan is 40713.\n{TEXT[:1200]}\nThe code for Titan is"
    argv = ["--prompt", prompt, "--kv-budget", "0.4", "-m", "6", "--json", "--compare", "rotating", "full"]
    code, out, _ = run(capsys, *argv)
    told = document(out)
    texts = {"full": told["full"]["text"], "rotating": told["rotating"]["text"], "zeromerge": told["text"]}
    lines = out.splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("cache "))
    assert code == 0
    assert [line for line in lines if line.startswith("---")] == [
        "--- full cache",
        "--- rotating cache",
        "--- zeromerge",
    ]
    for (name, text), line in zip(texts.items(), lines[head + 1 : head + 4], strict=True):
        assert line.startswith(name) and line.endswith(f"  {text!r}")
    assert "40713" in texts["full"] and "40713" in texts["zeromerge"]
    at = told["first_difference"].pop("rotating")
    assert told["first_difference"] == {"from": "full", "zeromerge": None}
    assert any(line.startswith(f"rotating: first differs from full at token {at}: ") for line in lines)
    assert "zeromerge: the text of full (6 tokens)." in lines
    assert told["rotating"]["kv_bytes"] < told["kv_bytes"] < told["full"]["kv_bytes"]
    assert told["rotating"]["cache"] == "rotating" and told["cache"] == "zeromerge"


def test_without_the_full_cache_the_other_one_is_the_measure(capsys, prompt_file):
    argv = ["--prompt-file", prompt_file, "--kv-budget", "64", "-m", "2", "--compare", "rotating", "--json"]
    told = document(run(capsys, *argv)[1])
    assert "full" not in told and set(told["first_difference"]) == {"from", "zeromerge"}
    assert told["first_difference"]["from"] == "rotating"


@pytest.mark.parametrize("table", [None, [[20, 40], [60, 80]]])
def test_a_rotating_cache_beside_has_as_many_rows_per_head(table):
    model = tiny.model(2)
    plan = plan_cache(model, None if table else 50, head_rows=table)
    beside = caches.beside(model, "rotating", plan)
    assert [c.max_size for c in beside.every] == [50, 50]


def test_a_comparison_ends_with_an_interrupted_run(capsys, prompt_file, monkeypatch):
    monkeypatch.setattr(generate, "prefill_bar", lambda *_: Interrupting(64))
    argv = ["--prompt-file", prompt_file, "--prefill-step-size", "64", "--compare", "full", "rotating", "--json"]
    code, out, _ = run(capsys, *argv)
    assert code == 130 and document(out)["cache"] == "full" and "--- rotating" not in out


def test_a_named_model_is_computed_as_it_is_stored(capsys, tmp_path):
    (tmp_path / "model").symlink_to(DEFAULT_MODEL)
    argv = ["--prompt", "import os", "-m", "1", "--cache", "full", "--json"]
    _, out, _ = run(capsys, *argv, "--model", str(tmp_path / "model"))
    assert "float32" not in out
    _, wide, _ = run(capsys, *argv)
    if mx.default_device() == mx.cpu:
        assert WIDENED in wide and document(wide)["kv_bytes"] == 2 * document(out)["kv_bytes"]
    else:
        assert document(wide)["kv_bytes"] == document(out)["kv_bytes"]


@pytest.mark.parametrize(
    ("device", "itemsize", "wide"),
    [(mx.cpu, None, True), (mx.gpu, None, False), (mx.cpu, 2, False), (mx.gpu, 4, True)],
)
def test_rows_of_a_saved_prompt_decide_before_the_machine(monkeypatch, device, itemsize, wide):
    model = tiny.model(1)
    model.set_dtype(mx.float16)
    monkeypatch.setattr("zm_mlx.loading.mx.default_device", lambda: mx.Device(device))
    assert widen(model, itemsize) is wide
    dtypes = {x.dtype for _, x in tree_flatten(model.parameters())}
    assert dtypes == {mx.float32 if wide else mx.float16}


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


@pytest.mark.parametrize(
    ("context", "new", "words"),
    [
        (100, "2", "more than the 100 that the model was trained on"),
        (250, "60", "from new token 15 on"),
        (250, "-1", "from new token 15 on"),
        (296, "60", None),
        (295, "60", "from new token 60 on"),
    ],
)
def test_passing_the_trained_context_is_warned_about_and_served(capsys, tmp_path, monkeypatch, context, new, words):
    monkeypatch.setattr("zm_mlx.generate.context_of", lambda model: context)
    monkeypatch.setattr("zm_mlx.generate._run", lambda *_: (_ for _ in ()).throw(UserError("far enough")))
    monkeypatch.setattr("zm_mlx.prompts.encode", lambda *_: list(range(236)))
    _, _, err = run(capsys, "--prompt", "x", "--kv-budget", "64", "-m", new)
    warnings = [line for line in err.splitlines() if line.startswith("warning")]
    assert [words in w for w in warnings] == ([True] if words else [])


def test_a_long_prompt_brings_no_other_words_about_its_length(tmp_path):
    """transformers logs to the stream that it found at import, so only a process of its own shows its words."""
    path = tmp_path / "long.txt"
    path.write_text("a b " * 2500)
    command = [sys.executable, "-m", "zm_mlx.generate", "--prompt-file", str(path), "--kv-budget", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    warning, error = done.stderr.splitlines()
    assert done.returncode == 2 and "the smallest that works" in error
    assert warning.startswith("warning: ") and "more than the 4096 that the model was trained on" in warning


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
        (["--kv-budget", "2"], "the smallest that works here is 3"),
        (["--kv-budget", "1KB"], "the smallest that works is"),
        (["--max-tokens", "0"], "--max-tokens must be"),
        (["--max-tokens", "x"], "--max-tokens"),
        (["--prefill-step-size", "0"], "--prefill-step-size must be"),
        (["--system-prompt", "x"], "--system-prompt needs a chat template"),
        (["--prompt-cache-file", "no.safetensors"], "--prompt-cache-file: no prompt cache file at no.safetensors"),
        (["--compare", "--cache", "full"], "--compare"),
        (["--compare", "full", "full"], "--compare full full: name each cache once"),
        (["--compare", "zeromerge"], "--compare: invalid choice: 'zeromerge'"),
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


@pytest.fixture
def saved(tmp_path):
    """A saved prompt of the small model, in 64 rows."""
    from mlx_lm import load

    def make(**metadata):
        model, tokenizer = load(DEFAULT_MODEL)
        made = zm_mlx.make_prompt_cache(model, 64)
        for _ in mlx_lm_generate.stream_generate(model, tokenizer, TEXT[:400], max_tokens=1, prompt_cache=made):
            pass
        path = str(tmp_path / "cache.safetensors")
        zm_mlx.save_prompt_cache(path, made, {"model": DEFAULT_MODEL, "tokenizer_config": "{}", **metadata})
        return path

    return make


def test_saved_cache_continues_and_another_budget_is_refused(capsys, saved):
    path = saved()
    for budget in ([], ["--kv-budget", "64"], ["--kv-budget", "064"], ["--prefill", "exact"]):
        argv = ["--prompt-cache-file", path, "--prompt", "def f(", "-m", "3", "--json", *budget]
        code, out, _ = run(capsys, *argv)
        told = document(out)
        assert code == 0 and told["generation_tokens"] == 3 and ", compressed" in out and told["model"] == DEFAULT_MODEL
    for budget in ("128", "auto", "0.5", "1MB"):
        code, _, err = run(capsys, "--prompt-cache-file", path, "--kv-budget", budget, "--prompt", "x")
        assert code == 2 and f"--kv-budget {budget}" in err and "--prompt-cache-file" in err and "64 rows" in err
    code, _, err = run(capsys, "--prompt-cache-file", path, "--model", "other/model", "--prompt", "x")
    assert code == 2 and "--model other/model" in err and "--prompt-cache-file" in err


@pytest.mark.parametrize("text", ["{bad", "[]", "5", "", '{"eos_token": 5}'])
def test_a_damaged_tokenizer_config_in_a_file_is_one_line(capsys, saved, text):
    code, _, err = run(capsys, "--prompt-cache-file", saved(tokenizer_config=text), "--prompt", "x")
    assert code == 2 and err.count("\n") == 1 and "--prompt-cache-file" in err


def test_a_model_that_a_file_names_and_nobody_has_is_the_fault_of_the_file(capsys, saved):
    code, _, err = run(capsys, "--prompt-cache-file", saved(model="no/such/model"), "--prompt", "x")
    assert code == 2 and "--prompt-cache-file" in err and "--model" not in err


def falcon():
    """A model with a CacheList of a recurrent and a growing cache in each layer."""
    config = {
        "model_type": "falcon_h1",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    }
    made, arguments = _get_classes(config)
    return made(arguments.from_dict(config))


def test_a_model_with_cache_lists_counts_and_checks_the_caches_inside(tmp_path):
    model, file = falcon(), str(tmp_path / "cache.safetensors")
    first = caches.fresh(model, "zeromerge", Wish("40", "streaming"), 60, 1)
    tiny.feed(model, first.every, tiny.prompt(60), 16)
    zm_mlx.save_prompt_cache(file, first.every)
    assert (first.seen, first.state) == (60, "compressed")
    with pytest.raises(UserError, match=r"--kv-budget 50 differs .*40 rows"):
        caches.continued(model, file, Wish("50"), 30)
    going = caches.continued(model, file, Wish("40", "exact"), 30)
    assert going.before == 60
    tiny.feed(model, going.every, tiny.prompt(20), 20)
    assert (going.seen, going.state) == (80, "held whole, to be compressed at the prompt's end")
    tiny.feed(model, going.every, tiny.prompt(10), 10)
    assert (going.seen, going.state) == (90, "compressed")


@pytest.mark.parametrize("kind", ["full", "rotating", "zeromerge"])
def test_sizes_are_compared_like_with_like(kind):
    """The recurrent layers' bytes are in both sizes, and a full cache is as large as itself."""
    model = falcon()
    made = caches.fresh(model, kind, Wish("8", "streaming"), 60, 1)
    tiny.feed(model, made.every, tiny.prompt(60), 16)
    tiny.feed(model, made.every, tiny.prompt(1), 1)  # ends the prompt, and the piece of it that is held beyond the rows
    others = sum(c.nbytes for layer in made.every for c in layer.caches if c not in made.growing)
    assert others > 0 and len(made.growing) == 2
    if kind == "full":
        assert made.full_bytes == made.nbytes
    else:
        # tokens, layers, heads, keys and values, dims, bytes
        assert made.full_bytes - others == 61 * 2 * 2 * 2 * 16 * 4
        assert made.nbytes < made.full_bytes


def test_a_full_cache_is_not_compared_with_itself(capsys):
    code, out, _ = run(capsys, "--prompt", "import os", "-m", "2", "--cache", "full", "--json")
    assert code == 0 and "in a full cache" not in out
    assert document(out)["kv_bytes"] == document(out)["full_kv_bytes"]


@pytest.mark.parametrize("cache", ["zeromerge", "full"])
def test_the_same_seed_gives_the_text_of_mlx_lm(capsys, monkeypatch, tmp_path, cache):
    (tmp_path / "model").symlink_to(DEFAULT_MODEL)  # a name of its own: unnamed, it is float32 on a CPU
    argv = ["--prompt", "import os", "--temp", "1", "--seed", "7", "-m", "12", "--verbose", "False"]
    argv += ["--model", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["generate", *argv])
    mlx_lm_generate.main()
    theirs = capsys.readouterr().out
    _, ours, _ = run(capsys, *argv, "--cache", cache)
    assert len(theirs) > 12 and ours == theirs


def test_both_runs_of_a_comparison_draw_the_same_numbers(capsys):
    for seed in (["--seed", "7"], []):
        argv = ["--prompt", "import os", "--temp", "1", "-m", "12", "--compare", "--json", *seed]
        told = document(run(capsys, *argv)[1])
        assert told["full"]["text"] == told["text"]


def adapter(folder, rank):
    """A LoRA adapter for two layers of the small model that changes what it says."""
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = load(DEFAULT_MODEL)
    settings = {"rank": rank, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, settings)
    weights = {k: mx.ones_like(x) for k, x in tree_flatten(model.parameters()) if k.endswith(("lora_a", "lora_b"))}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    told = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {**settings, "rank": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return str(folder)


def test_an_adapter_is_used_and_one_that_does_not_fit_is_its_own_fault(capsys, tmp_path):
    argv = ["--prompt", "import os", "-m", "4", "--json"]
    plain = document(run(capsys, *argv)[1])["text"]
    code, out, _ = run(capsys, *argv, "--adapter-path", adapter(tmp_path / "good", 2))
    assert code == 0 and document(out)["text"] != plain
    code, _, err = run(capsys, *argv, "--adapter-path", adapter(tmp_path / "bad", 3))
    assert code == 2 and err.count("\n") == 1 and "error: --adapter-path" in err


class Interrupting:
    """A progress bar during which Ctrl-C is pressed, once so many tokens are done."""

    def __init__(self, after):
        self.after, self.n = after, 0

    def update(self, count):
        self.n += count
        if self.n >= self.after:
            raise KeyboardInterrupt

    def close(self):
        pass


@pytest.mark.parametrize(
    ("argv", "state"),
    [
        (["--kv-budget", "64", "--prefill", "streaming"], "compressed"),
        (["--kv-budget", "600", "--prefill", "streaming"], "not compressed so far"),
        (["--kv-budget", "64", "--prefill", "exact"], "held whole"),
        (["--cache", "full"], None),
        (["--cache", "rotating", "--kv-budget", "64"], None),
    ],
)
@pytest.mark.parametrize("after", [0, 256])
def test_an_interrupted_prefill_says_what_is_held(capsys, prompt_file, monkeypatch, argv, state, after):
    monkeypatch.setattr(generate, "prefill_bar", lambda *_: Interrupting(after))
    argv = ["--prompt-file", prompt_file, "--prefill-step-size", "64", "--json", *argv]
    code, out, _ = run(capsys, *argv)
    told = document(out)
    assert code == 130 and told["finish_reason"] == "interrupted" and told["generation_tokens"] == 0
    assert f"Prompt: {after} of {told['prompt_tokens']} tokens" in out and told["prompt_tokens_done"] == after
    if state is not None:
        expected = state if after or state == "held whole" else "not compressed so far"
        assert f"Seen: {after} tokens, {expected}" in out
    if state == "held whole" and after:
        assert told["kv_bytes"] > told["full_kv_bytes"]  # room for the whole prompt


def test_an_interrupt_between_two_layers_counts_what_all_layers_have():
    model = tiny.model(1)
    made = caches.fresh(model, "zeromerge", Wish("20", "streaming"), 100, 1)
    tiny.feed(model, made.every, tiny.prompt(50), 10)
    made.growing[0].update_and_fetch(*(mx.zeros((1, made.growing[0].layout.heads, 5, 16)),) * 2)
    run = generate.Run("zeromerge", 100)
    run.prefilled(40, 100)
    run.close(made)
    assert (run.prompt_done, run.seen, run.state) == (50, 50, "compressed")


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
