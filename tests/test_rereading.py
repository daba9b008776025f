"""The second reading of a prompt: what it shows, that it stores nothing, and who drives it."""

import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
import twin
from architectures import build
from mlx.utils import tree_flatten
from mlx_lm.models import gpt2
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_make_prompt_cache
from states import random_queries, random_state
from test_saved import falcon
from tiny import assert_same_state, f64, feed, tokens

import zm_mlx
from zm_mlx import Policy, UnsupportedModelError
from zm_mlx.engine import mlx_lm_generate
from zm_mlx.host import prefill as module
from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.host.model_caches import members, zero_merge
from zm_mlx.ops.plain import attention, rereading
from zm_mlx.policies.ranking import ranks, united
from zm_mlx.state.layout import Layout
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Call, Scores

REREAD = Policy(residual=2, staging=5, pool=3, score="reread")
ATTENTION = Policy(residual=2, staging=5, pool=3)
PIECE = 16


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(module, "PIECE", PIECE)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def caches_of(model, length, prefill="exact", policy=REREAD, rows=24):
    return zm_mlx.make_prompt_cache(model, rows, prompt_length=length, prefill=prefill, policy=policy)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- what it shows


def oldest_rows(state, layout, head, piece):
    """Keys and values of the first four raw rows of a stored head before the piece."""
    begin, end = layout.starts[head : head + 2]
    kept = slice(begin + layout.residual * (state.departed > end - begin), min(end, begin + state.departed))
    recent = slice(0, state.filled - piece)
    pairs = zip(state.kept.rows, state.recent, strict=True)
    return [np.concatenate([f64(x[0, kept]), f64(y[0, head, recent])])[:4] for x, y in pairs]


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("departed", [0, 3, 60])
@pytest.mark.parametrize("context", [(7, 7), (9, 0)], ids=str)
def test_the_equations_in_float64(monkeypatch, context, departed, dtype, sinks, gpu):
    """Also with logits in several blocks, and as on a GPU."""
    monkeypatch.setattr(attention, "LOGIT_BYTES", 2**12)
    monkeypatch.setattr(rereading, "BLOCK", 4)
    if gpu:
        monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    layout, length, groups = Layout(2, context, 4, 20, reading=True), 11, 3
    state = random_state(layout, departed=departed, filled=17, batch=1, dtype=dtype)
    call = Call(random_queries(layout, length, groups, 8, dtype, batch=1), 0.3)
    if sinks:
        call = call._replace(sinks=mx.arange(2 * groups).astype(dtype))
    new = Dense(*(mx.random.normal((1, 2, length, 8), key=mx.random.key(i)).astype(dtype) for i in (1, 2)))
    before, (out, state) = state, rereading.read_again(call, new, state, layout, Policy())
    assert out.dtype == dtype and all(x is y for x, y in zip(state.arrays()[:-2], before.arrays()[:-2], strict=True))
    tolerance = tiny.TOLERANCE[dtype] * 4
    for head in range(2):
        q = f64(call.queries[0, groups * head : groups * (head + 1)])
        piece = [f64(x[0, head, 17 - length : 17]) for x in state.recent]
        shown = softmax(0.3 * q @ piece[0].T).max((0, 1))
        np.testing.assert_allclose(f64(state.reading.recent[0, head, 17 - length : 17]), shown, rtol=1e-5)
        first = oldest_rows(state, layout, head, length)
        keys, values = (np.concatenate([a, b, f64(c[0, head])]) for a, b, c in zip(first, piece, new, strict=True))
        visible = np.tri(length, len(keys), len(keys) - length, dtype=bool)
        expected, _ = twin.attention(
            *(q, keys, values, np.ones(len(keys)), np.zeros(len(keys)), visible),
            scale=0.3,
            alpha=0,
            kappa=0,
            sinks=f64(call.sinks[groups * head : groups * (head + 1)]) if sinks else None,
        )
        np.testing.assert_allclose(f64(out[0, groups * head : groups * (head + 1)]), expected, atol=tolerance)


def test_only_the_piece_is_scored():
    layout = Layout(2, (7, 7), 4, 20, reading=True)
    state = random_state(layout, departed=60, filled=17)
    old = Scores(mx.random.uniform(shape=(2, 18)), mx.random.uniform(shape=(2, 2, 24)))
    state = state._replace(reading=old)
    call = Call(random_queries(layout, 5, 2, 8, mx.float32), 0.3)
    new = rereading.read_again(call, state.recent.map(lambda x: x[:, :, :5]), state, layout, Policy())[1]
    assert new.reading.kept is old.kept
    same = np.array(new.reading.recent == old.recent)
    assert same[:, :, :12].all() and same[:, :, 17:].all() and not same[:, :, 12:17].any()


# ---- how it is united with attention


def test_equal_values_share_a_rank():
    x = mx.array([[3.0, 5, 3, -mx.inf, 5, 1], [0, 0, 0, 0, 0, 0]])
    assert ranks(x).tolist() == [[2, 0, 2, 5, 0, 4], [0] * 6]


@pytest.mark.parametrize("departed", [0, 8, 40])
@pytest.mark.parametrize("pool", [1, 3])
def test_the_rows_of_highest_importance_are_the_tops_of_both(departed, pool):
    """Among those that compete, head by head; no other row has any importance."""
    layout = Layout(2, (9, 4), 4, 20, reading=True)
    state = random_state(layout, departed=departed, filled=24)
    read = mx.random.uniform(shape=(2, 2, 24)) * (mx.arange(24) % 3 > 0)
    state = state._replace(reading=Scores(mx.random.uniform(shape=state.kept.weight.shape), read))
    worth = united(state, layout, pool)
    for head, group in enumerate(layout.groups):
        raw = state.competing(group, layout)
        leaving = state.leaving(layout)
        assert leaving == 20
        kept = slice(group.first_row, group.stop_row)
        for b in range(2):
            pools = []
            for x in (state.scores, state.reading, worth):
                old = f64(x.kept[b, kept])[raw if raw else slice(0, 0)]
                pools.append(np.concatenate([old, f64(x.recent[b, head, :leaving])]))
            everywhere = np.concatenate([f64(worth.kept[b, kept]), f64(worth.recent[b, head])])
            assert np.isfinite(everywhere).sum() == (len(pools[0]) if raw else 0)
            if raw is None:
                continue
            reach = pool // 2
            n = len(pools[0])
            a, r = ([x[max(0, i - reach) : i + reach + 1].max() for i in range(n)] for x in pools[:2])
            rank = [[sum(y > x for y in z) for x in z] for z in (a, r)]
            expected = [-min(rank[0][i], rank[1][i] if r[i] > 0 else n) for i in range(n)]
            assert pools[2].tolist() == expected


@pytest.mark.parametrize("rows", [20, [30, 12]])
def test_what_was_never_read_is_ranked_by_attention(rows):
    q, k, v = tokens(3, 120)
    both = [tiny.cache(rows, policy=p) for p in (REREAD, ATTENTION)]
    with warnings.catch_warnings(record=True):
        outputs = [tiny.give(c, q, k, v, 7) for c in both]
    assert mx.array_equal(*outputs)
    assert_same_state(*both)


# ---- it stores nothing


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_a_second_reading_changes_nothing_but_the_reading(model, prefill, bits, monkeypatch):
    prompt, seen = tiny.prompt(70)[0], []
    if bits:
        model = tiny.model(head_dim=32)
    again = module._again

    def watched(model, piece, caches):
        before = [(c.layer, c.offset, c.phase, [mx.array(x) for x in c.layer.arrays()[:-2]]) for c in caches]
        again(model, piece, caches)
        for c, (layer, offset, phase, arrays) in zip(caches, before, strict=True):
            assert c.offset == offset and c.phase == phase and not c.pending and not c.rereading
            assert tuple(c.layer[-3:]) == tuple(layer[-3:])
            assert all(mx.array_equal(x, y) for x, y in zip(c.layer.arrays()[:-2], arrays, strict=True))
            newest = c.layer.reading.recent[:, :, c.layer.filled - piece.size : c.layer.filled]
            assert mx.all(newest > 0) and not mx.any(layer.reading.recent[:, :, layer.filled - piece.size :])
        seen.append(piece.size)

    monkeypatch.setattr(module, "_again", watched)
    caches = caches_of(model, 71, prefill, replace(REREAD, kv_bits=bits))
    zm_mlx.prefill(model, prompt, caches)
    assert seen == [14] * 5  # equal pieces
    assert all((c.layout.coding is not None) == bool(bits) for c in caches)


def test_the_first_reading_of_an_exact_prompt_is_that_of_attention(model):
    prompt = tiny.prompt(70)
    read, plain = (caches_of(model, 70, policy=p) for p in (REREAD, ATTENTION))
    zm_mlx.prefill(model, prompt[0, :69], read)
    feed(model, plain, prompt[:, :69], 14)
    for a, b in zip(read, plain, strict=True):
        assert_same_state(a, b)
    x, y = (model(prompt[:, 69:], cache=c) for c in (read, plain))
    np.testing.assert_allclose(f64(x), f64(y), atol=1e-4)
    assert any(
        not mx.array_equal(a.layer.kept.position, b.layer.kept.position) for a, b in zip(read, plain, strict=True)
    )


@pytest.mark.parametrize("name", ["llama_sliding", "gemma3_text", "gpt_oss", "falcon_h1"])
def test_other_caches_of_a_model_are_not_advanced(name):
    model, prompt = falcon() if name == "falcon_h1" else build(name), tiny.prompt(70)
    read, plain = (caches_of(model, 71, policy=p) for p in (REREAD, ATTENTION))
    zm_mlx.prefill(model, prompt[0], read)
    zm_mlx.prefill(model, prompt[0], plain, step=14)
    for a, b in zip(members(read), members(plain), strict=True):
        if isinstance(a, ZeroMergeCache):
            assert mx.any(a.layer.reading.recent > 0)
            assert_same_state(a, b)
        else:
            for (_, x), (_, y) in zip(tree_flatten(a.state), tree_flatten(b.state), strict=True):
                assert x is y is None or np.allclose(np.array(x), np.array(y), atol=1e-5)


# ---- who drives it


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("step", [2, 5, 13, 15, 100])
def test_the_size_of_calls_changes_nothing(model, prefill, step):
    """Also where a piece leaves a call of one token, which must not be taken for decoding."""
    prompt = tiny.prompt(75)[0]
    whole, cut = (caches_of(model, 76, prefill) for _ in range(2))
    zm_mlx.prefill(model, prompt, whole)
    done = []
    zm_mlx.prefill(model, prompt, cut, step=step, progress=lambda *x: done.append(x))
    assert done[0] == (0, 75) and done[-1] == (75, 75)
    for a, b in zip(cut, whole, strict=True):
        assert a.prefill == b.prefill == prefill and a.offset == 75
        assert_same_state(a, b)
        assert mx.allclose(a.layer.reading.recent, b.layer.reading.recent, atol=1e-4)
        assert mx.allclose(a.layer.reading.kept, b.layer.reading.kept, atol=1e-4)


def test_a_streaming_cache_holds_no_more_than_its_budget_and_a_piece(model, monkeypatch):
    most = 0

    def watch(*_):
        nonlocal most
        most = max(most, *(c.layer.recent_rows for c in caches))

    caches = caches_of(model, 200, "streaming")
    layout = caches[0].layout
    zm_mlx.prefill(model, tiny.prompt(200)[0], caches, step=6, progress=lambda n, _: n and watch())
    assert most <= layout.recent + PIECE + 1
    for c in caches:
        assert c.layer.recent_rows == layout.recent and c.layer.filled <= layout.recent
        assert c.nbytes == c.layout.nbytes(c.shape) and mx.any(c.layer.reading.kept > 0)
        # Positions that were read, all over the prompt, and only the newest are left in the recent store.
        assert c.layer.departed >= 200 - layout.recent


def test_importance_by_reading_decides_half_of_the_context(model):
    """With pool 1 the tops of both are in the context, as many of either as of the other."""
    policy = Policy(residual=0, staging=5, pool=1, score="reread")
    caches = caches_of(model, 60, "exact", policy)
    compacted = []
    compact = zm_mlx.host.cache.Operations.compact

    def watched(ops, state):
        compacted.append((state, compact(ops, state)))
        return compacted[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zm_mlx.host.cache.Operations, "compact", watched)
        zm_mlx.prefill(model, tiny.prompt(60)[0], caches)
    layout = caches[0].layout
    assert len(compacted) == len(caches)
    for before, after in compacted:
        n = before.leaving(layout)
        for head in range(2):
            context = after.kept.position[0, layout.starts[head] : layout.starts[head + 1]].tolist()
            tops = [
                set(mx.argsort(-x.recent[0, head, :n])[: len(context) // 2].tolist())
                for x in (before.scores, before.reading)
            ]
            assert tops[0] | tops[1] <= set(context)


def test_a_whole_exact_prompt_is_read_twice_but_for_its_last_token(model):
    prompt = tiny.prompt(70)[0]
    whole, cut = (caches_of(model, 70) for _ in range(2))
    zm_mlx.prefill(model, prompt, whole)
    zm_mlx.prefill(model, prompt[:69], cut)
    model(prompt[None, 69:], cache=cut)
    for a, b in zip(whole, cut, strict=True):
        assert a.prefill == "streaming" and a.offset == 70
        assert_same_state(a, b)


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_a_prompt_that_fits_is_read_once(model, prefill, monkeypatch):
    monkeypatch.setattr(module, "_again", lambda *_: pytest.fail("read twice"))
    zm_mlx.prefill(model, tiny.prompt(24)[0], caches_of(model, 24, prefill))
    zm_mlx.prefill(model, tiny.prompt(60)[0], caches_of(model, 60, prefill, ATTENTION))
    zm_mlx.prefill(model, tiny.prompt(60)[0], mlx_lm_make_prompt_cache(model))


def test_a_later_prompt_is_read_twice_too(model):
    caches = caches_of(model, 40, "streaming")
    prompt = tiny.prompt(100)[0]
    zm_mlx.prefill(model, prompt[:40], caches)
    model(prompt[None, 40:41], cache=caches)
    zm_mlx.prefill(model, prompt[41:], caches)
    for c in caches:
        newest = c.layer.reading.recent[:, :, : c.layer.filled]
        assert c.offset == 100 and mx.all(newest > 0)


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_mlx_lms_own_prefill_says_that_it_reads_once(model, prefill):
    prompt = tiny.prompt(60)[0]

    def run(policy):
        caches = caches_of(model, 60, prefill, policy)
        return [t for t, _ in mlx_lm_generate.generate_step(prompt, model, prompt_cache=caches, max_tokens=9)]

    with pytest.warns(UserWarning, match=r"zm_mlx.prefill\(model"):
        found = run(REREAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found == run(ATTENTION)
        caches = caches_of(model, 60, prefill)
        zm_mlx.prefill(model, prompt[:59], caches)
        list(mlx_lm_generate.generate_step(prompt[59:], model, prompt_cache=caches, max_tokens=40))
        short = caches_of(model, 10, "streaming")
        zm_mlx.prefill(model, prompt[:9], short)
        list(mlx_lm_generate.generate_step(prompt[9:10], model, prompt_cache=short, max_tokens=40))


def test_a_model_that_fails_in_the_second_reading_leaves_no_cache_in_it(model, monkeypatch):
    caches = caches_of(model, 60)
    monkeypatch.setattr(rereading, "read_again", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        zm_mlx.prefill(model, tiny.prompt(59)[0], caches)
    assert not any(c.rereading for c in caches)


def test_positions_that_end_are_refused_by_name():
    args = gpt2.ModelArgs("gpt2", 64, 32, 2, 1, 64, 1e-5, 96)
    model = gpt2.Model(args)
    with pytest.raises(UnsupportedModelError, match=r"read a prompt of 60 tokens twice with gpt2.* 76 .* it has 64"):
        zm_mlx.prefill(model, tiny.prompt(60)[0], caches_of(model, 61))
    zm_mlx.prefill(model, tiny.prompt(48)[0], caches_of(model, 49))


def test_wrong_arguments_raise(model):
    with pytest.raises(ValueError, match="needs tokens"):
        zm_mlx.prefill(model, [], caches_of(model, 60))
    with pytest.raises(ValueError, match="2 tokens or more, for a call of one is decoding"):
        zm_mlx.prefill(model, [1] * 60, caches_of(model, 61), step=1)
    with pytest.raises(ValueError, match="step must be 1 token or more, not 0"):
        zm_mlx.prefill(model, [1] * 60, caches_of(model, 61, policy=ATTENTION), step=0)
    with pytest.raises(ValueError, match=r"score must be one of attention, .*reread, not 'both'"):
        Policy(score="both")
    with pytest.raises(ValueError, match="rows with room for a second reading"):
        ZeroMergeCache(ATTENTION.layout(20, 2), policy=REREAD)


def test_a_saved_prompt_keeps_what_was_read(model, tmp_path):
    prompt = tiny.prompt(200)[0]
    caches = caches_of(model, 60, "streaming")
    zm_mlx.prefill(model, prompt[:60], caches)
    path = tmp_path / "prompt.safetensors"
    zm_mlx.save_prompt_cache(path, caches)
    loaded = zm_mlx.load_prompt_cache(path, model)
    for caches_ in (caches, loaded):
        zm_mlx.prefill(model, prompt[60:], caches_)
    for a, b in zip(zero_merge(loaded), caches, strict=True):
        assert a.policy == REREAD and mx.array_equal(a.layer.reading.kept, b.layer.reading.kept)
        assert mx.array_equal(a.layer.kept.position, b.layer.kept.position)
