"""The residual row that stands for a prompt's victims: its equations, and when it is fitted."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from tiny import f64, give, tokens

from zm_mlx import phases
from zm_mlx.ops.choose import Operations
from zm_mlx.ops.plain import attention, fitting
from zm_mlx.phases import FEWEST
from zm_mlx.policies import ZeroMerge
from zm_mlx.state.state import Call

SCALE = 8**-0.5
TURN = mx.eye(8)


class Watched(Operations):
    """Notes what is fitted."""

    def fit(self, before, left, call):
        made = super().fit(before, left, call)
        Watched.seen.append((before, left, call, made))
        return made

    seen: list = []  # noqa: RUF012


def watched(rows, **more):
    made = tiny.cache(rows, policy=ZeroMerge(), turn=TURN, **more)
    made.operations = Watched(made.layout, made.policy, "ops", TURN)
    Watched.seen.clear()
    return made


def expected(before, left, call, layout, head):
    """Key, mass and value of a stored head's row by the formulas, token by token, in float64."""
    begin, end = layout.starts[head : head + 2]
    residual_before = before.departed > end - begin
    rows = []  # position, weight, key, value; the old row has no position
    for i in range(begin, min(end, begin + before.departed)):
        rows.append((int(before.kept.position[0, i]), float(before.kept.weight[0, i]), i))
    old = [(p, w, f64(before.kept.rows.keys[0, i]), f64(before.kept.rows.values[0, i])) for p, w, i in rows]
    if not residual_before:
        assert all(p >= 0 for p, *_ in old)
    for j in range(before.filled):
        key, value = (f64(x[0, head, j]) for x in before.recent)
        old.append((before.departed + j, 1.0, key, value))
    stays = {int(p) for p in left.kept.position[0, begin:end] if int(p) >= 0}
    victims = [r for r in old if r[0] < left.departed and r[0] not in stays and r[1] > 0]
    groups = call.queries.shape[1] // layout.heads
    queries = f64(call.queries[0, groups * head : groups * (head + 1)]) * call.scale
    xs, ys, given = [], [], np.zeros(len(victims))
    each = max(1, groups * call.length // (fitting.SAMPLES * (queries.shape[2] + 1)))
    for g, heads in enumerate(queries):
        for i, q in enumerate(heads):
            if (g * call.length + i) % each:
                continue
            at = before.seen - call.length + i
            logits = np.array([q @ k + np.log(w) if p <= at - fitting.DISTANCE else -np.inf for p, w, k, _ in victims])
            if np.isfinite(logits).any():
                total = np.log(np.exp(logits).sum())
                xs.append([*q, 1.0])
                ys.append(total)
                given += np.exp(logits - total)
    x, y = np.array(xs), np.array(ys)
    ridge = np.diag([*[fitting.RIDGE * len(y)] * (x.shape[1] - 1), 0.0])
    solution = np.linalg.solve(x.T @ x + ridge, x.T @ y)
    value = sum(g * v for g, (*_, v) in zip(given, victims, strict=True)) / given.sum()
    return solution[:-1], np.exp(solution[-1] - fitting.DISCOUNT), value


@pytest.mark.parametrize("rows", [40, [20, 90]], ids=str)
@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("limit", [2**14, 2**26])
def test_the_equations_in_float64(monkeypatch, rows, prefill, limit):
    """A first prompt and, with an old row among the victims, a second one; also with logits in blocks."""
    monkeypatch.setattr(attention, "LOGIT_BYTES", limit)
    monkeypatch.setattr(phases, "PIECE", 150)
    q, k, v = tokens(3, 320, sharp=1.0)
    made = watched(rows, prefill=prefill, prompt_length=150)
    give(made, *(x[:, :, :150] for x in (q, k, v)))
    if prefill == "exact":
        made.begin_prompt(150)
    give(made, *(x[:, :, 150:] for x in (q, k, v)), [150, *[1] * 20])
    assert len(Watched.seen) == 2
    for before, left, call, after in Watched.seen:
        assert call.length == 150
        for head in range(2):
            first = made.layout.starts[head]
            key, mass, value = expected(before, left, call, made.layout, head)
            np.testing.assert_allclose(f64(after.kept.rows.keys[0, first]), key, atol=2e-3)
            np.testing.assert_allclose(float(after.kept.weight[0, first]), mass, rtol=5e-3)
            np.testing.assert_allclose(f64(after.kept.rows.values[0, first]), value, atol=1e-3)


def test_no_other_row_and_no_older_state_changes():
    q, k, v = tokens(3, 300)
    made = watched(40, prefill="exact", prompt_length=300)
    give(made, q, k, v)
    ((_, left, _, after),) = Watched.seen
    rows = np.arange(made.layout.starts[-1])
    others = mx.array(np.setdiff1d(rows, made.layout.starts[:-1]))
    for x, y in zip((*left.kept.rows, *left.kept[1:]), (*after.kept.rows, *after.kept[1:]), strict=True):
        assert mx.array_equal(x[:, others], y[:, others])
    assert not left.kept.weight[:, mx.array(made.layout.starts[:-1])].any(), "the state before has no such row"
    assert after._replace(kept=None)[4:] == left._replace(kept=None)[4:]


def test_decoding_leaves_the_row_as_it_is():
    q, k, v = tokens(3, 400)
    made = watched(40, prefill="exact", prompt_length=300)
    give(made, *(x[:, :, :300] for x in (q, k, v)))
    first = mx.array(made.layout.starts[:-1])

    def row(cache):
        return [x[:, first] for x in (*cache.layer.kept.rows, cache.layer.kept.weight)]

    before = row(made)
    assert all(x.any() for x in before)
    give(made, *(x[:, :, 300:] for x in (q, k, v)), 1)
    assert made.layer.departed > 300 - made.layout.recent
    assert all(mx.array_equal(x, y) for x, y in zip(before, row(made), strict=True))
    assert len(Watched.seen) == 1


@pytest.mark.parametrize(("turn", "fits"), [(FEWEST - 1, False), (FEWEST, True)])
@pytest.mark.parametrize("exact", [False, True])
def test_a_turn_of_few_queries_keeps_the_old_row(turn, fits, exact):
    q, k, v = tokens(3, 600)
    made = watched(40)
    give(made, *(x[:, :, :300] for x in (q, k, v)), [300])
    give(made, *(x[:, :, 300:320] for x in (q, k, v)), 1)
    old = made.layer.kept.weight[:, mx.array(made.layout.starts[:-1])]
    assert len(Watched.seen) == 1 and old.min().item() > 0
    if exact:
        made.begin_prompt(turn)
    give(made, *(x[:, :, 320 : 320 + turn + 1] for x in (q, k, v)), [turn, 1])
    assert len(Watched.seen) == 1 + fits
    assert mx.array_equal(made.layer.kept.weight[:, mx.array(made.layout.starts[:-1])], old) != fits


def test_a_short_prompt_that_exceeds_the_budget_has_an_empty_row():
    """And nothing attends to it."""
    q, k, v = tokens(3, 90)
    made = watched(40, prefill="exact", prompt_length=60)
    out = give(made, q, k, v, [60, *[1] * 30])
    assert not Watched.seen and not made.layer.kept.weight[:, mx.array(made.layout.starts[:-1])].any()
    assert mx.isfinite(out).all()


def test_numbers_that_are_none_in_one_head_do_not_reach_the_other():
    q, k, v = tokens(3, 300)
    broken = mx.concatenate([mx.full(q[:, :2].shape, mx.nan), q[:, 2:]], axis=1)
    states = []
    for queries in (q, broken):
        made = watched(40, prefill="exact", prompt_length=300)
        give(made, queries, k, v)
        states.append(made.layer)
    second = made.layout.starts[1]
    for x, y in zip(
        (*states[0].kept.rows, states[0].kept.weight), (*states[1].kept.rows, states[1].kept.weight), strict=True
    ):
        assert mx.array_equal(x[:, second:], y[:, second:])


def test_the_row_brings_attention_nearer_to_that_over_all_tokens():
    """What it is for: for queries to come, the output errs less with the row than without."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((4, 8)) * 1.5
    q, k, v = tokens(5, 700, sharp=1.0)
    drawn = topics[rng.integers(0, 4, 700)].astype(np.float32)
    q = q * 0.5 + mx.array(drawn)[None, None]  # what queries ask for repeats itself
    v = v + 2
    made = watched(48, prefill="exact", prompt_length=600)
    give(made, *(x[:, :, :600] for x in (q, k, v)))
    full = f64(mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal"))[0, :, 600:]
    call = Call(q[:, :, 600:], SCALE)
    errors = []
    for weight in (made.layer.kept.weight, made.layer.kept.weight * (made.layer.kept.position >= 0)):
        state = made.layer._replace(kept=made.layer.kept._replace(weight=weight))
        outs = [
            attention.attend(call.at(i, i + 1), state, made.layout, made.policy)[0][0, :, 0] for i in range(call.length)
        ]
        errors.append(np.abs(f64(mx.stack(outs, axis=1)) - full).mean())
    assert errors[0] < errors[1]


def test_a_head_whose_victims_no_query_sees_has_an_empty_row_and_no_singular_matrix():
    queries, y = mx.random.normal((1, 2, 20, 8)), mx.full((1, 2, 20), -mx.inf)
    y[:, 1] = 1.0
    key, bias, known = fitting._least_squares(queries, y)
    assert known.tolist() == [[False, True]]
    assert mx.isfinite(key).all() and mx.isfinite(bias).all() and abs(bias[0, 1].item() - 1) < 1e-3
