"""zm_mlx/ops/plain/decode.py: recorded and replayed steps against the plain ops of any number of queries."""

import copy
import gc
import threading

import mlx.core as mx
import numpy as np
import pytest
import tiny

from zm_mlx.ops.plain import attention, decode
from zm_mlx.policies import Policy
from zm_mlx.state.state import Call

PUBLISHED = Policy(kappa=0, pool=1, alpha=0.6)
POLICIES = [Policy(), PUBLISHED, Policy(alpha=0, kappa=0), Policy(residual=0), Policy(residual=1, decay=1)]


def fed(rows, policy, tokens, groups, *, dim=16, value_dim=8):
    """A cache that streamed random tokens, and queries for one more."""
    mx.random.seed(tokens)
    cache = tiny.cache(rows, 4, policy)
    new = [mx.random.normal((2, h, tokens, d)) for h, d in ((4 * groups, dim), (4, dim), (4, value_dim))]
    keys, values = cache.update_and_fetch(*new[1:])
    mx.eval(cache.attend(new[0], keys, values, 0.25))
    return cache, mx.random.normal((2, 4 * groups, 1, dim)) * 3


def both(cache, queries, sinks=None, scale=0.25):
    """Output and scores of a replayed step, and of the plain ops."""
    given = (Call(queries, scale, sinks), cache.layer, cache.layout, cache.policy)
    out, scores = decode.bind(*given).step(queries, cache.layer)
    expected, expected_scores = attention.attend(*given)
    return (out, *scores), (expected, *expected_scores)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [256, (256, 96, 160, 96)], ids=["uniform", "ragged"])
@pytest.mark.parametrize("tokens", [1, 5, 90, 150, 200, 333, 500], ids=lambda n: f"{n} tokens")
def test_a_replayed_step_equals_the_plain_ops(rows, policy, groups, tokens):
    cache, queries = fed(rows, policy, tokens, groups)
    for sinks in (None, mx.random.normal((4 * groups,)) * 2):
        for name, x, y in zip(("output", "kept", "recent"), *both(cache, queries, sinks), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype, name
            np.testing.assert_allclose(np.array(x), np.array(y), atol=2e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("tokens", range(500, 509))
def test_rows_that_are_not_filled_yet_are_invisible(tokens):
    """Between two compactions a step reads up to an eighth of the staging rows too many."""
    cache, queries = fed(256, Policy(), tokens, 1)
    assert cache.layout.staging // 8 == 4
    filled = cache.layer.filled
    cache.layer = cache.layer._replace(recent=cache.layer.recent.map(lambda x: x.at[:, :, filled:].add(50.0)))
    for x, y in zip(*both(cache, queries), strict=True):
        np.testing.assert_allclose(np.array(x), np.array(y), atol=2e-5, rtol=1e-4)


def test_kept_rows_that_are_not_filled_yet_are_invisible():
    cache, queries = fed(256, Policy(), 150, 1)
    full = cache.layout.groups[0].rows
    departed, kept = cache.layer.departed, cache.layer.kept
    assert 0 < departed < full and departed % (full // 8)
    empty = mx.arange(kept.weight.shape[1]) % full >= departed
    rows = kept.rows._replace(keys=mx.where(empty[:, None], 50.0, kept.rows.keys))
    cache.layer = cache.layer._replace(kept=kept._replace(rows=rows))
    for x, y in zip(*both(cache, queries), strict=True):
        np.testing.assert_allclose(np.array(x), np.array(y), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=["float32", "float16"])
def test_scores_do_not_pile_up_as_graph_between_compactions(dtype):
    """Decode evaluates only the output of a step."""
    cache = tiny.cache(512)
    new = [mx.random.normal((1, 2, 520, 64)).astype(dtype) for _ in range(3)]
    mx.eval(cache.attend(new[0], *cache.update_and_fetch(*new[1:]), 0.125))
    active = []
    for _ in range(50):
        keys, values = cache.update_and_fetch(*(x[:, :, :1] for x in new[1:]))
        mx.eval(cache.attend(new[0][:, :, :1], keys, values, 0.125))
        active.append(mx.get_active_memory())
    assert cache.layer.since_compaction > 50, "a compaction evaluates everything"
    assert max(active[5:]) - min(active[5:]) < cache.nbytes / 50


@pytest.mark.parametrize("first", [0, 1], ids=["original", "copy"])
def test_of_two_copies_the_one_that_rests_does_not_hold_its_keys_twice(first):
    """A step holds keys dimension by dimension, and the state's own are computed from them when somebody reads them."""
    cache = tiny.cache(512)
    new = [mx.random.normal((1, 2, 530, 64)) for _ in range(3)]
    one = [x[:, :, :1] for x in new]
    mx.eval(*one)
    before = mx.get_active_memory()
    mx.eval(cache.attend(new[0], *cache.update_and_fetch(*new[1:]), 0.125))

    def decode(cache, tokens):
        for _ in range(tokens):
            mx.eval(cache.attend(one[0], *cache.update_and_fetch(*one[1:]), 0.125))

    decode(cache, 3)
    del new
    both = [cache, copy.deepcopy(cache)]
    decode(both[first], cache.layout.staging + 3)
    assert both[0].layer.departed != both[1].layer.departed, "one of them has compacted"
    held = sum(c.nbytes for c in both)
    gc.collect()
    assert mx.get_active_memory() - before < 1.05 * held
    decode(both[1 - first], 3)
    gc.collect()
    assert mx.get_active_memory() - before < 1.05 * held


def test_steps_are_recorded_a_few_times_and_not_at_each_token():
    cache, queries = fed(200, Policy(decay=0.97), 600, 1)  # a policy of no other test
    decode._compiled.cache_clear()
    for _ in range(100):
        keys, values = cache.update_and_fetch(mx.ones((2, 4, 1, 16)), mx.ones((2, 4, 1, 8)))
        mx.eval(cache.attend(queries, keys, values, 0.25))
    assert cache.offset == 700 and decode._compiled.cache_info().misses <= 9


def test_a_step_recorded_in_one_thread_serves_another():
    """The server generates in a thread of its own."""
    cache, queries = fed(96, Policy(), 333, 1)
    expected = [np.array(x) for x in both(cache, queries)[0]]
    found = []

    def work():
        with mx.stream(mx.new_stream(mx.default_device())):
            mine, _ = both(cache, queries)
            mx.eval(mine)
            found.extend(np.array(x) for x in mine)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
