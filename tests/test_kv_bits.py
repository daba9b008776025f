"""kv_bits with a ZeroMerge cache: mlx-lm would ignore it for 5,000 tokens and then fail in mid-prompt."""

import importlib

import mlx.core as mx
import pytest
import tiny
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache, RotatingKVCache

mlx_lm_generate = importlib.import_module("mlx_lm.generate")


def generate(made, caches, progress=None, **more):
    steps = mlx_lm_generate.generate_step(
        tiny.prompt(40)[0],
        made,
        prompt_cache=caches,
        max_tokens=3,
        prefill_step_size=8,
        prompt_progress_callback=progress,
        **more,
    )
    return [token for token, _ in steps]


@pytest.mark.parametrize("bits", [8, 4, 0])
@pytest.mark.parametrize("start", [{}, {"quantized_kv_start": 0}, {"quantized_kv_start": 20}])
def test_kv_bits_are_refused_before_a_token_of_the_prompt_is_processed(bits, start):
    processed = []
    with pytest.raises(ValueError, match=f"kv_bits={bits}"):
        generate(
            tiny.model(),
            [tiny.cache(20), tiny.cache(20)],
            lambda done, _: processed.append(done),
            kv_bits=bits,
            **start,
        )
    assert processed == [0]


@pytest.mark.parametrize(
    "caches",
    [
        [KVCache(), CacheList(RotatingKVCache(8), tiny.cache(20))],
        [CacheList(CacheList(tiny.cache(20)))],
    ],
)
def test_a_cache_inside_a_container_is_seen(caches):
    with pytest.raises(ValueError, match="kv_bits"):
        mlx_lm_generate.maybe_quantize_kv_cache(caches, quantized_kv_start=5000, kv_group_size=64, kv_bits=8)


def test_without_kv_bits_nothing_is_refused():
    assert len(generate(tiny.model(), [tiny.cache(20), tiny.cache(20)])) == 3


def test_mlx_lms_own_caches_are_still_quantised():
    made, caches = tiny.model(head_dim=64), [KVCache(), KVCache()]
    generate(made, caches, kv_bits=8, quantized_kv_start=0)
    assert [type(c) for c in caches] == [QuantizedKVCache] * 2
    assert all(isinstance(x, mx.array) for c in caches for x in c.keys)
