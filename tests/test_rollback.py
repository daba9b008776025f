"""Calls that are taken back: the state is that of the accepted tokens alone, whatever was drafted, and stays usable."""

import copy

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models import cache as mlx_lm_cache
from tiny import assert_same_state, greedy, model, prompt, tokens

import zm_mlx
from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.host.rollback import reading
from zm_mlx.phases import ExactPrompt, Piece
from zm_mlx.policies import ZeroMerge

DIM = 8
TURN = mx.array(np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, DIM)))[0].astype(np.float32))
PROMPT = 90


def cache(rows=24, policy=ZeroMerge(), **more) -> ZeroMergeCache:  # noqa: B008 - a value
    return tiny.cache(rows, policy=policy, turn=TURN, **more)


def give(made, taken, begin, end, size=10**9):
    return tiny.give(made, *(x[:, :, begin:end] for x in taken), size) if end > begin else None


def prefilled(taken, rows=24, prefill="streaming", length=PROMPT):
    """A cache with a prompt but for its last token."""
    made = cache(rows, prefill=prefill, prompt_length=length if prefill == "exact" else None)
    give(made, taken, 0, length - 1)
    return made


def spoiled(taken, begin, end, seed=1):
    """The tokens with others in place of some: what a draft proposed wrongly."""
    other = tokens(seed, end - begin)
    return tuple(mx.concatenate([x[:, :, :begin], y, x[:, :, end:]], axis=2) for x, y in zip(taken, other, strict=True))


def verified(made, taken, begin, calls):
    """Calls of decoding: (accepted, rejected) tokens of each. Returns where it ended."""
    most = max(a + b for a, b in calls)
    with zm_mlx.rollback([made], max(1, most - 1)):
        for accepted, rejected in calls:
            end = begin + accepted + rejected
            give(made, spoiled(taken, begin + accepted, end), begin, end)
            assert made.trim(rejected) == rejected
            begin += accepted
    return begin


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
@pytest.mark.parametrize("rows", [24, 33, [24, 64], 100])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_what_was_rejected_leaves_no_trace_whatever_compactions_lie_between(prefill, rows, k):
    """The first call brings the prompt's last token, which ends an exact prompt or a piece."""
    taken = tokens(3, 200)
    made, plain = (prefilled(taken, rows, prefill) for _ in range(2))
    draws = np.random.default_rng(k)
    calls = [(1 + int(a), int(k - a)) for a in draws.integers(0, k + 1, 12)]
    end = verified(made, taken, PROMPT - 1, calls)
    give(plain, taken, PROMPT - 1, end, 1)
    assert plain.layer.departed  # something was compacted
    assert made.phase == plain.phase
    assert_same_state(made, plain)


def test_a_verifying_call_attends_to_what_single_calls_would():
    """Compactions come inside of it, at their own counts."""
    taken = tokens(4, PROMPT + 40)
    made, plain = prefilled(taken), prefilled(taken)
    with zm_mlx.rollback([made], 40):
        out = give(made, taken, PROMPT - 1, PROMPT + 39)
    np.testing.assert_allclose(
        tiny.f64(out), tiny.f64(give(plain, taken, PROMPT - 1, PROMPT + 39, 1)), atol=2e-5, rtol=2e-4
    )


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
def test_several_calls_are_undone_as_far_as_promised(prefill):
    """Single tokens, as a draft's caches take them, back into the call that ended the prompt."""
    k = 4
    taken = tokens(5, 200)
    for back in range(k + 3):
        made, plain = (prefilled(taken, prefill=prefill) for _ in range(2))
        with zm_mlx.rollback([made], k):
            give(made, taken, PROMPT - 1, PROMPT + k + 1, 1)
            assert made.trim(back) == back
        give(plain, taken, PROMPT - 1, PROMPT + k + 1 - back, 1)
        assert type(made.phase) is type(plain.phase)
        assert_same_state(made, plain)


def test_what_is_taken_back_in_two_steps_is_what_is_taken_back_in_one():
    taken = tokens(6, 200)
    made, plain = prefilled(taken), prefilled(taken)
    with zm_mlx.rollback([made], 5):
        give(made, taken, PROMPT - 1, PROMPT + 5)
        assert made.trim(2) == 2
        assert made.trim(1) == 1
    give(plain, taken, PROMPT - 1, PROMPT + 2, 1)
    assert_same_state(made, plain)


def test_more_than_is_held_is_an_error_and_no_short_answer():
    """mlx-lm does not look at the answer: tokens that stay would be attended to."""
    taken = tokens(6, 200)
    made = prefilled(taken)
    with zm_mlx.rollback([made], 2):
        give(made, taken, PROMPT - 1, PROMPT + 30, 1)
        with pytest.raises(ValueError, match="rollback holds"):
            made.trim(20)


def test_a_prompt_in_the_scope_is_no_decoding():
    """A call longer than a draft can be, or any that is read as a prompt, is a piece of one and cannot be undone."""
    taken = tokens(7, 200)
    made, plain = cache(), cache()
    with zm_mlx.rollback([made], 3):
        give(made, taken, 0, 60)
        assert isinstance(made.phase, Piece)
        with reading([made]):
            give(made, taken, 60, 63)
        assert isinstance(made.phase, Piece)
        with pytest.raises(ValueError, match="rollback holds"):
            made.trim(1)
        give(made, taken, 63, 66)
        assert not isinstance(made.phase, ExactPrompt)
    give(plain, taken, 0, 63)
    give(plain, taken, 63, 66, 1)
    assert_same_state(made, plain)


def test_an_exact_prompt_that_never_comes_to_its_end_ends_where_single_calls_end_it():
    taken = tokens(8, 200)
    made, plain = (cache(24, prefill="exact", prompt_length=60) for _ in range(2))
    for c in (made, plain):
        give(c, taken, 0, 20)
    with zm_mlx.rollback([made], 9):
        for begin in range(20, 50, 10):
            give(made, taken, begin, begin + 10)
    give(plain, taken, 20, 50, 1)
    assert made.phase == plain.phase
    assert_same_state(made, plain)


# ---- outside of the scope


def test_outside_of_the_scope_nothing_can_be_trimmed():
    """So mlx-lm's prompt cache, which trims what says it can be, leaves these caches whole."""
    taken = tokens(9, 200)
    made = prefilled(taken)
    for _ in range(2):
        assert not made.is_trimmable()
        assert made.trim(1) == 0
        with zm_mlx.rollback([made], 2):
            assert made.is_trimmable()
            assert made.trim(0) == 0
            give(made, taken, made.offset, made.offset + 2)
    lru = mlx_lm_cache.LRUPromptCache(4)
    lru.insert_cache("m", list(range(made.offset)), [made])
    found, rest = lru.fetch_nearest_cache("m", list(range(5)))
    assert found is None and rest == list(range(5))


def test_caches_are_saved_copied_and_continued_after_the_scope(tmp_path):
    made = model()
    text = prompt(120)
    caches, plain = (zm_mlx.make_prompt_cache(made, 40) for _ in range(2))
    for c in (caches, plain):
        tiny.feed(made, c, text[:, :100])
    with zm_mlx.rollback(caches, 4):
        made(text[:, 100:105], cache=caches)
        inside = copy.deepcopy(caches)
        mlx_lm_cache.trim_prompt_cache(caches, 3)
    assert not any(c.is_trimmable() for c in inside)
    tiny.feed(made, plain, text[:, 100:102], 1)
    file = str(tmp_path / "a.safetensors")
    zm_mlx.save_prompt_cache(file, caches)
    expected, _ = greedy(made, plain, text[:, 102:103], 30)
    for again in (zm_mlx.load_prompt_cache(file, made), copy.deepcopy(caches), caches):
        found, _ = greedy(made, again, text[:, 102:103], 30)
        assert found.tolist() == expected.tolist()


# ---- exceptions


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["update_and_fetch", "attend"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Broken])
def test_an_exception_in_a_call_leaves_all_layers_with_the_same_tokens(where, layer, error, monkeypatch):
    made = model()
    text = prompt(130)
    caches, plain = (zm_mlx.make_prompt_cache(made, 40) for _ in range(2))
    for c in (caches, plain):
        tiny.feed(made, c, text[:, :100])

    def fail(*_):
        raise error

    with pytest.raises(error), zm_mlx.rollback(caches, 4):
        made(text[:, 100:105], cache=caches)
        mlx_lm_cache.trim_prompt_cache(caches, 2)
        monkeypatch.setattr(caches[layer], where, fail)
        try:
            made(text[:, 103:108], cache=caches)
        finally:  # what mlx-lm does, with the numbers of the call before
            mlx_lm_cache.trim_prompt_cache(caches, 2)
    monkeypatch.undo()
    assert not any(c.pending or c.is_trimmable() for c in caches)
    tiny.feed(made, plain, text[:, 100:103], 1)
    for a, b in zip(caches, plain, strict=True):
        assert_same_state(a, b)
    assert (
        greedy(made, caches, text[:, 103:104], 20)[0].tolist() == greedy(made, plain, text[:, 103:104], 20)[0].tolist()
    )


def test_a_scope_within_an_exception_s_handler_takes_back_as_any_other():
    taken = tokens(10, 200)
    made, plain = prefilled(taken), prefilled(taken)
    try:
        raise Broken
    except Broken:
        with zm_mlx.rollback([made], 5):
            give(made, taken, PROMPT - 1, PROMPT + 5)
            made.trim(2)
            made.trim(1)
    give(plain, taken, PROMPT - 1, PROMPT + 2, 1)
    assert_same_state(made, plain)


# ---- what is refused, and what it costs


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (lambda: mlx_lm_cache.RotatingKVCache(8), "RotatingKVCache"),
        (lambda: mlx_lm_cache.ArraysCache(2), "ArraysCache"),
        (lambda: mlx_lm_cache.ChunkedKVCache(8), "ChunkedKVCache"),
        (lambda: mlx_lm_cache.CacheList(mlx_lm_cache.ArraysCache(2), cache()), "ArraysCache"),
        (lambda: ZeroMergeCache.merge([cache()]), "batch"),
    ],
)
def test_caches_that_cannot_give_back_are_refused_by_name(other, name):
    made = cache()
    with pytest.raises(zm_mlx.UnsupportedModelError, match=name), zm_mlx.rollback([made, other()], 2):
        pass
    assert not made.is_trimmable()


def test_members_of_a_list_of_caches_are_rolled_back():
    taken = tokens(11, 200)
    made, plain = prefilled(taken), prefilled(taken)
    both = mlx_lm_cache.CacheList(made, mlx_lm_cache.KVCache())
    with zm_mlx.rollback([both], 3):
        assert both.is_trimmable()
        give(made, taken, PROMPT - 1, PROMPT + 3)
        made.trim(2)
    give(plain, taken, PROMPT - 1, PROMPT + 1, 1)
    assert_same_state(made, plain)


@pytest.mark.parametrize("k", [0, -1, 1.5, None])
def test_a_draft_has_tokens(k):
    with pytest.raises(ValueError, match="k must be"), zm_mlx.rollback([cache()], k):
        pass


def test_scopes_do_not_nest():
    made = cache()
    with zm_mlx.rollback([made], 2), pytest.raises(ValueError, match="already"), zm_mlx.rollback([made], 3):
        pass
    assert not made.is_trimmable()


def test_the_log_holds_one_budget_more_at_most():
    """All that a scope holds while a compaction lies between the oldest call that can be undone and now."""
    made = model(layers=4, heads=4, kv_heads=4, head_dim=64)
    text = prompt(600)
    plan = zm_mlx.plan_cache(made, 256)
    caches = plan.caches(made)
    for part in tiny.chunks(512, 64):
        made(text[:, part], cache=caches)
        mx.eval([c.state for c in caches])
    for i in range(512, 520):  # ends the piece
        mx.eval(made(text[:, i : i + 1], cache=caches))
    mx.clear_cache()
    before, most = mx.get_active_memory(), 0
    with zm_mlx.rollback(caches, 4):
        for begin in range(520, 590, 2):
            mx.eval(made(text[:, begin : begin + 5], cache=caches))
            most = max(most, mx.get_active_memory())
            mlx_lm_cache.trim_prompt_cache(caches, 3)
    mx.synchronize()
    assert 0 < most - before <= 1.1 * plan.nbytes
    mx.clear_cache()
    assert mx.get_active_memory() - before < 0.1 * plan.nbytes
