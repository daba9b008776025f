"""CaM: evicted values go to those behind them, one after the other, as often as attention says."""

import mlx.core as mx
import numpy as np
import pytest
from tiny import f64, give, tokens

from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.policies import BY_NAME
from zm_mlx.policies.cam import CaM, passed_on, probabilities

SCALE = 8**-0.5


def test_the_probability_is_attention_over_the_mean_of_those_that_follow():
    attention = np.random.default_rng(0).random((1, 2, 20)).astype(np.float32)
    attention[0, 0, 3], attention[0, 1, 6:] = 0, 0  # 0 / x and 0 / 0 are no reason to merge, x / 0 is
    found = np.array(probabilities(mx.array(attention), 4))[0]
    for h in range(2):
        for i in range(20):
            after = attention[0, h, i + 1 : i + 5].astype(np.float64)
            a = float(attention[0, h, i])
            expected = 0 if not len(after) or a == 0 else 1 if not after.sum() else min(1, a / after.mean())
            assert found[h, i] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("merged", [1, 4, 32])
def test_values_move_on_with_what_was_merged_into_them(merged):
    rng = np.random.default_rng(1)
    values, joins = rng.standard_normal((1, 2, 20, 3)), rng.random((1, 2, 15)) < 0.6
    expected = values.copy()
    for h in range(2):
        for i in range(15):
            if joins[0, h, i]:
                expected[0, h, i + 1 : i + 1 + merged] += expected[0, h, i] / merged
    found = passed_on(mx.array(values.astype(np.float32)), mx.array(joins), merged)
    np.testing.assert_allclose(f64(found), expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 90])
def test_a_stream_is_the_papers_loop(monkeypatch, size):
    """Against a loop in float64 over tokens, with every draw a merge."""
    certain = lambda p, key=None: p > 0  # noqa: E731
    monkeypatch.setattr(mx.random, "bernoulli", certain)
    policy = CaM(staging=3, merged=5)
    cache = ZeroMergeCache(policy.layout(21, 2), policy=policy)
    q, k, v = tokens(2, 90)
    found = f64(give(cache, q, k, v, size)[0])
    q, k, v = (f64(x[0]) for x in (q, k, v))
    values, rows, out = v.copy(), [], np.zeros_like(q)
    for t in range(90):
        rows.append(t)
        for g in range(4):
            logits = k[g // 2, rows] @ q[g, t] * SCALE
            p = np.exp(logits - logits.max())
            out[g, t] = p / p.sum() @ values[g // 2, rows]
        if (t + 1 - 21) % 3 == 0 and len(rows) > 18:
            for i in rows[4 : len(rows) - 14]:
                behind = slice(i + 1, min(i + 6, t + 1))
                values[:, behind] += values[:, i : i + 1] / 5
            rows = rows[:4] + rows[-14:]
    np.testing.assert_allclose(found, out, atol=2e-4)


def test_one_prompt_gives_one_cache_and_draws_matter():
    q, k, v = tokens(3, 90)
    made = []
    for merged in (32, 32, 5):
        policy = CaM(staging=3, merged=merged)
        cache = ZeroMergeCache(policy.layout(21, 2), policy=policy, prefill="exact", prompt_length=90)
        give(cache, q, k, v, 40)
        made.append(f64(cache.layer.recent.values))
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])
    plain = BY_NAME["streaming_llm"](staging=3)
    cache = ZeroMergeCache(plain.layout(21, 2), policy=plain, prefill="exact", prompt_length=90)
    give(cache, q, k, v, 40)
    assert np.abs(made[0] - f64(cache.layer.recent.values))[:, :, : cache.layer.filled].max() > 0.05
