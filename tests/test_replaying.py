"""A prompt's own queries behind their piece: what they show, and that nothing else changes."""

import mlx.core as mx
import numpy as np
import pytest
from states import GARBAGE, names, random_queries, random_state
from tiny import f64

from zm_mlx.ops.choose import Operations
from zm_mlx.ops.plain import attention, replaying
from zm_mlx.policies import Policy, ZeroMerge
from zm_mlx.state.layout import Layout
from zm_mlx.state.state import Call, Scores

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
FILLED = 17


def rotation(dim, seed=0):
    """Any orthogonal matrix stands for the rotation by a piece."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0].astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oldest(state, layout, head, piece):
    """Keys of the first four raw rows of a stored head before the piece."""
    begin, end = layout.starts[head : head + 2]
    kept = slice(begin + layout.residual * (state.departed > end - begin), min(end, begin + state.departed))
    recent = state.recent.keys[0, head, : state.filled - piece]
    return np.concatenate([f64(state.kept.rows.keys[0, kept]), f64(recent)])[:4]


def given(layout, length, groups, dtype=mx.float32, departed=0, **more):
    state = random_state(layout, departed=departed, filled=FILLED, dtype=dtype, **more)
    old = Scores(*(mx.random.uniform(shape=x.shape) for x in state.scores))
    batch = state.recent.shape[0]
    return state._replace(reading=old), Call(random_queries(layout, length, groups, 8, dtype, batch=batch), 0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=names(DTYPES))
@pytest.mark.parametrize("departed", [0, 3, 60])
@pytest.mark.parametrize("length", [2, 11, FILLED])
@pytest.mark.parametrize("context", [(7, 7), (9, 0), (2, 8)], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_the_equation_in_float64(monkeypatch, context, length, departed, dtype, groups):
    """Also with logits in several blocks; heads of unequal rows keep other oldest tokens."""
    monkeypatch.setattr(attention, "LOGIT_BYTES", 2**10)
    layout = Layout(2, context, 4, 20, reading=True)
    state, call = given(layout, length, groups, dtype, departed, batch=1)
    turn = rotation(8)
    new = replaying.replay(call, state, layout, mx.array(turn))
    assert new.reading.recent.dtype == mx.float32
    for head in range(2):
        moved = f64(call.queries[0, groups * head : groups * (head + 1)]) @ turn.astype(np.float64)
        piece = f64(state.recent.keys[0, head, FILLED - length : FILLED])
        keys = np.concatenate([oldest(state, layout, head, length), piece])
        shown = softmax(0.3 * moved @ keys.T)[..., -length:].max((0, 1))
        found = f64(new.reading.recent[0, head, FILLED - length : FILLED])
        np.testing.assert_allclose(found, shown, rtol=2e-5)


@pytest.mark.parametrize("departed", [0, 60])
def test_nothing_but_the_reading_of_the_piece_changes(departed):
    layout = Layout(2, (7, 5), 4, 20, reading=True)
    state, call = given(layout, 5, 2, departed=departed)
    new = replaying.replay(call, state, layout, mx.eye(8))
    assert new.reading.kept is state.reading.kept
    same = np.array(new.reading.recent == state.reading.recent)
    assert same[:, :, : FILLED - 5].all() and same[:, :, FILLED:].all() and not same[:, :, FILLED - 5 : FILLED].any()
    assert new._replace(reading=None) == state._replace(reading=None)


def test_rows_that_hold_nothing_and_other_sequences_have_no_part():
    layout = Layout(0, (9, 9), 4, 20, reading=True)
    state, call = given(layout, 6, 2, departed=2)
    assert mx.abs(state.recent.keys).max() == mx.abs(state.kept.rows.keys).max() == GARBAGE
    found = replaying.replay(call, state, layout, mx.eye(8)).reading.recent
    for b in range(2):
        one = slice(b, b + 1)
        alone = state._replace(
            kept=state.kept._replace(rows=state.kept.rows.map(lambda x, one=one: x[one])),
            recent=state.recent.map(lambda x, one=one: x[one]),
            reading=Scores(*(x[one] for x in state.reading)),
        )
        mine = replaying.replay(call._replace(queries=call.queries[one]), alone, layout, mx.eye(8)).reading.recent
        np.testing.assert_allclose(f64(mine), f64(found[one]), rtol=1e-6)


def test_queries_see_what_comes_after_them():
    """The first token's query finds the last token: that is what replaying is for."""
    layout = Layout(0, (4,), 4, 20, reading=True)
    state = random_state(layout, departed=0, filled=8, batch=1)
    target = state.recent.keys[:, :, 7:8]
    queries = mx.concatenate([50 * target, mx.zeros((1, 1, 7, 8))], axis=2)
    state = state._replace(reading=Scores(mx.zeros((1, 4)), mx.zeros((1, 1, 24))))
    reading = replaying.replay(Call(queries, 1.0), state, layout, mx.eye(8)).reading.recent
    assert reading[0, 0, 7].item() > 0.99 > 0.2 > reading[0, 0, :7].max().item()


def test_a_copying_head_is_shown_by_rotated_queries_only_where_they_are_moved():
    """With a real rotation a query that looks one token back finds nothing after itself unless it is moved."""
    layout = Layout(0, (4,), 4, 40, reading=True)
    rope = mx.fast.rope
    length, dim = 16, 8
    content = mx.array(np.random.default_rng(0).standard_normal((1, 1, length, dim)).astype(np.float32)) * 4

    def rotate(x, offset):
        return rope(x, dim, traditional=False, base=100.0, scale=1.0, offset=offset)

    state = random_state(layout, departed=0, filled=length, batch=1, dim=dim)
    keys = mx.concatenate([rotate(content, 0), state.recent.keys[:, :, length:]], axis=2)
    state = state._replace(
        recent=state.recent._replace(keys=keys), reading=Scores(mx.zeros((1, 4)), mx.zeros((1, 1, 44)))
    )
    turn = rotate(mx.eye(dim)[:, None, None], 32)[:, 0, 0]
    found = replaying.replay(Call(rotate(content, 0), 1.0), state, layout, turn).reading.recent[0, 0, :length]
    # The same queries, computed where they are moved to.
    moved = f64(rotate(content, 32))[0, 0] @ f64(keys)[0, 0, :length].T
    np.testing.assert_allclose(f64(found), softmax(moved).max(0), rtol=1e-3, atol=1e-6)


def test_what_is_not_finite_in_one_query_head_stays_in_its_kv_head():
    layout = Layout(0, (7, 7), 4, 20, reading=True)
    state, call = given(layout, 5, 2)
    queries = mx.concatenate([mx.full((2, 1, 5, 8), mx.nan), call.queries[:, 1:]], axis=1)
    new = replaying.replay(call._replace(queries=queries), state, layout, mx.eye(8)).reading.recent
    assert not mx.isnan(new[:, 1]).any()


def test_without_a_known_rotation_nothing_is_replayed():
    policy = ZeroMerge()
    layout = policy.layout(64, 2)
    state = random_state(layout, departed=0, filled=9)
    operations = Operations(layout, policy)
    assert not operations.replays
    assert operations.replay(Call(random_queries(layout, 9, 1, 8, mx.float32), 0.3), state) is state
    assert Operations(layout, policy, turn=mx.eye(8)).replays
    assert not Operations(layout, Policy(), turn=mx.eye(8)).replays


def test_a_piece_does_not_hold_all_its_logits():
    layout = Layout(0, (64, 64), 4, 600, reading=True)
    state = random_state(layout, departed=0, filled=512, dim=8)
    call = Call(random_queries(layout, 512, 4, 8, mx.float32), 0.3)
    state = state._replace(reading=Scores(*map(mx.zeros_like, state.scores)))
    logits = 4 * 2 * 2 * 4 * 512 * 512
    mx.eval(state, call.queries)
    peaks = []
    for limit in (2**17, 2**30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "LOGIT_BYTES", limit)
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(replaying.replay(call, state, layout, mx.eye(8)).reading)
            peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < logits / 5 < peaks[1]
