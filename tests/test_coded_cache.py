"""Rows as codes: rounded once, moved as they are, counted in the budget, never made numbers as a whole."""

import copy

import mlx.core as mx
import numpy as np
import pytest
import tiny
from tiny import f64

from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.packed import unpack
from zm_mlx.policies import Policy, ZeroMerge
from zm_mlx.state.layout import LayerShape

DIM = 64
BITS = [8, 4]


def made(bits: int | None, rows=(48, 40), policy=Policy, dim=DIM, **more) -> ZeroMergeCache:
    given = policy(kv_bits=bits, kv_group_size=32 if dim % 64 else None)
    return tiny.cache(rows, policy=given, kernels="ops", **more)


def codes_of(cache: ZeroMergeCache) -> dict[tuple[int, int], bytes]:
    """The codes of all raw tokens, by stored head and position."""
    state, found = cache.layer, {}
    kept, recent = state.kept.rows.coded, state.recent.coded
    for h in range(cache.layout.heads):
        begin, end = cache.layout.starts[h : h + 2]
        for i in range(begin, end):
            position = state.kept.position[0, i].item()
            if position >= 0:
                found[h, position] = b"".join(bytes(memoryview(x[0, i])) for x in kept.arrays())
        for j in range(state.closed):
            found[h, state.departed + j] = b"".join(bytes(memoryview(x[0, h, j])) for x in recent.arrays())
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("policy", [Policy, ZeroMerge])
def test_a_token_is_rounded_once_and_its_codes_move_as_they_are(bits, policy):
    q, k, v = tiny.tokens(0, 150, dim=DIM)
    cache, seen = made(bits, policy=policy), {}
    for t in range(150):
        tiny.give(cache, q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
        for place, codes in codes_of(cache).items():
            assert seen.setdefault(place, codes) == codes, place
    right = mx.quantize(k[0, :, 100], 64, bits)
    held = [p for p in seen if p[1] == 100]
    assert held and all(seen[p].startswith(bytes(memoryview(right[0][cache.layout.order[p[0]]]))) for p in held)
    assert cache.layer.departed > 48 + 40


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_bytes_are_those_of_the_layout(bits, dtype):
    q, k, v = tiny.tokens(0, 120, dim=DIM, value_dim=32, dtype=dtype)
    cache = tiny.cache(48, policy=Policy(kv_bits=bits, kv_group_size=32), kernels="ops")
    shape, most = LayerShape(2, DIM, 32, dtype.size), 0
    for t in range(120):
        tiny.give(cache, q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
        most = max(most, cache.nbytes)
        assert cache.nbytes <= cache.layout.nbytes(shape)
    assert cache.nbytes == most == cache.layout.nbytes(shape)


@pytest.mark.parametrize("bits", BITS)
def test_a_state_does_not_depend_on_how_tokens_are_cut(bits):
    q, k, v = tiny.tokens(1, 130, dim=DIM)
    caches = [made(bits) for _ in range(3)]
    outputs = [f64(tiny.give(c, q, k, v, size)) for c, size in zip(caches, (1, 7, 130), strict=True)]
    for out, cache in zip(outputs[1:], caches[1:], strict=True):
        np.testing.assert_allclose(out, outputs[0], atol=2e-4)
        assert codes_of(cache) == codes_of(caches[0])


def test_eight_bits_are_nearly_the_rows_themselves():
    q, k, v = tiny.tokens(2, 40, dim=DIM)
    exact, coded = made(None), made(8)
    a, b = (f64(tiny.give(c, q, k, v, 9)) for c in (exact, coded))
    assert 1e-5 < np.abs(a - b).max() < 0.05


@pytest.mark.parametrize("prefill", [{}, {"prefill": "exact", "prompt_length": 100}])
@pytest.mark.parametrize("policy", [Policy, ZeroMerge])
def test_a_saved_cache_and_a_copy_go_on_as_the_one_they_were_made_of(policy, prefill):
    q, k, v = tiny.tokens(3, 140, dim=DIM)
    cache = made(4, policy=policy, **prefill)
    tiny.give(cache, q[:, :, :110], k[:, :, :110], v[:, :, :110], 30)
    others = [copy.deepcopy(cache), ZeroMergeCache.from_state(cache.state)]
    want = f64(tiny.give(cache, q[:, :, 110:], k[:, :, 110:], v[:, :, 110:], 1))
    for other in others:
        np.testing.assert_array_equal(f64(tiny.give(other, q[:, :, 110:], k[:, :, 110:], v[:, :, 110:], 1)), want)
        assert codes_of(other) == codes_of(cache)
    assert unpack(cache.state).layout == cache.layout
