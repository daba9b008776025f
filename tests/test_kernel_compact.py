"""The Metal kernels of compaction, executed from their source, against the plain ops."""

import metal_host
import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from states import FLOATS, arrived
from tiny import TOLERANCE, f64, give

from zm_mlx.ops.kernels import _common
from zm_mlx.ops.kernels.compact import MAX_REACH, compact, serves
from zm_mlx.ops.plain import compaction
from zm_mlx.policies import Policy, selection
from zm_mlx.state.layout import Layout
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Scores, State

DIMS = [(64, 128), (80, 64), (96, 96), (128, 80), (256, 256)]
TABLES = [(9, 9), (30, 5, 0), (40, 0, 0), (0, 0), (17, 16, 15, 1)]  # context rows of the heads
# Each dtype with each pair of dims.
COVERING = [(FLOATS[i % 3], *DIMS[i % 5], (4, 1, 0, 3, 17)[i // 3], TABLES[(i + i // 5) % 5]) for i in range(15)]
RING = 5120  # scores that stay in threadgroup memory


def name(case):
    return "-".join(str(x).rpartition(".")[2] for x in case[:4]) + "-" + "_".join(map(str, case[4]))


@pytest.fixture(autouse=True, scope="module")
def executor():
    with metal_host.installed():
        _common.kernel.cache_clear()
        yield
        _common.kernel.cache_clear()


def empty(layout, dim, value_dim, dtype, batch=3):
    return State.empty(layout, Dense.zeros((batch, layout.heads, 1), dim, value_dim, dtype), layout.recent)


def arriving(state, layout, rng, *, leaving, levels=0):
    """The state with new recent rows, of which ``leaving`` leave; what stays is not a number.

    ``levels`` > 0: scores with many ties.
    """
    shape, rows = (state.kept.weight.shape[0], layout.heads, leaving + layout.proximity), state.kept.rows
    keys, values = (rng.standard_normal((*shape, d)).astype(np.float32) for d in (rows.head_dim, rows.value_dim))
    score = (rng.integers(0, levels, shape) / 8 if levels else rng.random(shape)).astype(np.float32)
    for x in (keys, values, score):
        x[:, :, leaving:] = np.nan
    state = arrived(state, keys, values, score)
    if not layout.reading:
        return state
    reading = mx.array(rng.random(shape).astype(np.float32))
    return state._replace(reading=state.reading._replace(recent=reading))


def run(state, layout, policy, *, seed=0, trace=False, importance=None):
    with metal_host.options(seed=seed, trace=trace), metal_host.record() as launches:
        new = compact(state, layout, policy, importance or state.scores)
    assert all(launch.copied == [] for launch in launches), "a launch copies what it reads"
    if trace:
        assert not any(b.unwritten for launch in launches for b in launch.buffers.values() if b.written)
    return new, {launch.name: launch for launch in launches}


def fields(state):
    kept = {"keys": state.kept.rows.keys, "values": state.kept.rows.values, "weight": state.kept.weight}
    kept |= {"position": state.kept.position, "score": state.scores.kept, **state.residuals._asdict()}
    return kept | {
        "recent keys": state.recent.keys,
        "recent values": state.recent.values,
        "recent": state.scores.recent,
        "kept reading": state.reading.kept,
        "recent reading": state.reading.recent,
    }


def assert_same(new, expected, layout, dtype):
    """Bits of raw rows, scores, weights and positions; merged rows within rounding."""
    assert (new.departed, new.filled, new.since_compaction) == tuple(expected[-3:])
    residual = np.zeros(layout.starts[-1], bool)
    for begin in layout.starts[:-1]:
        residual[begin : begin + layout.residual] = True
    for (field, x), y in zip(fields(new).items(), fields(expected).values(), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, field
        x, y = f64(x), f64(y)
        if field in ("weight", "score", "position", "kept reading") or field.startswith("recent"):
            np.testing.assert_array_equal(x, y, err_msg=field)
        elif field in ("keys", "values"):
            np.testing.assert_array_equal(x[:, ~residual], y[:, ~residual], err_msg=field)
            np.testing.assert_allclose(x, y, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], err_msg=field)
        else:
            scale = max(1, np.abs(y).max(initial=0)) if field.endswith("sum") else 1
            np.testing.assert_allclose(x, y, atol=2e-5 * scale, rtol=1e-4, err_msg=field)


def undecided(state, layout, leaving):
    """Whether two residual rows are so nearly the nearest of a row that the order of a sum decides."""
    kept = f64(state.kept.rows.keys)
    for h, (begin, end) in enumerate(zip(layout.starts, layout.starts[1:], strict=False)):
        context = begin + layout.residual
        if layout.residual > 1 and state.departed > end - begin:
            rows = np.concatenate([kept[:, context:end], f64(state.recent.keys[:, h, :leaving])], axis=1)
            dots = np.sort(rows @ kept[:, begin:context].swapaxes(-1, -2), axis=-1)
            if (dots[..., -1] - dots[..., -2]).min() < 1e-5:
                return True
    return False


def life(case, *, pool=5, leaving=7, steps=7, trace=False, levels=0, batch=3, score="attention"):
    """The life of a state, from empty to merging, each step from the same state and in another schedule."""
    dtype, dim, value_dim, residual, table = case
    policy = Policy(pool=pool, score=score)
    layout = Layout(residual, tuple(sorted(table, reverse=True)), 2, 3, policy.reads)
    rng = np.random.default_rng(dim + residual)
    state = empty(layout, dim, value_dim, dtype, batch)
    for step in range(steps):
        before, state = state, arriving(state, layout, rng, leaving=leaving, levels=levels)
        while undecided(state, layout, leaving):
            state = arriving(before, layout, rng, leaving=leaving, levels=levels)
        worth = policy.importance(state, layout)
        expected = compaction.compact(state, layout, policy, worth)
        new, _ = run(state, layout, policy, seed=step, trace=trace, importance=worth)
        assert_same(new, expected, layout, dtype)
        state = expected


@pytest.mark.parametrize("case", COVERING, ids=name)
def test_every_phase_of_every_head_equals_the_plain_ops(case):
    life(case)


@pytest.mark.parametrize("case", COVERING[::2], ids=name)
def test_what_a_second_reading_showed_selects_and_moves_with_its_row(case):
    life(case, score="reread")


@pytest.mark.parametrize("case", [COVERING[i] for i in (1, 5, 8, 11)], ids=name)
def test_no_races(case):
    life(case, trace=True, pool=13)


@pytest.mark.parametrize("pool", [1, 3, 13, 101])
@pytest.mark.parametrize("leaving", [1, 5, 32, 60])
def test_ties_go_to_the_older_row(pool, leaving):
    life((mx.float32, 64, 64, 2, (33, 20, 0)), pool=pool, leaving=leaving, steps=5, levels=3, batch=2)


@pytest.mark.parametrize("departed", [4, 60])
def test_weights_are_kept_until_rows_are_selected(departed):
    layout = Layout(4, (20, 20), 2, 3)
    state = empty(layout, 64, 64, mx.float32, batch=2)._replace(departed=departed)
    state = arriving(state, layout, np.random.default_rng(0), leaving=3)
    weight = mx.arange(1, 97, dtype=mx.float32).reshape(2, 48) * 1e4
    state = state._replace(kept=state.kept._replace(weight=weight))
    new, _ = run(state, layout, Policy())
    assert_same(new, compaction.compact(state, layout, Policy(), state.scores), layout, mx.float32)


def test_importance_selects_and_scores_stay_with_their_rows():
    layout, rng = Layout(2, (20, 9), 2, 3), np.random.default_rng(0)
    state = empty(layout, 64, 64, mx.float32)
    for _ in range(5):
        state = arriving(state, layout, rng, leaving=9)
        worth = Scores(*(mx.array(rng.random(x.shape).astype(np.float32)) for x in state.scores))
        expected = compaction.compact(state, layout, Policy(), worth)
        new, _ = run(state, layout, Policy(), importance=worth)
        assert_same(new, expected, layout, mx.float32)
        state = expected


def test_one_compaction_of_a_whole_prompt():
    """``exact``: nothing kept yet, and 200 rows leave at once."""
    life((mx.float16, 64, 64, 4, (100, 30, 0)), leaving=200, steps=2, pool=13)


def chosen(score, count, pool, *, kept_rows=False, **options):
    """Positions that the kernel chooses of one head's scores, the first ``count`` of them context rows."""
    layout = Layout(0, (count,), 1, 1)
    state = empty(layout, 64, 64, mx.float16, batch=1)
    old = count if kept_rows else 0
    rows = mx.zeros((1, 1, len(score) - old + 1, 64), mx.float16)  # one of them stays
    scores = Scores(mx.zeros((1, count)), mx.array(np.append(score[old:], np.float32(np.nan))[None, None]))
    if old:
        position = mx.arange(old, dtype=mx.int32)[None]
        state = state._replace(kept=state.kept._replace(position=position))
        scores = scores._replace(kept=mx.array(score[None, :old]))
    state = state._replace(
        recent=Dense(rows, rows), scores=scores, departed=old, filled=rows.shape[2], since_compaction=0
    )
    new, launches = run(state, layout, Policy(residual=0, pool=pool), **options)
    assert "zm_compact" in launches
    return np.array(new.kept.position[0])


def assert_chosen(score, count, pool, **how):
    expected, _ = selection.select(mx.array(score), count, pool)
    np.testing.assert_array_equal(chosen(score, count, pool, **how), np.array(expected))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_the_chosen_rows_are_exactly_those_of_the_plain_ops(data):
    n = data.draw(st.integers(2, 80))
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e38, np.inf, -np.inf, 0.1, 0.1000000015])
    score = np.array(data.draw(st.lists(values, min_size=n, max_size=n)), np.float32)
    count, pool = data.draw(st.integers(1, n - 1)), data.draw(st.sampled_from([1, 3, 7, 13, 199]))
    assert_chosen(score, count, pool, kept_rows=data.draw(st.booleans()))


def test_scores_that_differ_in_the_last_bit_do_not_tie():
    for base in (0x3F800000, 0x00000000, 0x3FBFFC00, 0x7F7FF000):  # around 1, denormal, at edges of digits
        bits = base + np.random.default_rng(base).permutation(3000).astype(np.uint32) % 2100
        assert_chosen(bits.astype(np.uint32).view(np.float32), 1000, 1)


def test_equal_scores_of_many_rows():
    score = np.zeros(3000, np.float32)
    score[::2] = -0.0
    for count in (1, 1023, 1024, 1025, 2999):
        for pool in (1, 13):
            assert chosen(score, count, pool).tolist() == list(range(count))


@pytest.mark.parametrize("n", [RING - 6, RING - 1, RING, RING + 1, 2 * RING - 12, 2 * RING - 11])
@pytest.mark.parametrize("pool", [1, 13])
def test_pools_around_the_size_of_threadgroup_memory(n, pool):
    score = np.random.default_rng(n).integers(0, 1000, n).astype(np.float32)
    assert_chosen(score, n // 3, pool)


@pytest.mark.parametrize("n", [RING - 100, RING + 2000])
def test_the_widest_pool_that_the_kernel_serves(n):
    score = np.random.default_rng(n).random(n).astype(np.float32)
    assert_chosen(score, 300, 2 * MAX_REACH + 1)


def test_a_hundred_thousand_rows():
    score = np.random.default_rng(0).random(100_000).astype(np.float32) ** 8
    assert_chosen(score, 10_000, 13)


def test_the_kernels_say_which_compactions_they_serve():
    for residual, pool, leaving, served in ((2, 9001, 5000, False), (65, 13, 5000, False), (2, 9001, 900, True)):
        layout = Layout(residual, (9,), 2, 3)
        state = arriving(empty(layout, 64, 64, mx.float32), layout, np.random.default_rng(0), leaving=leaving)
        assert serves(state, layout, Policy(pool=pool)) is served


def test_without_kept_rows_nothing_is_launched():
    layout = Layout(0, (0, 0), 2, 3)
    state = empty(layout, 64, 64, mx.float32, batch=1)
    state = arriving(state, layout, np.random.default_rng(0), leaving=3)
    new, launches = run(state, layout, Policy(residual=0))
    assert new.kept is state.kept and (new.departed, new.filled) == (3, 2) and not launches


def traffic(launches):
    return sum(launch.device_bytes_read + launch.device_bytes_written for launch in launches.values())


@pytest.mark.parametrize("heads", [2, 8])  # few heads make small inputs, which lie in another address space
@pytest.mark.parametrize("dim", [64, 128])
def test_survivors_move_once_while_decoding(heads, dim):
    layout = Policy().layout(256, heads)
    rng, leaving = np.random.default_rng(0), layout.staging
    state = arriving(empty(layout, dim, dim, mx.float16, batch=1), layout, rng, leaving=300)
    state = compaction.compact(state, layout, Policy(), state.scores)
    state = arriving(state, layout, rng, leaving=leaving)
    _, launches = run(state, layout, Policy(), trace=True)
    context, row = layout.context[0], 4 * dim  # bytes of a key and a value
    score, victim = 4 * heads * (context + leaving), heads * leaving
    moved = 2 * heads * (context + 4) * (row + 12)  # keys, values, weight, score and position, in and out
    merge = launches.pop("zm_merge")
    assert traffic(launches) <= 1.2 * (moved + score)
    assert sum(launches["zm_compact_select"].buffers[f"{x}_importance"].read for x in ("kept", "recent")) == score
    read = sum(merge.buffers[x].read for x in ("kept_keys", "kept_values", "recent_keys", "recent_values"))
    assert read <= 1.1 * victim * row + 4 * heads * row
    sums = 2 * heads * 4 * (2 * dim + 3) * 4 + heads * 4 * row * 1.5
    assert traffic({"merge": merge}) <= 1.2 * (victim * (row + 4) + sums)


def test_a_prompt_is_scored_from_at_most_five_reads():
    layout, n = Policy().layout(256, 1), RING + 1000
    state = arriving(empty(layout, 64, 64, mx.float16, batch=1), layout, np.random.default_rng(0), leaving=n)
    _, launches = run(state, layout, Policy(), trace=True)
    buffers = {x: "recent_importance" if x == "zm_compact_select" else "recent_score" for x in launches}
    reads = {x: launches[x].buffers[buffers[x]].read / (4 * n) for x in launches}
    assert reads["zm_compact_select"] == 4 and sum(reads.values()) <= 5
    merge = launches["zm_merge"]
    assert sum(merge.buffers[f"recent_{x}"].read for x in ("keys", "values")) == 256 * (n - layout.context[0])


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
def test_a_cache_that_compacts_by_kernels_answers_the_same(prefill, monkeypatch):
    """Also shows that the arrays of a cache reach the kernels without a copy."""
    rng = np.random.default_rng(3)
    tokens = [mx.array(rng.standard_normal((2, 4 if i == 0 else 2, 100, 64)).astype(np.float32)) for i in range(3)]

    def answer():
        cache = tiny.cache((40, 70), prefill=prefill, prompt_length=90 if prefill == "exact" else None, kernels="ops")
        sizes = [40, 50, *[1] * 10]
        return give(cache, *tokens, sizes), cache.layer.kept.position

    expected = answer()
    monkeypatch.setattr(compaction, "compact", lambda *given: run(*given[:3])[0])
    got = answer()
    assert mx.array_equal(got[1], expected[1])
    np.testing.assert_allclose(f64(got[0]), f64(expected[0]), atol=2e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("table", TABLES, ids=str)
@pytest.mark.parametrize("residual", [0, 1, 4, 64])
@pytest.mark.parametrize("dims", [*DIMS, (128, 128), (64, 64), (96, 256)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float16", "bfloat16"])
def test_every_shape(dtype, dims, residual, table):
    for leaving, pool in ((7, 5), (40, 13)):
        life((dtype, *dims, residual, table), leaving=leaving, pool=pool)
    life((dtype, *dims, residual, table), trace=True)
