"""Plans: what a machine cannot hold and what cannot be meant is refused before anything is allocated."""

import re
import resource
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import tiny

import zm_mlx
from zm_mlx.host import plan

MB = 10**6


@pytest.fixture
def small_machine(monkeypatch):
    """50 MB are free."""
    monkeypatch.setattr(plan, "free_bytes", lambda reserve=0: 50 * MB)


@pytest.mark.parametrize("budget", [10**6, 10**9, 10**30, "51MB", "20GB", "1000GB", 10**60])
def test_a_budget_beyond_memory_is_refused_with_what_would_fit(small_machine, budget):
    model = tiny.model()
    before = mx.get_active_memory()
    with pytest.raises(ValueError, match=r"free here: at most \d+ rows per head fit|is too large") as error:
        zm_mlx.make_prompt_cache(model, budget)
    assert mx.get_active_memory() < before + 100_000
    if "fit" in str(error.value):
        rows = int(str(error.value).split("at most ")[1].split()[0])
        assert 49 * MB < zm_mlx.plan_cache(model, rows).nbytes <= 50 * MB


def test_fractions_tables_and_exact_prompts_beyond_memory_are_refused(small_machine):
    model = tiny.model()
    with pytest.raises(ValueError, match="at most"):
        zm_mlx.make_prompt_cache(model, 1.0, prompt_length=10**6)
    with pytest.raises(ValueError, match="at most"):
        zm_mlx.make_prompt_cache(model, None, head_rows=[[10**6, 300]] * 2)
    with pytest.raises(ValueError, match="prefill='streaming'"):
        zm_mlx.make_prompt_cache(model, 64, prompt_length=10**6, prefill="exact")
    assert zm_mlx.plan_cache(model, 64, prompt_length=10**6).prefill == "streaming"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of an address space is Linux's")
def test_a_budget_beyond_the_address_space_is_one_line_and_no_crash():
    command = [sys.executable, "-m", "zm_mlx.generate", "--prompt", "x", "--kv-budget", "5GB", "-m", "1"]

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (4 * 10**9, 4 * 10**9))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and re.search(r"what fits: --kv-budget \d+; --force", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": None}, "model must be an mlx-lm model"),
        ({"model": "llama"}, "model must be an mlx-lm model"),
        ({"policy": "x"}, "policy must be a zm_mlx.Policy, not 'x'"),
        ({"policy": zm_mlx.Policy}, "policy must be a zm_mlx.Policy"),
        ({"head_rows": [64] * 4, "kv_budget": None}, "head_rows needs for each layer a table"),
        ({"head_rows": 64, "kv_budget": None}, "head_rows needs for each layer a table"),
        ({"head_rows": [[64, 64]] * 3, "kv_budget": None}, "head_rows needs 2 tables"),
        ({"head_rows": [[64, 64, 64]] * 2, "kv_budget": None}, "needs 2 numbers"),
        ({"head_rows": [[64, 64.5]] * 2, "kv_budget": None}, "rows per head are whole numbers"),
        ({"head_rows": [["64", "64"]] * 2, "kv_budget": None}, "rows per head are whole numbers"),
        ({"head_rows": [[64, 64]] * 2}, "give kv_budget=None"),
        ({"kv_budget": None}, "kv_budget must be given"),
        ({"kv_budget": [64]}, "cannot read a budget"),
        ({"kv_budget": True}, "cannot read a budget"),
        ({"kv_budget": "9" * 5000}, "cannot read a budget"),
        ({"kv_budget": float("nan")}, "not a fraction"),
        ({"prefill": "exact"}, "give prompt_length"),
        ({"prefill": "fast"}, "prefill must be"),
        ({"prompt_length": "9"}, "prompt_length must be 1 token or more"),
        ({"prompt_length": 9.5}, "prompt_length must be 1 token or more"),
        ({"max_tokens": -1}, "max_tokens must be 0 tokens or more"),
        ({"kernels": "gpu"}, "kernels must be one of"),
    ],
)
def test_arguments_that_cannot_be_meant_raise_and_name_themselves(arguments, words):
    arguments = {"model": tiny.model(), "kv_budget": 64} | arguments
    with pytest.raises(ValueError, match=words):
        zm_mlx.make_prompt_cache(arguments.pop("model"), arguments.pop("kv_budget"), **arguments)


def test_tables_may_be_arrays():
    rows = np.array([[64, 90], [70, 64]])
    assert [a.rows for a in zm_mlx.plan_cache(tiny.model(), None, head_rows=rows).layouts] == [(64, 90), (70, 64)]
