"""Expected attention: its formula, and the distribution of queries that it is computed with."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_lm.models.rope_utils import initialize_rope
from tiny import f64, held, tokens

from zm_mlx.evaluation import expected
from zm_mlx.evaluation.caches import Contender
from zm_mlx.evaluation.exact import Source, compressed, scored
from zm_mlx.evaluation.prefilled import Prompted, continue_
from zm_mlx.evaluation.recording import Layer
from zm_mlx.policies.expected_attention import ExpectedAttention, Queries
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Call

SCALE = 8**-0.5


def source(layer, policy):
    return Source(layer, scored(layer, policy), policy)


def rotation(dim, positions, base=10000.0):
    """Matrices [n, D, D] with which x @ matrix rotates as LLaMA does: halves, not pairs."""
    angles = np.outer(positions, base ** -(np.arange(0, dim, 2) / dim))
    turn = np.zeros((len(positions), dim, dim))
    for i in range(dim // 2):
        c, s, j = np.cos(angles[:, i]), np.sin(angles[:, i]), i + dim // 2
        turn[:, i, i], turn[:, j, j], turn[:, i, j], turn[:, j, i] = c, c, s, -s
    return turn


def test_the_distribution_is_that_of_unrotated_queries_rotated_on_average():
    q, k, v = tokens(0, 40)
    rotate = nn.RoPE(8)
    found = expected.distribution(Layer(Dense(k, v), Call(rotate(q), SCALE)), rotate)
    plain = f64(q[0])[:, 4:]
    mean = plain.mean(axis=1)
    covariance = np.stack([np.cov(x.T, bias=True) for x in plain])
    turn = rotation(8, np.arange(40, 40 + 512)).mean(axis=0)
    np.testing.assert_allclose(f64(found.mean).reshape(4, 8), SCALE * mean @ turn, atol=1e-4)
    expected_covariance = SCALE**2 * turn.T @ covariance @ turn
    np.testing.assert_allclose(f64(found.covariance).reshape(4, 8, 8), expected_covariance, atol=1e-4)


@pytest.mark.parametrize("traditional", [True, False])
@pytest.mark.parametrize(
    "scaling",
    [None, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4}],
)
def test_queries_are_unrotated_with_the_models_own_rotation(traditional, scaling):
    rotate = initialize_rope(16, 10000.0, traditional, scaling, 4096)
    q = tokens(1, 700, dim=16)[0]
    np.testing.assert_allclose(f64(expected.unrotated(rotate(q), rotate)), f64(q), atol=1e-3)


def test_a_rotation_that_also_scales_is_refused():
    rotate = initialize_rope(
        16, 10000.0, False,
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 128}, 4096,
    )  # fmt: skip
    q, k, v = tokens(1, 40, dim=16)
    with pytest.raises(ValueError, match="cannot undo"):
        expected.distribution(Layer(Dense(k, v), Call(rotate(q), SCALE)), rotate)


def naive(keys, values, mean, covariance, epsilon=0.01, sinks=4):
    """Importance [n] of one head, by the paper's formula; keys in the order of positions, the first 4 included."""
    logits = np.array([keys[sinks:] @ m for m in mean])
    logits += 0.5 * np.array([np.einsum("nd,de,ne->n", keys[sinks:], c, keys[sinks:]) for c in covariance])
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    worth = (p.mean(axis=0) + epsilon) * np.linalg.norm(values[sinks:], axis=1)
    return np.concatenate([np.full(sinks, np.inf), worth])


@pytest.mark.parametrize("rows", [21, [30, 21]])
def test_the_rows_that_stay_are_those_of_the_formula(rows):
    rng = np.random.default_rng(3)
    mean, root = rng.standard_normal((2, 2, 8)), rng.standard_normal((2, 2, 8, 8)) * 0.3
    covariance = root @ root.swapaxes(-1, -2)
    queries = Queries(*(mx.array(x.astype(np.float32)) for x in (mean, covariance)))
    policy = ExpectedAttention(staging=3, queries=queries)
    layout = policy.layout(rows, 2)
    q, k, v = tokens(4, 90)
    cache = compressed(source(Layer(Dense(k, v), Call(q, SCALE)), policy), layout)
    keys, values = f64(k[0]), f64(v[0])
    kept = []
    for h in range(2):
        worth = naive(keys[h, :89], values[h, :89], mean[h], covariance[h])
        kept.append(sorted(np.argsort(-worth)[: layout.context[h]]))
        assert held(cache, h).position.tolist() == [*kept[h], 89]
    more = tokens(5, 3)  # and, when decoding, among the rows that are left and the new ones
    tiny.give(cache, *more)
    for h in range(2):
        left = [*kept[h], 89]
        keys_now = np.concatenate([keys[h, left], f64(more[1][0, h, :2])])
        values_now = np.concatenate([values[h, left], f64(more[2][0, h, :2])])
        worth = naive(keys_now, values_now, mean[h], covariance[h])
        best = sorted(np.argsort(-worth)[: layout.context[h]])
        assert held(cache, h).position.tolist() == [*np.array([*left, 90, 91])[best], 92]


def test_without_a_distribution_nothing_is_evicted_silently():
    policy = ExpectedAttention(staging=3)
    cache = tiny.cache(21, policy=policy)
    with pytest.raises(ValueError, match="needs the distribution of the prompt's queries"):
        tiny.give(cache, *tokens(4, 90))


def test_through_a_model_it_keeps_what_the_models_own_queries_say():
    model = tiny.model(head_dim=32, context=2048)
    prompt = Prompted(model, tiny.prompt(300, seed=3)[0])
    made = prompt.caches(Contender("expected_attention", 0.2))
    for i, layer in enumerate(prompt.layers):
        queries = expected.distribution(layer, model.layers[i].self_attn.rope)
        keys, values = f64(layer.rows.keys[0]), f64(layer.rows.values[0])
        for h in range(2):
            worth = naive(keys[h, :299], values[h, :299], f64(queries.mean)[h], f64(queries.covariance)[h])
            best = sorted(np.argsort(-worth)[: made[i].layout.context[h]])
            assert held(made[i], h).position.tolist() == [*best, 299]
    assert mx.isfinite(continue_(model, made, tiny.prompt(60, seed=5)[0])).all()
    with pytest.raises(ValueError, match="expected_attention needs the distribution"):
        prompt.caches(Contender("expected_attention-streaming", 0.2))


def test_a_policys_settings_are_saved_without_the_distribution():
    policy = ExpectedAttention(queries=Queries(mx.zeros((1, 1, 2)), mx.zeros((1, 1, 2, 2))))
    assert ExpectedAttention(**policy.as_dict()) == policy == replace(policy, queries=None)
