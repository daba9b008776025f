"""Baselines that evict: the same tokens stay as by their papers' formulas, token by token in float64."""

import mlx.core as mx
import naive
import numpy as np
import pytest
import tiny
from tiny import f64, give, held, tokens

from zm_mlx.evaluation.exact import Source, compressed, scored
from zm_mlx.evaluation.recording import Layer
from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.policies import BY_NAME
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Call

SCALE = 8**-0.5


def source(layer, policy):
    return Source(layer, scored(layer, policy), policy)


LENGTH = 90


def oldest(cache, h):
    return -np.array(cache.heads[h].rows, float)


def heavy(cache, h):
    return cache.heads[h].since(0)


def voted(cache, h):
    return cache.heads[h].since(cache.last)


def last_query(cache, h):
    """The same tokens are in all heads."""
    assert all(head.rows == cache.heads[h].rows for head in cache.heads)
    query = cache.seen - 1
    return np.mean([[head.got[j][query].mean() for j in head.rows] for head in cache.heads], axis=0)


def short_keys(cache, h):
    return -np.linalg.norm(cache.keys[h, cache.heads[h].rows], axis=-1)


# settings, (context, newest, staging) of 21 rows, rule, pooling, queries that score an exact prompt
RULES = {
    "streaming_llm": ({}, (4, 14, 3), oldest, 1, 1),
    "h2o": ({}, (9, 9, 3), heavy, 1, LENGTH),
    "tova": ({}, (17, 1, 3), last_query, 1, 1),
    "snapkv": ({"newest": 6}, (12, 6, 3), voted, 7, 6),
    "pyramidkv": ({}, (10, 8, 3), voted, 7, 8),
    "adakv": ({"newest": 6}, (12, 6, 3), voted, 7, 6),
    "key_norm": ({}, (17, 1, 3), short_keys, 1, 1),
}


def made(name, staging=3):
    settings, regions, rule, pool, _ = RULES[name]
    policy = BY_NAME[name](staging=staging, **settings)
    layout = policy.layout(sum(regions), 2)
    assert (layout.context, layout.proximity, layout.staging) == ((regions[0],) * 2, *regions[1:])
    assert layout.residual == 0 and policy.pool == pool
    return policy, layout, naive.Evicting(regions, rule, pool)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_a_stream_keeps_what_the_papers_formula_keeps(name, seed):
    policy, layout, reference = made(name)
    q, k, v = tokens(seed, LENGTH)
    cache = ZeroMergeCache(layout, policy=policy)
    found = f64(give(cache, q, k, v, 7)[0])
    expected = reference.run(*(f64(x[0]) for x in (q, k, v)), SCALE)
    for h in range(2):
        assert held(cache, h).position.tolist() == reference.heads[h].rows
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_a_whole_prompt_keeps_what_the_papers_formula_keeps(name):
    """One compaction at the end, scored by the last queries of the full attention."""
    policy, layout, reference = made(name)
    queries = RULES[name][4]
    q, k, v = tokens(4, LENGTH)
    cache = compressed(source(Layer(Dense(k, v), Call(q, SCALE)), policy), layout)
    whole = naive.Evicting((LENGTH, 1, 1), reference.rule)  # evicts nothing
    whole.run(*(f64(x[0]) for x in (q, k, v)), SCALE)
    whole.context, whole.newest, whole.pool = reference.context, reference.newest, reference.pool
    whole.last = LENGTH - queries
    whole.compact()
    for h in range(2):
        assert held(cache, h).position.tolist() == whole.heads[h].rows
    assert policy.window == (None if queries == LENGTH else queries)


@pytest.mark.parametrize("name", RULES)
def test_an_exact_prefill_of_the_product_is_the_one_of_the_evaluation(name):
    policy, layout, _ = made(name)
    q, k, v = tokens(5, LENGTH)
    cache = ZeroMergeCache(layout, policy=policy, prefill="exact", prompt_length=LENGTH)
    give(cache, q, k, v, 40)
    tiny.assert_same_state(cache, compressed(source(Layer(Dense(k, v), Call(q, SCALE)), policy), layout))


def test_votes_begin_anew_after_each_compaction():
    policy, layout, _ = made("snapkv")
    cache = ZeroMergeCache(layout, policy=policy)
    q, k, v = tokens(1, 60)
    give(cache, q, k, v)
    assert cache.layer.since_compaction == 0
    assert not mx.any(cache.layer.scores.kept) and not mx.any(cache.layer.scores.recent)


def test_heads_of_different_rows_are_not_for_a_method_that_keeps_the_same_tokens_in_all():
    with pytest.raises(ValueError, match="cannot have different rows"):
        BY_NAME["tova"]().layout([20, 30], 2)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("rows", [3, 5, 12, 64, 400])
def test_few_rows_are_divided_without_losing_one(name, rows):
    policy = BY_NAME[name]()
    rows = max(rows, policy.smallest)
    layout = policy.layout(rows, 3)
    assert layout.rows == (rows,) * 3 and layout.proximity >= 1 and min(layout.context) >= 0


@pytest.mark.parametrize(
    ("name", "setting"),
    [("snapkv", {"newest": 0}), ("streaming_llm", {"sinks": -1}), ("cam", {"merged": 0}), ("pyramidkv", {"beta": 0.5}),
     ("adakv", {"safeguard": 1.5}), ("expected_attention", {"epsilon": -1.0})],
)  # fmt: skip
def test_a_setting_without_meaning_is_refused_by_name(name, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be"):
        BY_NAME[name](**setting)


@pytest.mark.parametrize("name", [n for n in BY_NAME if not BY_NAME[n].needs])
def test_a_baselines_cache_survives_saving(name):
    policy = BY_NAME[name](staging=3)
    cache = ZeroMergeCache(policy.layout(40, 2), policy=policy)
    give(cache, *tokens(1, 90), 7)
    again = ZeroMergeCache.from_state(cache.state)
    assert again.policy == policy and type(again.policy) is BY_NAME[name]
    tiny.assert_same_state(cache, again)
