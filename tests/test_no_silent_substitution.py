"""Features of mlx-lm that this cache does not serve must say so by name."""

import importlib

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.models.cache import can_trim_prompt_cache

import zm_mlx
from zm_mlx.generate import DEFAULT_MODEL

generate = importlib.import_module("mlx_lm.generate")


@pytest.fixture(scope="module")
def model():
    return load(DEFAULT_MODEL)[0]


def test_kv_bits_raises_naming_the_flag(model):
    caches = zm_mlx.make_prompt_cache(model, 64)
    steps = generate.generate_step(
        mx.arange(2, 20), model, prompt_cache=caches, kv_bits=8, quantized_kv_start=0, max_tokens=4
    )
    with pytest.raises(ValueError, match="--kv-bits"):
        list(steps)


def test_speculation_raises_naming_the_cache(model):
    caches = zm_mlx.make_prompt_cache(model, 64) + zm_mlx.make_prompt_cache(model, 64)
    steps = generate.speculative_generate_step(mx.arange(2, 20), model, model, prompt_cache=caches, max_tokens=4)
    with pytest.raises(ValueError, match="ZeroMergeCache"):
        list(steps)


def test_trimming_says_that_it_does_nothing(model):
    caches = zm_mlx.make_prompt_cache(model, 64)
    model(mx.arange(2, 12)[None], cache=caches)
    assert not can_trim_prompt_cache(caches)
    assert caches[0].trim(3) == 0 and caches[0].offset == 10
