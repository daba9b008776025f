"""What a plan says a prompt takes beyond the budget: what caches then really hold."""

import mlx.core as mx
import pytest
import tiny

import zm_mlx
from zm_mlx.phases import PIECE
from zm_mlx.policies import Policy
from zm_mlx.report import plan_lines

TOKENS = 2 * PIECE + 400  # the last call leaves a piece that is not full


def held(model, plan):
    """The most bytes that all caches hold between the calls of a prompt."""
    caches, most = plan.caches(model), 0
    for c in tiny.chunks(TOKENS, 200):
        model(tiny.prompt(TOKENS)[:, c], cache=caches)
        mx.eval([x.state for x in caches])
        most = max(most, sum(x.nbytes for x in caches))
    return most


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_a_piece_beside_the_budget_is_counted_with_its_queries(dtype):
    model = tiny.model(dtype=dtype, heads=8)
    plan = zm_mlx.plan_cache(model, 64, prefill="streaming")
    most = held(model, plan)
    assert plan.nbytes < most <= plan.nbytes + plan.piece_bytes
    assert most > 0.8 * (plan.nbytes + plan.piece_bytes)


def test_without_replay_nothing_is_held_beside_the_budget():
    model = tiny.model()
    plan = zm_mlx.plan_cache(model, 64, prefill="streaming", policy=Policy())
    assert plan.piece_bytes == 0 and held(model, plan) == plan.nbytes
    assert not any("piece" in line for line in plan_lines(plan))


def test_an_exact_prompt_is_counted_whole():
    model = tiny.model()
    plan = zm_mlx.plan_cache(model, 64, prompt_length=TOKENS, prefill="exact")
    assert plan.prompt_bytes == plan.full_bytes(TOKENS)
    assert 0.9 * plan.least < held(model, plan) <= plan.least + plan.piece_bytes


def test_the_printed_plan_says_what_a_streaming_prompt_holds():
    model = tiny.model()
    line = [x for x in plan_lines(zm_mlx.plan_cache(model, 64)) if "piece" in x]
    assert len(line) == 1 and f"{PIECE} tokens" in line[0]
