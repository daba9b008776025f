"""Whole generations through the Metal kernels, executed from their own source."""

import warnings
from pathlib import Path

import metal_host
import mlx.core as mx
import pytest
import tiny
from mlx_lm import load
from tiny import held

import zm_mlx
from zm_mlx.generate import DEFAULT_MODEL, mlx_lm_generate
from zm_mlx.ops import check, choose
from zm_mlx.ops.kernels._common import kernel

PROMPT_TOKENS, NEW_TOKENS, BUDGET = 1000, 64, 100


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(DEFAULT_MODEL)
    model.set_dtype(mx.float32)
    text = (Path(zm_mlx.__file__).parent / "host" / "plan.py").read_text()
    return model, tokenizer.encode(text)[:PROMPT_TOKENS]


@pytest.fixture
def executor():
    """The kernels of this process run on the executor; nothing of it is left behind."""
    with metal_host.installed():
        kernel.cache_clear()
        choose._verified.cache_clear()
        yield
    kernel.cache_clear()
    choose._verified.cache_clear()


def tokens(model, prompt, kernels, prefill, chunk=512):
    caches = zm_mlx.make_prompt_cache(model, BUDGET, prompt_length=len(prompt), prefill=prefill, kernels=kernels)
    steps = mlx_lm_generate.generate_step(
        mx.array(prompt), model, prompt_cache=caches, max_tokens=NEW_TOKENS, prefill_step_size=chunk
    )
    return [token for token, _ in steps], caches


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_generation_through_the_kernels_is_token_identical_to_the_plain_ops(loaded, executor, prefill):
    model, prompt = loaded
    expected, plain = tokens(model, prompt, "ops", prefill)
    with warnings.catch_warnings(), metal_host.record() as launches:
        warnings.simplefilter("error")  # a kernel that was left out would pass for the plain ops
        found, caches = tokens(model, prompt, "metal", prefill)
    names = {launch.name for launch in launches}
    assert {"zm_attend", "zm_score"} <= names, names
    assert found == expected and len(found) == NEW_TOKENS
    for ours, theirs in zip(caches, plain, strict=True):
        assert ours.offset == theirs.offset == PROMPT_TOKENS + NEW_TOKENS
        assert mx.array_equal(held(ours, 0).position, held(theirs, 0).position)


def test_a_wrong_kernel_is_left_out_with_a_warning_and_the_text_stays_right(loaded, executor, monkeypatch):
    model, prompt = loaded
    expected, _ = tokens(model, prompt[:200], "ops", "streaming")
    right = check.kernel_of("attend")
    monkeypatch.setattr(
        "zm_mlx.ops.kernels.attend.attend", lambda *a, **k: (right(*a, **k)[0] * 1.1, right(*a, **k)[1])
    )
    with pytest.warns(UserWarning, match="'attend' is left out"):
        found, _ = tokens(model, prompt[:200], "metal", "streaming")
    assert found == expected


def test_a_kernel_that_does_not_compile_is_left_out_with_a_warning(loaded, executor, monkeypatch):
    model, prompt = loaded

    def fails(*_, **__):
        raise RuntimeError("no such builtin")

    monkeypatch.setattr("zm_mlx.ops.kernels.compact.compact", fails)
    with pytest.warns(UserWarning, match=r"'compact' is left out .*no such builtin"):
        found, _ = tokens(model, prompt[:200], "metal", "streaming")
    assert len(found) == NEW_TOKENS


@pytest.mark.parametrize(("heads", "launched"), [(32, ["zm_attend"]), (2, ["zm_attend", "zm_attend_join"])])
def test_launches_of_a_decode_step(executor, heads, launched):
    """Each launch costs on a GPU: one for attention and scores, a second where few heads need their rows split."""
    cache = tiny.cache(600, heads, kernels="metal")
    for length in (64, 1, 1):  # before the first of its shape a kernel is compared with its twin
        new = [mx.random.normal((1, heads, length, 64)) for _ in range(3)]
        mx.eval(new)
        with metal_host.record() as launches:
            mx.eval(cache.attend(new[0], *cache.update_and_fetch(*new[1:]), 0.125))
    assert [launch.name for launch in launches] == launched


def test_drafts_are_verified_by_the_kernels_and_taken_back_from_what_they_bound(loaded, executor):
    """Several tokens a call, single ones in between, and states from before a compaction that go on."""
    model, prompt = loaded[0], [*loaded[1][:150], *loaded[1][60:80]]

    def generated(kernels, draft):
        caches = zm_mlx.make_prompt_cache(model, BUDGET, kernels=kernels)
        if draft is None:
            steps = mlx_lm_generate.generate_step(mx.array(prompt), model, prompt_cache=caches, max_tokens=40)
            return [token for token, _ in steps]
        with zm_mlx.rollback(caches, 3):
            steps = mlx_lm_generate.speculative_generate_step(
                mx.array(prompt), model, draft, prompt_cache=caches, max_tokens=40, num_draft_tokens=3
            )
            return [token for token, _, _ in steps]

    with warnings.catch_warnings(), metal_host.record() as launches:
        warnings.simplefilter("error")
        found = generated("metal", zm_mlx.PromptLookup())
    assert {"zm_attend", "zm_attend_chunk"} <= {launch.name for launch in launches}
    assert found == generated("ops", None)
