"""``attend_chunk`` (Metal source on the executor, or a Mac's GPU) against ``attention.attend``."""

import mlx.core as mx
import numpy as np
import prefill_kernels as pk
import pytest
from prefill_kernels import Case, check_attend, executor, problem
from states import f32
from tiny import f64

from zm_mlx.ops.kernels import _flash
from zm_mlx.ops.kernels.attend_chunk import attend_chunk
from zm_mlx.policies import Policy
from zm_mlx.state.layout import Layout

PLAIN = Case(mx.float32, (64, 64), 3, "ragged")


@pytest.mark.parametrize("case", pk.covering(), ids=str)
def test_equals_the_plain_ops(case):
    check_attend(problem(case))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", pk.EVERY, ids=str)
def test_equals_the_plain_ops_everywhere(case):
    check_attend(problem(case, batch=2, sinks=case.group % 2 == 1), seeds=(0, 1, 2, 3))
    if case.group < 16:
        check_attend(problem(case), seeds=(1,), trace=True)


@pytest.mark.parametrize("dtype", pk.DTYPES, ids=str)
@pytest.mark.parametrize("shape", pk.SHAPES)
def test_has_no_races(dtype, shape):
    dims = {mx.float32: (64, 80), mx.float16: (80, 64), mx.bfloat16: (128, 128)}[dtype]
    check_attend(problem(Case(dtype, dims, 2, shape), sinks=True), seeds=(5,), trace=True)


@pytest.mark.parametrize("dtype", pk.DTYPES, ids=str)
def test_sequences_of_a_batch_do_not_mix(dtype):
    check_attend(problem(Case(dtype, (64, 96), 2, "partly filled"), batch=3, sinks=True))


@pytest.mark.parametrize("large", [False, True])
def test_sinks_take_probability_and_nothing_else(large):
    given = problem(PLAIN, sinks=True)
    if large:  # larger than all logits, by more than float32's exp can take, and smaller
        given = given.with_call(sinks=mx.array([200.0, -200.0, 3.0] * 3))
    check_attend(given, seeds=(1,))


@pytest.mark.parametrize(
    "policy",
    [Policy(kappa=0), Policy(kappa=0.2), Policy(kappa=100), Policy(alpha=0), Policy(alpha=0.6), Policy(decay=1)],
    ids=lambda p: f"alpha {p.alpha} kappa {p.kappa} decay {p.decay}",
)
def test_every_setting_means_what_it_means_in_the_plain_ops(policy):
    check_attend(problem(PLAIN, policy=policy), seeds=(1,))


def test_weights_of_a_million_tokens():
    given = problem(PLAIN)
    weight = f64(given.state.kept.weight)
    weight = f32(np.where(weight > 1, 10.0 ** np.arange(weight.shape[1]).clip(0, 6), 1))
    check_attend(given.with_kept(weight=weight), seeds=(1,))


def test_a_head_whose_kept_rows_are_all_empty():
    given = problem(PLAIN)
    check_attend(given.with_kept(weight=mx.zeros_like(given.state.kept.weight)), seeds=(1,))


def test_logits_that_overflow_half_precision():
    """Integers, so that all sums are exact in float32: logits of up to 10⁵, nearly one-hot probabilities."""
    given = problem(Case(mx.float16, (64, 64), 2, "ragged"), empty=())
    rng, state = np.random.default_rng(0), given.state
    keys = [mx.array(rng.integers(-40, 41, x.keys.shape)).astype(mx.float16) for x in (state.kept.rows, state.recent)]
    queries = mx.array(rng.integers(-40, 41, given.call.queries.shape)).astype(mx.float16)
    keys[0][0, 7] = 40 * mx.sign(queries[0, 0, 0])
    state = state._replace(
        recent=state.recent._replace(keys=keys[1]),
        residuals=state.residuals._replace(spread=mx.zeros_like(state.residuals.spread)),
    )
    given = given._replace(state=state).with_kept(keys=keys[0]).with_call(queries=queries, scale=1.0)
    assert f64(queries)[0, 0, 0] @ f64(keys[0])[0, 7] > np.finfo(np.float16).max / 1.5
    check_attend(given, seeds=(1,))


def test_equal_rows_get_equal_scores():
    given = problem(PLAIN, empty=())
    begin, end = given.layout.starts[:2]
    keys, score = given.state.kept.rows.keys, given.state.scores.kept
    keys[:, begin + 4 : end] = keys[:, begin + 4 : begin + 5]
    score[:, begin + 4 : end] = 1.0
    with executor():
        _, scores = attend_chunk(*given)
    ties = np.array(scores.kept)[0, begin + 4 : end]
    assert (ties == ties[0]).all()


def test_queries_that_are_not_contiguous():
    given = problem(PLAIN, batch=2)
    queries = given.call.queries
    turned = mx.contiguous(queries.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    check_attend(given.with_call(queries=turned), seeds=(1,))
    wide = mx.contiguous(mx.concatenate([queries, queries + 1], axis=2))[:, :, : queries.shape[2]]
    check_attend(given.with_call(queries=wide), seeds=(1,))


@pytest.mark.parametrize("dtype", pk.DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["ragged", "nothing kept", "no kept rows", "one row"])
def test_rows_split_over_threadgroups_change_nothing(monkeypatch, dtype, shape):
    """More parts than some queries see tiles: parts without any row must count for nothing."""
    monkeypatch.setattr(_flash, "ROWS_OF_A_SPLIT", 2 if shape == "one row" else 8)
    given = problem(Case(dtype, (64, 80), 2, shape), sinks=True)
    launches = check_attend(given)
    assert launches[0].buffers["log_sum_exp"].size > 4 * given.call.queries.size // 64, "the rows are not split"


def test_few_queries_over_many_rows_are_split_and_many_queries_are_not():
    assert _flash.splits_of(threadgroups=1, rows=32768) == 128
    assert _flash.splits_of(threadgroups=32, rows=2048) == 4
    assert _flash.splits_of(threadgroups=256, rows=32768) == 1
    assert _flash.splits_of(threadgroups=1, rows=100) == 1


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("group", [1, 3])
def test_chunks_of_any_length(length, group):
    """Query tiles that end inside a head, a simdgroup or a tile, and begin in the middle of a head."""
    layout = Layout(2, (11, 3), 60, 10)
    check_attend(problem(Case(mx.float16, (64, 64), group, "any"), shape=(layout, 70, 66, length)), seeds=(1,))


def test_more_rows_than_the_small_cases():
    layout = Layout(4, (900, 300), 500, 60)
    check_attend(problem(Case(mx.float16, (64, 64), 1, "long"), shape=(layout, 5000, 541, 70)), seeds=(1,))


@pytest.mark.parametrize("dtype", pk.DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_reads_each_filled_row_once_for_a_tile_of_queries(dtype, dims):
    """Keys and values: one read of what a tile of 32 queries can see; everything else together < 10 %."""
    layout = Layout(4, (80, 40), 70, 10)
    given = problem(Case(dtype, dims, 2, "traffic"), shape=(layout, 900, 75, 33))
    attention, _ = check_attend(given, seeds=(0,), trace=True)
    assert attention.threadgroup_memory <= 32 * 1024
    tiles = 3  # of the 66 queries: queries 0-31; 32 and 0-30 of the next head; 31 and 32
    visible = 74 + 75 + 75
    kept_rows, recent_rows = tiles * (84 + 44), 2 * visible
    read = {name: buffer.read for name, buffer in attention.buffers.items()}
    for name, width in (("keys", dims[0]), ("values", dims[1])):
        assert read[f"kept_{name}"] == kept_rows * width * dtype.size
        assert read[f"recent_{name}"] == recent_rows * width * dtype.size
    rows = (kept_rows + recent_rows) * sum(dims) * dtype.size
    own = 2 * given.call.queries.nbytes  # once for the fragments, once for their norms
    assert read["queries"] <= own
    assert attention.device_bytes_read <= 1.1 * rows + own
