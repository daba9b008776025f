"""The cache in models of many architectures: nothing changes within the budget, nothing grows past it."""

from functools import cache

import mlx.core as mx
import pytest
from architectures import CONFIGS, SLIDING, VOCAB, WINDOW, build
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_make_prompt_cache
from tiny import feed, held, prompt

import zm_mlx
from zm_mlx.policies import Policy, ZeroMerge

PROMPT, STEPS = 80, 20
TOLERANCE = 1e-4  # relative, float32


def run(name: str, caches: list, size: int, length: int = PROMPT) -> mx.array:
    """Logits of a prompt given in chunks and of 20 steps of one token."""
    tokens = prompt(length + STEPS, vocab=VOCAB)
    first = feed(build(name), caches, tokens[:, :length], size)
    return mx.concatenate([first, feed(build(name), caches, tokens[:, length:], 1)], axis=1)


@cache
def reference(name: str, length: int = PROMPT) -> mx.array:
    """Logits with mlx-lm's own caches."""
    return run(name, mlx_lm_make_prompt_cache(build(name)), 64, length)


def difference(found: mx.array, expected: mx.array) -> float:
    return (abs(found - expected).max() / abs(expected).max()).item()


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_budget_that_suffices_changes_no_logits(name, size):
    caches = zm_mlx.make_prompt_cache(build(name), PROMPT + STEPS)
    assert difference(run(name, caches, size), reference(name)) < TOLERANCE


@pytest.mark.parametrize("policy", [ZeroMerge(), Policy()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_past_the_budget_rows_are_capped_and_logits_finite_but_not_the_full_ones(name, policy):
    rows, length = 48, 140
    model = build(name)
    made = zm_mlx.plan_cache(model, rows, policy=policy)
    caches = made.caches(model)
    logits = run(name, caches, 64, length)
    ours = [c for c in caches if isinstance(c, zm_mlx.ZeroMergeCache)]
    assert mx.isfinite(logits).all().item()
    assert difference(logits, reference(name, length)) > 10 * TOLERANCE, "nothing was compressed"
    assert sum(c.nbytes for c in ours) == made.nbytes
    for c in ours:
        assert c.offset == length + STEPS
        for head in range(c.layout.heads):
            found = held(c, head)
            assert len(found.weight) <= rows
            if not policy.fits:  # nothing is dropped
                assert found.weight.sum().item() == length + STEPS


@pytest.mark.parametrize("name", CONFIGS)
def test_only_sliding_window_layers_keep_the_caches_of_mlx_lm(name):
    model = build(name)
    caches = zm_mlx.make_prompt_cache(model, 64)
    own = mlx_lm_make_prompt_cache(model)
    assert len(caches) == len(own) == len(model.layers)
    for i, (made, before) in enumerate(zip(caches, own, strict=True)):
        sliding = i in SLIDING.get(name, [])
        assert type(before) is (RotatingKVCache if sliding else KVCache)
        assert type(made) is (RotatingKVCache if sliding else zm_mlx.ZeroMergeCache)
        assert not sliding or made.max_size == WINDOW


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_and_dims_of_the_budget_are_those_of_the_real_cache(name):
    model = build(name)
    own = mlx_lm_make_prompt_cache(model)
    model(prompt(1, vocab=VOCAB), cache=own)
    expected = [(c.keys.shape[1], c.keys.shape[3], c.values.shape[3]) for c in own if type(c) is KVCache]
    found = [(s.heads, s.head_dim, s.value_dim) for s in zm_mlx.plan_cache(model, 64).shapes]
    assert found == expected
