"""The default policy in phases: a prompt in pieces that are replayed, however it is cut, held, saved or ended."""

import copy
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_make_prompt_cache
from tiny import assert_same_state, f64, feed, give, greedy, held, tokens

import zm_mlx
from zm_mlx import phases
from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.host.model_caches import zero_merge
from zm_mlx.phases import PIECE, Piece, Streaming
from zm_mlx.policies import ZeroMerge
from zm_mlx.state.layout import LayerShape

DIM = 8
TURN = mx.array(np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, DIM)))[0].astype(np.float32))
SHAPE = LayerShape(2, DIM, DIM, 4)
FLOAT32 = 4
# Sizes of calls by the length of a prompt; none leaves one token, which would be decoding.
SIZES = {602: [2, 7, 2048], 2306: [511, 512, 513, 2048]}
few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def cache(rows, policy=ZeroMerge(), turn=TURN, **more):  # noqa: B008 - a value
    return tiny.cache(rows, policy=policy, turn=turn, **more)


def piece_bytes(length, groups=2):
    """One piece: keys, values, score and reading of its tokens, and its queries."""
    rows = SHAPE.heads * length * (2 * DIM * FLOAT32 + 2 * FLOAT32)
    return rows + SHAPE.heads * groups * length * DIM * FLOAT32


@contextmanager
def short_pieces():
    """Pieces of 16 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "PIECE", 16)
        yield


@pytest.fixture
def short():
    with short_pieces():
        yield


# ---- however a prompt is cut


@pytest.fixture(scope="module")
def long_prompt():
    return tokens(11, 2048 + 300)


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("rows", [120, [64, 300]], ids=str)
@pytest.mark.parametrize("length", SIZES)
def test_a_prompt_reaches_the_same_state_in_calls_of_any_size(prefill, rows, length, long_prompt):
    """And gives the same output, then decodes alike."""
    prompt, rest = ([x[:, :, part] for x in long_prompt] for part in (slice(length), slice(length, length + 30)))
    how = {"prefill": prefill, "prompt_length": length} if prefill == "exact" else {}
    found = []
    for size in SIZES[length]:
        made = cache(rows, **how)
        out = give(made, *prompt, size)
        out = mx.concatenate([out, give(made, *rest, 1)], axis=2)
        found.append((made, out))
    for made, out in found[:-1]:
        assert_same_state(made, found[-1][0])
        np.testing.assert_allclose(f64(out), f64(found[-1][1]), atol=2e-5)
    assert found[0][0].layer.reading.kept.max().item() > 0


def test_a_last_call_of_one_token_is_decoding_and_compacts_no_sooner(long_prompt):
    """As where mlx-lm's last chunk is one token: a piece of one token is no piece."""
    states = []
    for sizes in ([1024, 1, 1, 1], [512, 513, 1, 1]):
        made = cache(120)
        give(made, *(x[:, :, :1027] for x in long_prompt), sizes)
        states.append(made)
    assert_same_state(*states)
    assert states[0].layer.since_compaction == 3


def test_an_exact_prompt_of_one_piece_is_what_a_piece_of_streaming_is(short):
    q, k, v = tokens(3, 40)
    exact, streaming = cache(14, prefill="exact", prompt_length=16), cache(14)
    for made in (exact, streaming):
        give(made, q, k, v, [16, *[1] * 24])
    assert_same_state(exact, streaming)


def test_each_piece_is_replayed_once_and_by_its_own_queries(short, monkeypatch):
    asked = []

    class Operations(phases.Operations):
        def replay(self, call, state):
            asked.append((state.seen, call.queries))
            return super().replay(call, state)

    q, k, v = tokens(3, 50)
    for how in ({"prefill": "exact", "prompt_length": 45}, {}):
        made = cache(14, **how)
        made.operations = Operations(made.layout, made.policy, "ops", TURN)
        asked.clear()
        give(made, q, k, v, [5, 20, 20, *[1] * 5])
        assert [seen for seen, _ in asked] == [16, 32, 45]
        for (seen, queries), begin in zip(asked, (0, 16, 32), strict=True):
            assert mx.array_equal(queries, q[:, :, begin:seen])


# ---- the cap


@pytest.mark.parametrize("rows", [120, [64, 300]], ids=str)
@pytest.mark.parametrize(
    "sizes", [[7] * 100, [600], [511, 2, 600, 3], [2, 1, 30, 1, 1, 500, 1]], ids=lambda x: str(x[:4])
)
def test_no_call_leaves_more_than_the_budget_and_one_piece_and_decoding_only_the_budget(sizes, rows, long_prompt):
    made = cache(rows)
    budget = made.layout.nbytes(SHAPE)
    for size in [*sizes, *[1] * 3]:
        give(made, *(x[:, :, made.offset : made.offset + size] for x in long_prompt))
        assert made.nbytes <= budget + piece_bytes(PIECE)
        if size == 1:
            assert made.nbytes == budget and made.phase == Streaming()
            assert all(len(held(made, h).weight) <= made.layout.rows[h] for h in range(2))
        assert made.prefill == "streaming"


def test_a_call_of_one_token_ends_a_piece_however_full_it_is(long_prompt):
    for size in (2, 300, 510, 511):
        made = cache(120)
        give(made, *(x[:, :, :size] for x in long_prompt))
        assert isinstance(made.phase, Piece) and made.remaining is None
        give(made, *(x[:, :, size : size + 1] for x in long_prompt))
        assert made.phase == Streaming() and made.nbytes == made.layout.nbytes(SHAPE)
        alike = cache(120)
        give(alike, *(x[:, :, :size] for x in long_prompt))
        alike.finish_prompt()
        assert alike.phase == Streaming()
        give(alike, *(x[:, :, size : size + 1] for x in long_prompt))
        assert_same_state(made, alike)


def test_memory_does_not_grow_with_a_prompt():
    peaks = []
    for pieces in (2, 6):
        q, k, v = tokens(0, pieces * PIECE, dim=DIM)
        mx.eval(q, k, v)
        made = cache(120)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for begin in range(0, q.shape[2], PIECE):
            part = slice(begin, begin + PIECE)
            new = made.update_and_fetch(k[:, :, part], v[:, :, part])
            mx.eval(made.attend(q[:, :, part], *new, 0.3))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < peaks[0] + piece_bytes(PIECE) / 2


# ---- under the budget


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("size", [13, 1000])
def test_under_the_budget_nothing_changes(prefill, size):
    model, prompt = tiny.model(), tiny.prompt(150)
    caches = zm_mlx.make_prompt_cache(model, 256, prompt_length=150, prefill=prefill)
    ours, logits = greedy(model, caches, prompt, 40, size)
    full, expected = greedy(model, mlx_lm_make_prompt_cache(model), prompt, 40, size)
    assert zero_merge(caches)[0].operations.replays
    assert np.array_equal(ours, full)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


# ---- under way


def test_a_piece_that_is_saved_goes_on_with_the_same_tokens(tmp_path):
    model, prompt = tiny.model(), tiny.prompt(700)
    caches = zm_mlx.make_prompt_cache(model, 64)
    feed(model, caches, prompt[:, :600], 600)
    assert all(isinstance(c.phase, Piece) for c in caches) and caches[0].layer.seen == 600
    file = tmp_path / "piece.safetensors"
    zm_mlx.save_prompt_cache(file, caches)
    loaded = zm_mlx.load_prompt_cache(file, model)
    for a, b in zip(caches, loaded, strict=True):
        assert (a.policy, a.nbytes, a.phase.before) == (b.policy, b.nbytes, b.phase.before)
        assert mx.array_equal(a.phase.queries, b.phase.queries)
        assert isinstance(b.phase, Piece) and mx.array_equal(a.operations.turn, b.operations.turn)
    ours = [greedy(model, x, prompt[:, 600:], 20, 30) for x in (caches, loaded)]
    assert np.array_equal(ours[0][0], ours[1][0]) and np.array_equal(ours[0][1], ours[1][1])
    for a, b in zip(caches, loaded, strict=True):
        assert_same_state(a, b)


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_a_copy_of_a_cache_within_a_piece_goes_its_own_way(prefill, short):
    q, k, v = tokens(5, 90)
    made, plain = (cache(20, prefill=prefill, prompt_length=60) for _ in range(2))
    for one in (made, plain):
        give(one, *(x[:, :, :41] for x in (q, k, v)))
    branch = copy.deepcopy(made)
    give(branch, *(x[:, :, 41:] * 3 for x in (q, k, v)), 8)  # another text
    give(made, *(x[:, :, 41:] for x in (q, k, v)), 8)
    give(plain, *(x[:, :, 41:] for x in (q, k, v)), 8)
    assert_same_state(made, plain)
    assert branch.offset == 90 and not mx.array_equal(branch.layer.recent.keys, made.layer.recent.keys)


def test_a_conversation_turn_by_turn(short):
    """Turns of prompts and answers, under one cap; chunks within a turn change nothing."""
    model, prompt = tiny.model(), tiny.prompt(400)
    runs = []
    for size in (7, 1000):
        caches, at = zm_mlx.make_prompt_cache(model, 40), 0
        for turn, answer in ((60, 5), (3, 9), (100, 1), (2, 30), (17, 4), (33, 10)):
            feed(model, caches, prompt[:, at : at + turn], size)
            feed(model, caches, prompt[:, at + turn : at + turn + answer], 1)
            at += turn + answer
            for c in caches:
                assert c.phase == Streaming() and c.offset == at
                assert c.nbytes == c.layout.nbytes(c.shape)
        runs.append(caches)
    for a, b in zip(*runs, strict=True):
        assert_same_state(a, b)


def test_later_pieces_are_replayed_where_rows_are_codes(short):
    """The oldest tokens are in the kept store then, and none is taken from the codes of the recent one."""
    dim = 32
    made = cache(40, ZeroMerge(kv_bits=8, kv_group_size=dim), mx.eye(dim))
    give(made, *tokens(5, 90, dim=dim), 30)
    assert made.layer.departed >= 4 and made.layer.closed
    made.finish_prompt()
    assert mx.all(made.layer.reading.recent[:, :, : made.layer.filled] > 0)


def test_an_announced_turn_ends_a_piece_and_is_exact(short):
    q, k, v = tokens(5, 90)
    made = cache(20)
    give(made, *(x[:, :, :25] for x in (q, k, v)))
    assert isinstance(made.phase, Piece)
    made.begin_prompt(40)
    assert made.prefill == "exact" and made.offset == 25 and len(held(made, 0).weight) <= 20
    give(made, *(x[:, :, 25:65] for x in (q, k, v)), 9)
    assert made.phase == Streaming() and made.nbytes == made.layout.nbytes(SHAPE)


def test_an_exact_prompt_that_ends_early_is_scored_as_one_that_was_announced_right(short, monkeypatch):
    monkeypatch.setattr(ZeroMerge, "window", property(lambda self: 24))
    q, k, v = tokens(6, 75)
    right, early = cache(20, prefill="exact", prompt_length=45), cache(20, prefill="exact", prompt_length=60)
    for made in (right, early):
        give(made, *(x[:, :, :45] for x in (q, k, v)), 10)
        made.finish_prompt()
    assert_same_state(right, early)


def test_16_bit_rows_are_cut_in_any_way(short):
    q, k, v = (x.astype(mx.bfloat16) for x in tokens(7, 90))
    states = []
    for size in (5, 1000):
        made = cache(24)
        give(made, q, k, v, size)
        give(made, *(x[:, :, :1] for x in (q, k, v)))
        states.append(made)
    assert_same_state(*states)


# ---- what holds without residual rows, whatever comes


@st.composite
def cases(draw, residual=(0,)):
    heads = draw(st.integers(1, 3))
    staging = draw(st.integers(1, 6))
    policy = ZeroMerge(
        residual=draw(st.sampled_from(residual)),
        staging=staging,
        proximity=draw(st.sampled_from([0.1, 0.2, 0.5])),
        decay=draw(st.sampled_from([0.9, 0.98, 1.0])),
        newest=draw(st.sampled_from([1, 4, 32])),
    )
    rows = draw(st.integers(policy.smallest, policy.smallest + 20))
    if heads > 1 and draw(st.booleans()):
        rows = [rows + draw(st.integers(0, 30)) for _ in range(heads)]
    length = draw(st.integers(5, 70))
    sizes = draw(st.lists(st.integers(1, 25), max_size=8))
    batch = draw(st.integers(1, 2))
    q, k, v = tokens(draw(st.integers(0, 10**6)), length, batch=batch, heads=heads, value_dim=6)
    return policy, rows, sizes, (q, k, v)


def made_of(case, **more):
    policy, rows, _, (_, k, _) = case
    return tiny.cache(rows, k.shape[1], policy=policy, turn=TURN, **more)


def cut(sizes, length):
    """Slices of the tokens in calls of these sizes and one for what is left."""
    begin = 0
    for size in [*sizes, length]:
        if begin < length:
            yield slice(begin, min(length, begin + size))
        begin += size


@few
@given(cases(), st.booleans())
def test_every_row_is_a_token_in_its_place_after_every_call(case, exact):
    """Rows are raw, bit for bit, in order, with the newest, and within the budget unless a prompt is held."""
    with short_pieces():
        _, _, sizes, (q, k, v) = case
        length, heads = k.shape[2], k.shape[1]
        made = made_of(case, **({"prefill": "exact", "prompt_length": length // 2 + 1} if exact else {}))
        for part in cut(sizes, length):
            give(made, *(x[:, :, part] for x in (q, k, v)))
            assert made.offset == part.stop
            under_way = not isinstance(made.phase, Streaming)
            if part.stop - part.start == 1 and not exact:
                assert not under_way
            for b in range(k.shape[0]):
                for h in range(heads):
                    rows = held(made, h, b)
                    where = rows.position.tolist()
                    assert where == sorted(set(where)) and min(where) >= 0
                    assert set(rows.weight.tolist()) == {1.0}
                    newest = min(part.stop, made.layout.proximity)
                    assert where[-newest:] == list(range(part.stop - newest, part.stop))
                    assert mx.array_equal(rows.keys, k[b, h, rows.position])
                    assert mx.array_equal(rows.values, v[b, h, rows.position])
                    if not under_way:
                        assert len(where) <= made.layout.rows[h]
                    elif isinstance(made.phase, Piece):
                        assert len(where) <= made.layout.rows[h] + 16
            if not under_way:
                assert made.nbytes == made.layout.nbytes(LayerShape(heads, 8, 6, 4), k.shape[0])


@few
@given(cases(residual=(0, 1)), st.booleans())
def test_nothing_is_lost_up_to_the_budget(case, exact):
    with short_pieces():
        _, _, sizes, arrays = case
        made = made_of(case, **({"prefill": "exact", "prompt_length": arrays[0].shape[2]} if exact else {}))
        room = min(arrays[0].shape[2], made.layout.capacity - 1)
        assume(room)
        q, k, v = (x[:, :, :room] for x in arrays)
        out = mx.concatenate([give(made, *(x[:, :, part] for x in (q, k, v))) for part in cut(sizes, room)], axis=2)
        made.finish_prompt()
        for h in range(k.shape[1]):
            assert held(made, h).position.tolist() == list(range(room))
        full = mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5, mask="causal")
        np.testing.assert_allclose(f64(out), f64(full), atol=2e-5)


@few
@given(cases(residual=(0, 1)), st.lists(st.integers(2, 25), min_size=1, max_size=6), st.booleans())
def test_calls_of_more_than_one_token_may_be_cut_in_any_way(case, sizes, exact):
    with short_pieces():
        _, _, _, (q, k, v) = case
        length = min(k.shape[2], sum(sizes))
        parts = list(cut(sizes, length))
        assume(all(part.stop - part.start > 1 for part in parts))
        how = {"prefill": "exact", "prompt_length": length} if exact else {}
        whole, pieces = made_of(case, **how), made_of(case, **how)
        give(whole, *(x[:, :, :length] for x in (q, k, v)))
        for part in parts:
            give(pieces, *(x[:, :, part] for x in (q, k, v)))
        for made in (whole, pieces):
            made.finish_prompt()
        assert_same_state(whole, pieces)


def test_the_default_of_a_model_is_this_policy():
    caches = zm_mlx.make_prompt_cache(tiny.model(), 64)
    assert all(isinstance(c, ZeroMergeCache) and c.policy == ZeroMerge() and c.operations.replays for c in caches)


@few
@given(cases(residual=(0, 1)))
def test_a_sequence_does_not_depend_on_its_batch_nor_equal_rows_on_being_a_table(case):
    with short_pieces():
        policy, rows, sizes, arrays = case
        together = made_of(case)
        heads, length = arrays[1].shape[1:3]
        for part in cut(sizes, length):
            give(together, *(x[:, :, part] for x in arrays))
        for b in range(arrays[0].shape[0]):
            one = slice(b, b + 1)
            table = rows if isinstance(rows, list) else [rows] * heads
            alone = made_of((policy, table, sizes, arrays))
            for part in cut(sizes, length):
                give(alone, *(x[one, :, part] for x in arrays))
            assert_same_state(alone, together, one)
