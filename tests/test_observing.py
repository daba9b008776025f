"""Prompts that are read in parts, and what layers computed after one."""

import mlx.core as mx
import numpy as np
import pytest
import tiny

from zm_mlx.evaluation.caches import Contender
from zm_mlx.evaluation.observing import observe, replayed
from zm_mlx.evaluation.prefilled import Prompted, continue_


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def test_a_prompt_in_two_parts_is_the_same_prompt(model):
    tokens = tiny.prompt(200)[0].tolist()
    whole, parts = Prompted(model, tokens), Prompted(model, tokens[:150]).followed_by(tokens[150:])
    assert len(whole) == len(parts) == 200
    for one, other in zip(whole.layers, parts.layers, strict=True):
        for x, y in zip((*one.rows, one.call.queries), (*other.rows, other.call.queries), strict=True):
            np.testing.assert_allclose(tiny.f64(x), tiny.f64(y), atol=1e-4)
    contender = Contender("snapkv", 0.5)
    logits = [continue_(model, p.caches(contender), [5, 6, 7]) for p in (whole, parts)]
    np.testing.assert_allclose(*map(tiny.f64, logits), atol=1e-3)


def test_a_longer_prompt_leaves_the_first_as_it_was(model):
    tokens = tiny.prompt(120)[0].tolist()
    first = Prompted(model, tokens[:100])
    before = continue_(model, first.caches(Contender("full")), [1, 2])
    first.followed_by(tokens[100:])
    assert len(first) == 100
    assert mx.array_equal(before, continue_(model, first.caches(Contender("full")), [1, 2]))


@pytest.mark.parametrize("name", ["full", "streaming_llm", "rotating"])
def test_a_cache_that_holds_everything_answers_what_was_observed(model, name):
    prompted = Prompted(model, tiny.prompt(60)[0].tolist())
    following = tiny.prompt(20, 1)[0].tolist()
    logits, observed = observe(prompted, following)
    alone = continue_(model, prompted.caches(Contender("full")), following)
    np.testing.assert_allclose(tiny.f64(logits), tiny.f64(alone), atol=1e-4)
    outputs = list(replayed(prompted, prompted.caches(Contender(name, 1.0)), observed))
    worst = max(float(mx.abs(x.output - y).max()) for x, y in zip(observed, outputs, strict=True))
    if name == "full":
        assert worst < 1e-5
    else:  # 60 rows for 80 tokens
        assert worst > 1e-3
