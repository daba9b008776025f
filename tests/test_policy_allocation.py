"""Rows of heads and layers by PyramidKV, Ada-KV and KVzip: their formulas, and no row lost or won."""

import mlx.core as mx
import numpy as np
import pytest
from tiny import give, held, tokens

from zm_mlx.budget import Budget, Request, resolve
from zm_mlx.evaluation.exact import Source, compressed, fitted, scored
from zm_mlx.evaluation.recording import Layer
from zm_mlx.policies import BY_NAME, Policy, allocation
from zm_mlx.state.layout import LayerShape
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Call

LENGTH = 90


def sources(policy, layers=2, reading=None):
    found = []
    for seed in range(layers):
        q, k, v = tokens(seed, LENGTH, sharp=3.0)
        # Sharp and flat heads, so that their shares differ.
        q = q * mx.array([2.0, 2.0, 0.2, 0.2])[None, :, None, None]
        layer = Layer(Dense(k, v), Call(q, 8**-0.5))
        found.append(Source(layer, scored(layer, policy), policy, None if reading is None else reading[seed]))
    return found


@pytest.mark.parametrize(("rows", "layers", "beta"), [(100, 30, 20), (37, 4, 20), (37, 5, 20), (8, 2, 3), (9, 1, 20)])
def test_a_pyramid_falls_linearly_to_a_share_of_the_mean_and_keeps_the_sum(rows, layers, beta):
    found = allocation.pyramid(rows, layers, beta)
    assert sum(found) == rows * layers and len(found) == layers
    if layers > 1:
        np.testing.assert_allclose(found, np.linspace(2 * rows - rows / beta, rows / beta, layers), atol=0.51)


def test_a_budget_of_pyramidkv_is_a_pyramid_of_the_same_bytes():
    shapes = [LayerShape(2, 8, 8, 4)] * 6
    uniform, made = (
        resolve(Budget.parse(120), shapes, policy, Request()).layouts
        for policy in (BY_NAME["snapkv"](newest=8), BY_NAME["pyramidkv"]())
    )
    assert sum(a.nbytes(s) for a, s in zip(made, shapes, strict=True)) == sum(a.nbytes(shapes[0]) for a in uniform)
    contexts = [a.context[0] for a in made]
    assert contexts == allocation.pyramid(uniform[0].context[0], 6, 20) and contexts[0] > 10 * contexts[-1]
    assert {a.recent for a in made} == {uniform[0].recent}


def test_the_pool_gives_each_head_as_many_rows_as_it_has_of_the_best():
    rng = np.random.default_rng(0)
    importance = [rng.random((2, 30)).astype(np.float32) * np.array([[1], [3]]) for _ in range(3)]
    importance[1][0, :4] = np.nan
    found = allocation.adaptive([mx.array(x.astype(np.float32)) for x in importance], 50)
    flat = np.nan_to_num(np.concatenate([x.reshape(-1) for x in importance]), nan=-np.inf)
    least = np.sort(flat)[::-1][49]
    assert found == [tuple(int((x[h] >= least).sum()) for h in range(2)) for x in importance]
    assert sum(map(sum, found)) == 50


def test_of_equal_importance_the_pool_takes_no_more_than_it_has_rows():
    assert sum(map(sum, allocation.adaptive([mx.ones((3, 20))] * 2, 31))) == 31


@pytest.mark.parametrize("safeguard", [0.2, 0.0, 1.0])
def test_adakv_shares_the_rows_of_a_layer_by_its_heads_part_of_the_best(safeguard):
    """M_h = (1 - α) × its share of the layer's H · M best pooled votes + α M (Ada-KV, algorithm 2)."""
    policy = BY_NAME["adakv"](staging=3, newest=6, safeguard=safeguard)
    uniform = [policy.layout(21, 2)] * 2
    found = fitted(sources(policy), uniform)
    for source, layout in zip(sources(policy), found, strict=True):
        q, k = np.array(source.layer.call.queries[0], np.float64), np.array(source.layer.rows.keys[0], np.float64)
        logits = np.einsum("hgid,hjd->hgij", q[:, -6:].reshape(2, 2, 6, 8), k) * 8**-0.5
        logits[..., np.arange(LENGTH)[None] > np.arange(LENGTH - 6, LENGTH)[:, None]] = -np.inf
        p = np.exp(logits - logits.max(-1, keepdims=True))
        votes = (p / p.sum(-1, keepdims=True)).sum((1, 2))[:, : LENGTH - 6]
        pooled = np.stack([votes[:, max(0, j - 3) : j + 4].max(1) for j in range(LENGTH - 6)], axis=1)
        least = np.sort(pooled.reshape(-1))[::-1][23]
        above = (pooled > least).sum(1)
        exact = (1 - safeguard) * above + safeguard * 12
        assert sum(layout.context) == 24
        ties = 24 - above.sum()
        assert np.all(np.array(layout.context) > exact - 1) and np.all(np.array(layout.context) < exact + ties + 1)
    assert (len(set(found[0].context)) == 1) == (safeguard == 1.0)


def test_kvzip_keeps_the_best_of_one_pool_of_all_layers_and_heads():
    rng = np.random.default_rng(1)
    reading = [rng.random((2, LENGTH)).astype(np.float32) * scale for scale in ([[0.2], [1]], [[2], [1.5]])]
    reading[0][:, :4] = reading[1][:, :4] = 10
    policy = BY_NAME["kvzip"](staging=3, newest=6)
    given = sources(policy, reading=[mx.array(x) for x in reading])
    layouts = fitted(given, [policy.layout(21, 2)] * 2)
    least = np.sort(np.stack(reading)[:, :, : LENGTH - 6].reshape(-1))[::-1][47]
    for i, (source, layout) in enumerate(zip(given, layouts, strict=True)):
        cache = compressed(source, layout)
        for h in range(2):
            best = np.flatnonzero(reading[i][h, : LENGTH - 6] >= least).tolist()
            assert held(cache, h).position.tolist() == [*best, *range(LENGTH - 6, LENGTH)]
    assert sum(sum(a.context) for a in layouts) == 48 and len({a.context for a in layouts}) == 2


def test_a_head_without_context_rows_still_holds_the_newest_tokens():
    policy = BY_NAME["kvzip"](staging=3, newest=6)
    reading = [mx.ones((2, LENGTH)) * mx.array([[0.0], [1.0]])] * 2
    given = sources(policy, reading=reading)
    layouts = fitted(given, [policy.layout(21, 2)] * 2)
    assert [a.context for a in layouts] == [(0, 48), (0, 0)]
    newest = list(range(LENGTH - 6, LENGTH))
    caches = [compressed(*pair) for pair in zip(given, layouts, strict=True)]
    assert [held(c, 0).position.tolist() for c in caches] == [newest, newest]
    assert [held(c, 1).position.tolist() for c in caches] == [[*range(48), *newest], newest]
    for cache in caches:
        give(cache, *tokens(9, 20), 1)
        assert held(cache, 0).position.tolist()[-1] == LENGTH + 19


@pytest.mark.parametrize("name", ["zeromerge", "adakv", "kvzip"])
def test_a_prompt_that_fits_changes_no_layout(name):
    policy = BY_NAME[name]()
    layouts = tuple(policy.layout(100, 2) for _ in range(2))
    assert fitted(sources(policy, reading=[mx.zeros((2, LENGTH))] * 2), layouts) == layouts


def test_other_policies_share_nothing_out():
    layouts = tuple(Policy().layout(40, 2) for _ in range(2))
    assert fitted(sources(Policy()), layouts) == layouts
