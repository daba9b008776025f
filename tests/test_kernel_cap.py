"""Scores with a soft cap in the kernels that compute scores, run from their Metal source."""

import warnings

import metal_host
import mlx.core as mx
import model_configs
import prefill_kernels as pk
import pytest
import test_kernel_attend as decoding
from test_other_attention import TOLERANCE, difference
from tiny import feed, prompt

import zm_mlx
from zm_mlx.ops import choose
from zm_mlx.ops.kernels import _common

CAP = 0.7  # of scores that are about 1


@pytest.fixture
def executor():
    _common.kernel.cache_clear()
    choose._verified.cache_clear()
    with metal_host.installed():
        yield
    _common.kernel.cache_clear()
    choose._verified.cache_clear()


@pytest.mark.parametrize("rows", ["merged, uniform", "split"])
def test_a_step_of_decoding_equals_the_plain_ops(executor, rows):
    given = decoding.data(*decoding.ROWS[rows], groups=3, size=2)
    decoding.check(given.with_call(cap=CAP), seeds=(1,), traced=rows != "split")


@pytest.mark.parametrize(
    ("check", "dtype"), [(pk.check_attend, mx.float16), (pk.check_score, mx.float32)], ids=["attend", "score"]
)
def test_a_chunk_equals_the_plain_ops(check, dtype):
    given = pk.problem(pk.Case(dtype, (64, 64), 3, "ragged"))
    check(given.with_call(cap=CAP), seeds=(1,))


def test_scores_far_beyond_the_cap_are_the_cap(executor):
    """A tanh by exponentials of its argument would be NaN there."""
    given = decoding.data(*decoding.ROWS["merged, uniform"], size=1e4)
    decoding.check(given.with_call(cap=CAP), seeds=(1,), traced=False)


def test_gemma_2_through_the_kernels_has_the_logits_of_the_plain_ops(executor, monkeypatch):
    monkeypatch.setitem(model_configs.OVERRIDES, "gemma2", {"head_dim": 64})
    model, tokens = model_configs.architecture("gemma2"), prompt(60, vocab=model_configs.VOCAB)

    def run(kernels):
        caches = zm_mlx.make_prompt_cache(model, 40, kernels=kernels)
        return mx.concatenate([feed(model, caches, tokens[:, :54], 9), feed(model, caches, tokens[:, 54:], 1)], axis=1)

    expected = run("ops")
    with warnings.catch_warnings(), metal_host.record() as launches:
        warnings.simplefilter("error")  # a kernel that was left out would pass for the plain ops
        found = run("metal")
    assert {"zm_attend", "zm_attend_chunk"} <= {launch.name for launch in launches}
    assert difference(found, expected) < TOLERANCE
