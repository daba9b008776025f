"""Phases: a prompt that is held whole, its end, and prompts whose announced end never comes."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from tiny import assert_equals_twin, assert_same_state, f64, give, held, tokens, twin_of

from zm_mlx.ops.plain import attention
from zm_mlx.policies import Policy
from zm_mlx.state.layout import LayerShape

SMALL = Policy(residual=2, staging=3)


def test_a_known_prompt_length_equals_finish_prompt():
    q, k, v = tokens(1, 60)
    known = tiny.cache(20, policy=SMALL, prefill="exact", prompt_length=50)
    by_hand = tiny.cache(20, policy=SMALL, prefill="exact", prompt_length=999)
    a, b = give(known, q, k, v), give(by_hand, *(x[:, :, :50] for x in (q, k, v)))
    assert (known.prefill, by_hand.prefill) == ("streaming", "exact")
    by_hand.finish_prompt()
    assert by_hand.prefill == "streaming"
    b = mx.concatenate([b, give(by_hand, *(x[:, :, 50:] for x in (q, k, v)))], axis=2)
    assert_same_state(known, by_hand)
    np.testing.assert_allclose(f64(a), f64(b), atol=2e-5)


def test_exact_prefill_holds_the_prompt_whole_and_the_budget_after_it():
    q, k, v = tokens(2, 64)
    cache = tiny.cache(20, policy=SMALL, prefill="exact", prompt_length=50)
    out = give(cache, *(x[:, :, :49] for x in (q, k, v)), 10)
    expected = mx.fast.scaled_dot_product_attention(*(x[:, :, :49] for x in (q, k, v)), scale=8**-0.5, mask="causal")
    np.testing.assert_allclose(f64(out), f64(expected), atol=2e-5)
    assert len(held(cache, 0).weight) == 49 and cache.nbytes > cache.layout.nbytes(LayerShape(2, 8, 8, 4))
    give(cache, *(x[:, :, 49:51] for x in (q, k, v)))  # the prompt ends in the middle of this call
    assert cache.prefill == "streaming" and cache.offset == 51
    assert len(held(cache, 0).weight) == 20 - 3 + 1
    assert cache.nbytes == cache.layout.nbytes(LayerShape(2, 8, 8, 4))


@pytest.mark.parametrize("prompt", [1, 9, 17, 19, 20])
def test_a_prompt_within_the_budget_continues_as_streaming_would(prompt):
    q, k, v = tokens(3, 70)
    exact = tiny.cache(20, policy=SMALL, prefill="exact", prompt_length=prompt)
    streaming = tiny.cache(20, policy=SMALL)
    for part in (slice(0, prompt), slice(prompt, prompt + 1), slice(prompt + 1, 70)):
        new = [x[:, :, part] for x in (q, k, v)]
        np.testing.assert_allclose(f64(give(exact, *new)), f64(give(streaming, *new)), atol=2e-5)
        assert_same_state(exact, streaming)
        if part.stop < 20:
            assert held(exact, 1).position.tolist() == list(range(part.stop))


@pytest.mark.parametrize(("first", "second", "rest"), [(50, 37, 20), (50, 2, 5), (10, 5, 30), (10, 40, 10)])
@pytest.mark.parametrize("size", [7, 1000])
@pytest.mark.parametrize("rows", [20, [12, 50]])
def test_begin_prompt_on_a_second_turn_equals_the_twin(first, second, rest, size, rows):
    q, k, v = tokens(4, first + second + rest)
    cache = tiny.cache(rows, policy=SMALL)
    out = [give(cache, *(x[:, :, :first] for x in (q, k, v)), size)]
    cache.begin_prompt(second)
    assert cache.prefill == "exact" and cache.offset == first
    out.append(give(cache, *(x[:, :, first:] for x in (q, k, v)), size))
    assert cache.prefill == "streaming"
    made = twin_of(cache)
    expected = [made.run(*(f64(x[0, :, :first]) for x in (q, k, v)), 8**-0.5)]
    made.begin_prompt(second)
    expected.append(made.run(*(f64(x[0, :, first:]) for x in (q, k, v)), 8**-0.5))
    assert made.doubt > 1e-5
    for x, y in zip(out, expected, strict=True):
        np.testing.assert_allclose(f64(x[0]), y, atol=5e-5)
    assert_equals_twin(cache, [made])
    assert cache.nbytes == cache.layout.nbytes(LayerShape(2, 8, 8, 4))


@pytest.mark.parametrize("second", [1, 2, 11])
def test_a_short_second_prompt_leaves_the_arrays_at_their_size(second):
    q, k, v = tokens(4, 90)
    cache = tiny.cache(20, policy=SMALL)
    give(cache, *(x[:, :, :50] for x in (q, k, v)))
    cache.begin_prompt(second)
    for t in range(50, 90):
        give(cache, *(x[:, :, t : t + 1] for x in (q, k, v)))
        if cache.prefill == "streaming":
            assert cache.nbytes == cache.layout.nbytes(LayerShape(2, 8, 8, 4))


@pytest.mark.parametrize("size", [2, 7, 1000])
@pytest.mark.parametrize("known", [True, False])
def test_only_the_last_queries_of_an_exact_prompt_score_it(monkeypatch, size, known):
    monkeypatch.setattr(Policy, "window", property(lambda self: 5))
    q, k, v = tokens(6, 45)
    cache = tiny.cache(20, policy=SMALL, prefill="exact", prompt_length=40 if known else 999)
    give(cache, *(x[:, :, :40] for x in (q, k, v)), size)
    cache.finish_prompt()
    give(cache, *(x[:, :, 40:] for x in (q, k, v)))
    made = twin_of(cache, window=5)
    made.begin_prompt(40)
    made.run(*(f64(x[0]) for x in (q, k, v)), 8**-0.5)
    assert made.doubt > 1e-5
    assert_equals_twin(cache, [made])


@pytest.mark.parametrize("announced", [40, 41, 100])
@pytest.mark.parametrize("size", [7, 1000])
def test_a_second_prompt_fades_older_scores_by_all_its_tokens_and_may_end_early(monkeypatch, announced, size):
    """A prompt announced too long and finished by hand is scored and compacted like any other."""
    monkeypatch.setattr(Policy, "window", property(lambda self: 5))
    q, k, v = tokens(6, 75)
    cache = tiny.cache(20, policy=SMALL)
    give(cache, *(x[:, :, :30] for x in (q, k, v)))
    cache.begin_prompt(announced)
    give(cache, *(x[:, :, 30:70] for x in (q, k, v)), size)
    cache.finish_prompt()
    assert len(held(cache, 0).weight) <= 20 and cache.nbytes == cache.layout.nbytes(LayerShape(2, 8, 8, 4))
    give(cache, *(x[:, :, 70:] for x in (q, k, v)))
    made = twin_of(cache)
    made.run(*(f64(x[0, :, :30]) for x in (q, k, v)), 8**-0.5)
    made.begin_prompt(40)
    made.run(*(f64(x[0, :, 30:]) for x in (q, k, v)), 8**-0.5)
    assert made.doubt > 1e-5
    assert_equals_twin(cache, [made])


def test_the_window_is_512_queries_unless_nothing_is_forgotten():
    assert Policy().window == 512 and Policy(decay=1).window is None


def test_finish_prompt_does_nothing_while_streaming_or_empty():
    cache = tiny.cache(20, policy=SMALL)
    cache.finish_prompt()
    give(cache, *tokens(1, 25))
    before = [x for x in cache.state if isinstance(x, mx.array)]
    cache.finish_prompt()
    assert all(x is y for x, y in zip(before, (x for x in cache.state if isinstance(x, mx.array)), strict=True))
    empty = tiny.cache(20, policy=SMALL, prefill="exact", prompt_length=9)
    empty.finish_prompt()
    assert empty.prefill == "streaming" and empty.empty()


# Calls of an exact prompt whose announced end never comes, and of what follows, which ends in decoding.
ENDLESS = {
    "prompt, then decoding": [[150] + [1] * 30],
    "chunks, then decoding": [[64, 64, 22] + [1] * 30],
    "token by token": [[1] * 120],
    "cancelled, then another prompt": [[100], [50] + [1] * 9],
    "cancelled, then begun again": [[100], "begin", [50] + [1] * 9],
    "one token in the middle": [[40, 1, 40, 1, 1, 40]],
}


@pytest.mark.parametrize("history", ENDLESS)
@pytest.mark.parametrize("rows", [20, [12, 50]])
def test_the_cap_holds_when_the_announced_end_of_a_prompt_never_comes(history, rows):
    cache = tiny.cache(rows, policy=SMALL, prefill="exact", prompt_length=5000)
    q, k, v = tokens(7, 400)
    for part in ENDLESS[history]:
        if part == "begin":
            cache.begin_prompt(4000)
            continue
        for size in part:
            give(cache, *(x[:, :, cache.offset : cache.offset + size] for x in (q, k, v)))
            if size == 1:
                assert len(held(cache, 0).weight) <= cache.layout.rows[0]
    assert cache.prefill == "streaming" and cache.nbytes == cache.layout.nbytes(LayerShape(2, 8, 8, 4))
    if history.startswith(("prompt", "chunks")):
        short = tiny.cache(rows, policy=SMALL, prefill="exact", prompt_length=150)
        give(short, *(x[:, :, : cache.offset] for x in (q, k, v)))
        assert_same_state(cache, short)


@pytest.mark.parametrize("chunks", [[50], [48, 1, 1], [49, 1], [7] * 8])
def test_the_one_token_calls_at_the_end_of_a_prompt_are_no_decoding(chunks):
    """mlx-lm's last chunk may be a single token, and so is the call after it."""
    q, k, v = tokens(8, sum(chunks))
    cut = tiny.cache(20, policy=SMALL, prefill="exact", prompt_length=sum(chunks))
    whole = tiny.cache(20, policy=SMALL, prefill="exact", prompt_length=sum(chunks))
    give(cut, q, k, v, chunks)
    give(whole, q, k, v)
    assert_same_state(cut, whole)


def test_an_exact_prompt_is_freed_when_it_ends():
    q, k, v = tokens(0, 1500, groups=1, dim=32)
    mx.eval(q, k, v)
    before = mx.get_active_memory()
    cache = tiny.cache(64, prefill="exact", prompt_length=1500)
    for part in (slice(0, 700), slice(700, 1500)):
        new = cache.update_and_fetch(k[:, :, part], v[:, :, part])
        mx.eval(cache.attend(q[:, :, part], *new, 0.1))
    del new
    assert cache.nbytes == cache.layout.nbytes(LayerShape(2, 32, 32, 4))
    assert mx.get_active_memory() - before < 2 * cache.nbytes < k.nbytes / 4


@pytest.mark.parametrize("earlier", [0, 100])
def test_a_prompt_of_an_exact_prefill_does_not_hold_all_its_logits(monkeypatch, earlier):
    """A first prompt goes through mlx's attention, a later one through ours; blocks change no output."""
    q, k, v = tokens(0, 1000, groups=2, dim=32)
    mx.eval(q, k, v)
    logits, outputs = 4 * 4 * 1000 * 1000, []
    for limit in (2**17, 2**30):
        monkeypatch.setattr(attention, "LOGIT_BYTES", limit)
        cache = tiny.cache(64, **({} if earlier else {"prefill": "exact", "prompt_length": 2000}))
        if earlier:
            give(cache, *(x[:, :, :earlier] for x in (q, k, v)))
            cache.begin_prompt(2000)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        outputs.append(cache.attend(q, *cache.update_and_fetch(k, v), 0.2))
        mx.eval(outputs)
        assert (mx.get_peak_memory() - before < logits / 5) == (limit == 2**17)
    np.testing.assert_allclose(*map(f64, outputs), atol=2e-5)
