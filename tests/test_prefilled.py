"""Caches of an evaluation: they must be what the product makes, at the bytes that were asked for."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models.cache import RotatingKVCache
from tiny import f64, tokens

from zm_mlx import make_prompt_cache
from zm_mlx.evaluation.caches import BITS, GROUPS, Contender, Quantization
from zm_mlx.evaluation.prefilled import Prompted, continue_, fork
from zm_mlx.evaluation.window import Window
from zm_mlx.policies import BY_NAME
from zm_mlx.state.layout import LayerShape
from zm_mlx.state.rows import Dense

TOKENS = tiny.prompt(700, seed=3)[0]
NEW = tiny.prompt(40, seed=4)[0]


class Tokenizer:
    """Letters as tokens."""

    chat_template = None

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [ord(c) % 96 for c in text]


@pytest.fixture(scope="module")
def model():
    return tiny.model(context=2048, head_dim=32)


@pytest.fixture(scope="module")
def prompted(model):
    return Prompted(model, TOKENS, Tokenizer())


@pytest.mark.parametrize("name", ["zeromerge", "paper"])
@pytest.mark.parametrize("taken", ["exact", "streaming"])
def test_a_contender_is_what_the_product_makes_of_the_same_prompt(model, prompted, name, taken):
    contender = Contender(name if taken == "exact" else f"{name}-streaming", 0.3)
    made = prompted.caches(contender)
    rows = made[0].layout.rows[0]
    product = make_prompt_cache(model, rows, prompt_length=700, prefill=taken, policy=BY_NAME[name]())
    tiny.feed(model, product, TOKENS[None], 256)
    for x, y in zip(made, product, strict=True):
        y.finish_prompt()  # as the first decoded token does
        assert x.layout == y.layout and x.policy == y.policy and x.offset == 700
        tiny.assert_same_state(x, y)
    expected = f64(tiny.feed(model, product, NEW[None], 1)[0])
    np.testing.assert_allclose(f64(continue_(model, made, NEW)), expected, atol=1e-4)


def test_the_full_contender_is_mlx_lms_cache(model, prompted):
    caches = model.make_cache()
    tiny.feed(model, caches, TOKENS[None])
    expected = f64(tiny.feed(model, caches, NEW[None])[0])
    np.testing.assert_allclose(f64(continue_(model, prompted.caches(Contender("full")), NEW)), expected, atol=1e-4)


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.99, 1.0])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_rotating_contender_is_mlx_lms_token_by_token(model, prompted, budget, size):
    """In longer calls mlx-lm's own mask hides the first tokens, which must not be mistaken for its quality."""
    made = prompted.caches(Contender("rotating", budget))
    most, theirs = made[0].most, []
    assert most == int(budget * 700)
    for layer in prompted.layers:
        x = [mx.array(x) for x in layer.rows]  # written in place
        if most < 700:
            x = [mx.concatenate([x[:, :, :4], x[:, :, 704 - most :]], axis=2) for x in layer.rows]
        theirs.append(RotatingKVCache(most, keep=4))
        theirs[-1].state = (*x, 700, 4, most, x[0].shape[2])
    one_by_one = f64(tiny.feed(model, theirs, NEW[None], 1)[0])
    found = np.concatenate([f64(continue_(model, made, NEW[i : i + size])) for i in range(0, 40, size)])
    np.testing.assert_allclose(found, one_by_one, atol=1e-4)
    assert made[0].nbytes == theirs[0].nbytes or budget > 0.9  # mlx-lm's grows in steps until it is full


def test_mlx_lms_own_streaming_window_goes_token_by_token(model, prompted):
    made = prompted.caches(Contender("rotating-streaming", 0.1))
    again = fork(made)
    one_by_one = f64(tiny.feed(model, again, NEW[None], 1)[0])
    np.testing.assert_allclose(f64(continue_(model, made, NEW)), one_by_one, atol=1e-5)
    block = f64(tiny.feed(model, prompted.caches(Contender("rotating-streaming", 0.1)), NEW[None])[0])
    assert np.abs(block - one_by_one).max() > 1e-2


def test_an_empty_window_is_filled_like_mlx_lms():
    rows = tokens(0, 30)
    window, theirs = Window(Dense(*(x[:, :, :0] for x in rows[1:])), 9), RotatingKVCache(9, keep=4)
    for t in range(30):
        q, k, v = (x[:, :, t : t + 1] for x in rows)
        found = window.attend(q, *window.update_and_fetch(k, v), 0.3)
        expected = mx.fast.scaled_dot_product_attention(q, *theirs.update_and_fetch(k, v), scale=0.3)
        np.testing.assert_allclose(f64(found), f64(expected), atol=1e-5)


@pytest.mark.parametrize("name", [*BY_NAME, "zeromerge-streaming", "paper-streaming", "full", "quantized"])
def test_a_block_gives_what_tokens_one_by_one_give(prompted, model, name):
    made = prompted.caches(Contender(name, 0.4))
    again = fork(made)
    expected = tiny.feed(model, again, NEW[None], 1)[0]
    np.testing.assert_allclose(f64(continue_(model, made, NEW)), f64(expected), atol=2e-4)


@pytest.mark.parametrize("name", ["zeromerge", "full", "rotating", "quantized"])
def test_forks_and_the_prompt_itself_do_not_see_what_others_take(prompted, model, name):
    contender = Contender(name, 0.4)
    made = prompted.caches(contender)
    expected = f64(continue_(model, fork(made), NEW))
    for other in (NEW[::-1], NEW[5:]):
        continue_(model, fork(made), other)
    continue_(model, prompted.caches(contender), NEW[::-1])
    assert np.array_equal(f64(continue_(model, fork(made), NEW)), expected)
    assert np.array_equal(f64(continue_(model, prompted.caches(contender), NEW)), expected)


@pytest.mark.parametrize("name", [*BY_NAME, "rotating", "quantized"])
@pytest.mark.parametrize("budget", [0.2, 0.45])
def test_no_contender_takes_more_bytes_than_its_share_nor_wastes_a_row(prompted, name, budget):
    room = budget * sum(x.rows.keys.nbytes + x.rows.values.nbytes for x in prompted.layers)
    made = prompted.caches(Contender(name, budget))
    used = sum(c.nbytes for c in made)
    assert used <= room
    if name != "quantized":
        assert used > room - sum(s.token_bytes + 64 * s.heads for s in prompted.shapes)


def test_the_quantisation_is_the_most_exact_that_fits():
    shape = [LayerShape(2, 64, 128, 2)]
    assert Quantization.within(shape, 1.0) == Quantization(8, 32)
    assert Quantization.within(shape, 0.3) == Quantization(4, 64)
    assert Quantization.within(shape, 0.17) == Quantization(2, 64)
    with pytest.raises(ValueError, match=r"takes 0.156 of the full one at least, not 0.1"):
        Quantization.within(shape, 0.1)
    with pytest.raises(ValueError, match="common divisor 16"):
        Quantization.within([LayerShape(2, 16, 16, 2)], 0.9)
    assert BITS == (8, 4, 2) and GROUPS[0] == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rotatory", 0.1), "no cache is called 'rotatory'; there are full, rotating, quantized, zeromerge"),
        (("zeromerge", 0.0), r"a share of the full cache in \(0, 1\]"),
        (("zeromerge", 10), r"a share of the full cache in \(0, 1\]"),
        (("rotating", 0.1, BY_NAME["paper"]()), "takes no settings of Paper"),
    ],
)
def test_a_contender_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Contender(*arguments)


@pytest.mark.parametrize("name", ["zeromerge", "rotating"])
def test_a_budget_that_holds_nothing_is_refused(prompted, name):
    with pytest.raises(ValueError, match="bytes are too few"):
        prompted.caches(Contender(name, 0.005))
