"""The predicted peak is within 10 % of the measured one: by dtype, prefill, chunk, score, and after a first prompt."""

import gc

import mlx.core as mx
import pytest
import tiny
from mlx_lm import load

from zm_mlx.engine import Engine, Settings
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.host import caches
from zm_mlx.host.caches import Wish
from zm_mlx.host.measuring import End
from zm_mlx.host.predicting import Load, predict


@pytest.fixture(scope="module")
def engines():
    """The small model in each dtype, loaded when it is asked for."""
    made = {}

    def of(dtype):
        if dtype not in made:
            model, tokenizer = load(DEFAULT_MODEL)
            model.set_dtype(dtype)
            mx.eval(model.parameters())
            made[dtype] = Engine(model, tokenizer, DEFAULT_MODEL)
        return made[dtype]

    return of


def peak(engine, cache_set, tokens, step):
    """The predicted peak, and that of generating two tokens after a prompt."""
    gc.collect()  # what an earlier test left would end in the middle
    plan = cache_set.plan
    found = predict(engine.model, plan, Load(tokens, step, held=cache_set.nbytes, seen=cache_set.seen or 0))
    prompt = tiny.prompt(tokens, vocab=500)[0].tolist()
    mx.clear_cache()
    mx.reset_peak_memory()
    for _ in engine.generate(prompt, cache_set.every, Settings(2, step)):
        pass
    assert found.measured
    return found.peak, mx.get_peak_memory()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "tokens", "prefill", "step"), [(96, 200, "streaming", 512), (96, 200, "exact", 100)], ids=str
)
def test_by_dtype_and_prefill(engines, dtype, rows, tokens, prefill, step):
    made = caches.fresh(engines(dtype).model, "zeromerge", Wish(str(rows), prefill), tokens, 10)
    predicted, measured = peak(engines(dtype), made, tokens, step)
    assert 0.9 < predicted / measured < 1.1


@pytest.mark.parametrize(
    ("rows", "tokens", "prefill", "step", "score"),
    [
        (512, 2, "streaming", 512, None),
        (20_000, 40, "streaming", 512, None),
        (64, 600, "streaming", 128, None),
        (128, 600, "exact", 150, None),
        (256, 700, "streaming", 2048, None),
        (200, 500, "streaming", 256, "attention"),
        (200, 600, "streaming", 256, "reread"),
    ],
)
def test_by_length_chunk_and_score(engines, rows, tokens, prefill, step, score):
    engine = engines(mx.float32)
    made = caches.fresh(engine.model, "zeromerge", Wish(str(rows), prefill, score=score), tokens, 10)
    predicted, measured = peak(engine, made, tokens, step)
    assert 0.9 < predicted / measured < 1.1


@pytest.mark.parametrize("tokens", [100, 600])
def test_where_rows_become_codes(engines, tokens):
    engine = engines(mx.float32)
    made = caches.fresh(engine.model, "zeromerge", Wish("200", "streaming", kv_bits=8), tokens, 10)
    predicted, measured = peak(engine, made, tokens, 256)
    assert 0.9 < predicted / measured < 1.1


def test_after_a_first_prompt(engines):
    engine = engines(mx.float32)
    made = caches.fresh(engine.model, "zeromerge", Wish("200", "streaming"), None, 10)
    for tokens in (600, 200):
        predicted, measured = peak(engine, made, tokens, 256)
        assert 0.9 < predicted / measured < 1.1


def test_layers_that_do_not_run_alone_are_measured_with_all_others():
    """A model that asks for a cache of its last layer gets it."""
    model = tiny.model(layers=5)

    class Whole(type(model)):
        def __call__(self, tokens, cache):
            if len(cache) < 5:
                raise IndexError("the last layer's cache")
            return super().__call__(tokens, cache=cache)

    made = caches.fresh(model, "zeromerge", Wish("64", "streaming"), 200, 10)
    expected = predict(model, made.plan, Load(200, 64)).new
    model.__class__ = Whole
    assert predict(model, made.plan, Load(200, 64)).new == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
def test_the_end_of_a_prompt_is_measured_and_no_more_of_it_than_there_is(engines, prefill):
    model = engines(mx.float32).model
    for tokens, step in ((1, 1), (2, 512), (513, 512), (3000, 512), (100_000, 64)):
        plan = caches.fresh(model, "zeromerge", Wish("128", prefill, room=False), tokens, 10).plan
        end = End.of(plan, tokens, step, 0)
        assert 1 <= end.tokens <= tokens and end.before >= 0 and end.before + end.tokens <= tokens
        assert end.tokens <= 3000
