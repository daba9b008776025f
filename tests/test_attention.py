"""Plain attention and importance (zm_mlx/ops/plain/attention.py, half.py) against the float64 twin."""

import math

import mlx.core as mx
import numpy as np
import pytest
import twin
from states import FLOATS, Given, f32, names, random_queries, random_state
from tiny import TOLERANCE, f64

from zm_mlx.ops.plain import attention, half
from zm_mlx.policies import Policy
from zm_mlx.state import rows
from zm_mlx.state.layout import Layout
from zm_mlx.state.state import Call

UNIFORM, RAGGED = (5, 5, 5), (0, 9, 5)  # context rows of each head


def head_of(layout, state, b, h):
    """The filled rows of one stored head in float64: keys, values, weight, spread, how many are kept rows."""
    begin, end = layout.starts[h : h + 2]
    filled, old = state.filled, min(state.departed, end - begin)
    kept = slice(begin, begin + old)
    keys, values = (
        np.concatenate([f64(x[b, kept]), f64(y[b, h, :filled])])
        for x, y in zip(state.kept.rows, state.recent, strict=True)
    )
    weight = np.concatenate([f64(state.kept.weight[b, kept]), np.ones(filled)])
    spread = np.zeros(old + filled)
    if state.departed > end - begin:
        spread[: layout.residual] = f64(state.residuals.spread[b, h])
    return keys, values, weight, spread, old


def check_attention(given):
    """``attend``, also that for 16 bits, and ``score`` equal the twin for every sequence and head."""
    out, scores = attention.attend(*given)
    again = attention.score(*given)
    assert all(mx.array_equal(*pair) for pair in zip(again, scores, strict=True))
    check_results(given, out, scores)
    # A cache has no scores there; ``half`` relies on it.
    state = given.state
    recent = mx.where(mx.arange(state.recent_rows) < state.filled, state.scores.recent, 0)
    given = given._replace(state=state._replace(scores=state.scores._replace(recent=recent)))
    check_results(given, *half.attend(*given))


def check_results(given, out, scores):
    call, state, layout, policy = given
    queries, filled, old_scores = call.queries, state.filled, state.scores
    assert out.dtype == queries.dtype and all(s.dtype == mx.float32 for s in scores)
    batch, _, length, dim = queries.shape
    assert out.shape == (*queries.shape[:3], state.recent.value_dim)
    assert [x.shape for x in scores] == [x.shape for x in old_scores]
    assert not scores.recent[:, :, filled:].any(), "a recent row that holds nothing has a score"
    fade = policy.decay**length
    on_kept = scores.kept - fade * old_scores.kept
    on_recent = (scores.recent - fade * old_scores.recent)[:, :, :filled]
    q = f64(queries).reshape(batch, layout.heads, -1, length, dim)
    outputs = f64(out).reshape(*q.shape[:4], -1)
    error = TOLERANCE[queries.dtype]
    for b in range(batch):
        for h in range(layout.heads):
            keys, values, weight, spread, old = head_of(layout, state, b, h)
            visible = np.ones((length, old + filled), bool)
            visible[:, old:] = np.arange(filled) <= np.arange(filled - length, filled)[:, None]
            sink = None if call.sinks is None else f64(call.sinks).reshape(layout.heads, -1)[h]
            expected, p = twin.attention(
                q[b, h], keys, values, weight, spread, visible,
                scale=call.scale, alpha=policy.alpha, kappa=policy.kappa, sinks=sink,
            )  # fmt: skip
            np.testing.assert_allclose(outputs[b, h], expected, atol=error, rtol=error)
            mass = twin.mass(p, policy.decay)
            begin, end = layout.starts[h : h + 2]
            np.testing.assert_allclose(f64(on_kept[b, begin : begin + old]), mass[:old], atol=3e-5, rtol=1e-4)
            assert np.abs(f64(on_kept[b, begin + old : end])).max(initial=0) < 1e-6, "a row that holds nothing has mass"
            np.testing.assert_allclose(f64(on_recent[b, h]), mass[old:], atol=3e-5, rtol=1e-4)


def given(layout, departed, filled, *, length=1, groups=2, dtype=mx.float32, policy=None, **more):
    state = random_state(layout, departed=departed, filled=filled, dtype=dtype, **more)
    queries = random_queries(layout, length, groups, state.recent.head_dim, dtype, batch=state.recent.shape[0])
    return Given(Call(queries, 0.3), state, layout, policy or Policy())


@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
@pytest.mark.parametrize("context", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("length", [1, 4])
def test_attend_equals_the_twin_over_merged_rows(dtype, groups, context, length):
    layout = Layout(3, tuple(sorted(context, reverse=True)), 4, 3)
    check_attention(given(layout, 100, 6, length=length, groups=groups, value_dim=12, dtype=dtype))


@pytest.mark.parametrize("departed", [0, 1, 4, 9])
def test_rows_that_hold_nothing_are_never_read(departed):
    layout = Layout(3, (9, 5, 0), 4, 3)  # 4: one head is full; 9: one head has merged, one is partly filled
    check_attention(given(layout, departed, 5, length=3))


def test_residual_rows_of_weight_0_are_invisible():
    check_attention(given(Layout(3, UNIFORM, 4, 3), 100, 7, empty=(0, 2)))


@pytest.mark.parametrize("layout", [Layout(0, (0, 0), 4, 3), Layout(0, (5, 0), 4, 3), Layout(2, (0, 0), 1, 1)])
def test_heads_without_residual_or_context_rows(layout):
    check_attention(given(layout, 50, layout.recent))


@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
def test_sinks_take_probability_and_nothing_else(dtype):
    sinks = mx.array(np.random.default_rng(3).standard_normal(2 * 3) * 2).astype(dtype)
    check_attention(given(Layout(3, RAGGED[1:], 4, 3), 100, 6, length=4, groups=3, dtype=dtype).with_call(sinks=sinks))


@pytest.mark.parametrize(
    "policy",
    [
        Policy(kappa=0, pool=1),
        Policy(kappa=0.2),
        Policy(kappa=100),
        Policy(alpha=0),
        Policy(alpha=0.6),
        Policy(decay=1),
        Policy(decay=0.5),
    ],
    ids=lambda p: f"alpha {p.alpha} kappa {p.kappa} decay {p.decay}",
)
def test_every_setting_of_attention_means_what_the_equation_says(policy):
    check_attention(given(Layout(3, RAGGED[1:], 4, 3), 100, 7, length=5, policy=policy))


def test_a_merged_row_of_n_equal_tokens_counts_like_n_rows():
    layout, again = Layout(1, (4,), 2, 1), Layout(0, (9,), 2, 1)
    one = given(layout, 100, 3, batch=1)
    state = one.state
    one = one.with_kept(weight=mx.array([[5.0, 1, 1, 1, 1]]))
    one = one._replace(state=one.state._replace(residuals=state.residuals._replace(spread=mx.zeros((1, 1, 1)))))
    many = random_state(again, departed=100, filled=3, batch=1)
    kept = state.kept.rows.map(lambda x: mx.concatenate([mx.repeat(x[:, :1], 5, axis=1), x[:, 1:]], axis=1))
    many = many._replace(kept=many.kept._replace(rows=kept, weight=mx.ones((1, 9))), recent=state.recent)
    a, b = attention.attend(*one), attention.attend(one.call, many, again, Policy())
    np.testing.assert_allclose(f64(a[0]), f64(b[0]), atol=1e-6)
    mass = [x[1].kept - Policy().decay * s.scores.kept for x, s in ((a, state), (b, many))]
    np.testing.assert_allclose(f64(mass[0])[0, 0], f64(mass[1])[0, :5].sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
@pytest.mark.parametrize("limit", ["LOGIT_BYTES", "TILE_BYTES", "both"])
def test_blocks_of_queries_and_tiles_of_rows_change_nothing(monkeypatch, dtype, limit):
    layout = Layout(3, tuple(sorted(RAGGED, reverse=True)), 4, 9)
    case = given(layout, 100, 13, length=9, dtype=dtype, value_dim=12, policy=Policy(decay=0.8))
    if limit != "TILE_BYTES":
        monkeypatch.setattr(attention, "LOGIT_BYTES", 4 * 2 * 1 * 2 * 25 * 2)
        assert attention.block_length(case.call.queries[:, :4], 25) < 9, "the queries are not blocked"
    if limit != "LOGIT_BYTES":
        monkeypatch.setattr(rows, "TILE_BYTES", 4 * 2 * 12 * 4)
        assert dtype == mx.float32 or len(list(case.state.recent.tiles())) > 1, "the rows are not tiled"
    check_attention(case)


def peak(work):
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(work())
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("context", [(400, 400), (600, 200)], ids=["uniform", "ragged"])
def test_blocks_of_queries_bound_memory(monkeypatch, context):
    """Lazy evaluation may run independent blocks side by side: then all logits exist at once."""
    case = given(Layout(4, context, 540, 20), 9000, 560, batch=1, length=512)
    monkeypatch.setattr(attention, "LOGIT_BYTES", 2**16)
    mx.eval(case.call.queries, case.state)
    logits = 4 * 4 * 512 * 960
    assert peak(lambda: attention.attend(*case)) < logits / 8
    assert peak(lambda: attention.score(*case)) < logits / 8


def test_tiles_of_half_precision_rows_bound_memory(monkeypatch):
    """Some tiles are always in flight, but not all of them."""
    layout = Layout(4, (20000,), 4, 4)
    case = given(layout, 90000, 8, groups=1, batch=1, dim=32, value_dim=32, dtype=mx.float16)
    mx.eval(case.call.queries, case.state)
    whole = peak(lambda: attention.attend(*case))
    monkeypatch.setattr(rows, "TILE_BYTES", 4 * 32 * 500)  # 40 tiles
    assert peak(lambda: attention.attend(*case)) < whole / 3


def test_block_length_keeps_logits_below_the_limit_and_is_at_least_1(monkeypatch):
    q = mx.zeros((2, 6, 1000, 4))
    for limit in (1, 10**4, 10**6, 10**9):
        monkeypatch.setattr(attention, "LOGIT_BYTES", limit)
        length = attention.block_length(q, 50)
        assert length == 1 or 4 * 2 * 6 * length * 50 <= limit
        assert length == 1000 or 4 * 2 * 6 * (length + 1) * 50 > limit


def test_logits_of_a_thousand_nats_stay_finite():
    case = given(Layout(3, UNIFORM, 4, 3), 100, 7)
    out, scores = attention.attend(*case.with_call(queries=case.call.queries * 1e3))
    assert all(math.isfinite(x.sum().item()) for x in (out, *scores))


def test_16_bit_outputs_of_a_token_do_not_depend_on_its_neighbours_in_a_call():
    """The bits, for one in some thousand roundings is enough to change a generated token."""
    layout = Layout(3, (40, 20), 30, 10)
    case = given(layout, 500, 35, length=7, dtype=mx.float16, dim=64, value_dim=64)
    together, _ = half.attend(*case)
    for i in range(7):
        before = case.state._replace(filled=35 - 6 + i)
        alone, _ = half.attend(case.call.at(i, i + 1), before, layout, Policy())
        assert mx.array_equal(alone[:, :, 0], together[:, :, i])


def test_only_the_rows_that_were_merged_are_lifted():
    """A policy's lift is given the spread of residual rows, and its result added to them alone."""
    layout = Layout(2, (6,), 4, 3)
    case = given(layout, 100, 5, groups=1)
    wide = case.state.residuals._replace(spread=f32(np.full((2, 1, 2), 1e3)))
    lifted = case._replace(state=case.state._replace(residuals=wide), policy=Policy(kappa=0.7))
    plain = lifted._replace(policy=Policy(kappa=0))
    mass = [f64(attention.score(*x).kept - 0.98 * case.state.scores.kept) for x in (lifted, plain)]
    ratio = mass[0] / mass[1]
    np.testing.assert_allclose(ratio[:, :2] / ratio[:, 2:4], math.exp(0.7), rtol=1e-4)
