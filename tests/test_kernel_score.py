"""``score`` (Metal source on the executor, or a Mac's GPU) against ``attention.score``."""

import mlx.core as mx
import numpy as np
import prefill_kernels as pk
import pytest
from prefill_kernels import Case, check_score, problem
from tiny import f64

from zm_mlx.ops.kernels import _flash
from zm_mlx.policies import Policy
from zm_mlx.state.layout import Layout
from zm_mlx.state.state import Scores

PLAIN = Case(mx.float32, (64, 64), 3, "ragged")


@pytest.mark.parametrize("case", pk.covering(seed=1), ids=str)
def test_equals_the_plain_ops(case):
    check_score(problem(case))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", pk.EVERY, ids=str)
def test_equals_the_plain_ops_everywhere(case):
    check_score(problem(case, batch=2, sinks=case.group % 2 == 1), seeds=(0, 1, 2, 3))
    if case.group < 16:
        check_score(problem(case), seeds=(1,), trace=True)


@pytest.mark.parametrize("dtype", pk.DTYPES, ids=str)
@pytest.mark.parametrize("shape", pk.SHAPES)
def test_has_no_races(dtype, shape):
    dims = {mx.float32: (96, 96), mx.float16: (64, 64), mx.bfloat16: (256, 256)}[dtype]
    check_score(problem(Case(dtype, dims, 3, shape), sinks=True), seeds=(5,), trace=True)


def whole_prompt(case, rows, window, policy=None, sinks=False, spare=0):
    """An exact prefill: the prompt lies in the recent store, of which ``spare`` rows are free."""
    layout = Layout(4, (9, 3), rows + spare - 2, 2)
    return problem(case, shape=(layout, 0, rows, window), policy=policy, sinks=sinks)


@pytest.mark.parametrize("decay", [0.5, 0.98, 1])
def test_the_end_of_a_prompt(decay):
    case = Case(mx.float16, (128, 128), 2, "prompt")
    check_score(whole_prompt(case, 300, 50, policy=Policy(decay=decay), spare=13))


def test_a_window_that_is_the_whole_prompt():
    check_score(whole_prompt(Case(mx.float32, (64, 64), 1, "prompt"), 70, 70, sinks=True))


def test_a_window_of_512_queries():
    """The oldest of them fade to 3e-5."""
    check_score(whole_prompt(Case(mx.float16, (64, 64), 1, "prompt"), 530, 512), seeds=(1,))


def test_sequences_of_a_batch_do_not_mix():
    check_score(problem(Case(mx.bfloat16, (64, 64), 2, "partly filled"), batch=3, sinks=True))


@pytest.mark.parametrize("length", [1, 9, 60])
def test_old_scores_fade_by_the_number_of_queries(length):
    given = problem(PLAIN, shape=(Layout(4, (61, 9, 0), 70, 9), 400, 77, length), policy=Policy(decay=0.9))
    state = given.state
    with pk.executor():
        scores = pk.score(*given)
        fresh = pk.score(*given._replace(state=state._replace(scores=Scores.zeros_like(state.scores))))
    for new, without, old in zip(scores, fresh, state.scores, strict=True):
        filled = slice(None) if old.ndim == 2 else (slice(None), slice(None), slice(77))
        np.testing.assert_allclose(f64(new - without)[filled], 0.9**length * f64(old)[filled], atol=1e-5)


@pytest.mark.parametrize("policy", [Policy(kappa=0), Policy(kappa=100), Policy(alpha=0.6)], ids=str)
def test_every_setting_means_what_it_means_in_the_plain_ops(policy):
    check_score(problem(PLAIN, policy=policy), seeds=(1,))


def test_weights_of_a_million_tokens():
    given = problem(PLAIN)
    weight = mx.array(np.where(f64(given.state.kept.weight) > 1, 1e6, 1)).astype(mx.float32)
    check_score(given.with_kept(weight=weight), seeds=(1,))


def test_log_sum_exp_of_rows_that_are_split(monkeypatch):
    monkeypatch.setattr(_flash, "ROWS_OF_A_SPLIT", 8)
    check_score(problem(PLAIN, sinks=True))


def test_queries_that_are_not_contiguous():
    given = problem(PLAIN, batch=2)
    turned = mx.contiguous(given.call.queries.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    check_score(given.with_call(queries=turned), seeds=(1,))


def test_a_row_that_nobody_sees_gets_nothing():
    """Mass sums to the decayed number of queries, over the rows of each head and nowhere else."""
    policy = Policy(decay=0.9)
    given = problem(Case(mx.float32, (64, 64), 2, "partly filled"), policy=policy)
    state, starts = given.state, given.layout.starts
    with pk.executor():
        on_kept, on_recent = pk.score(*given._replace(state=state._replace(scores=Scores.zeros_like(state.scores))))
    expected = 2 * sum(0.9**i for i in range(given.call.length))
    for h in range(3):
        total = f64(on_kept)[0, starts[h] : starts[h + 1]].sum() + f64(on_recent)[0, h].sum()
        assert total == pytest.approx(expected, rel=1e-5)
    assert not f64(on_kept)[0, starts[0] + state.departed : starts[1]].any()
    assert not f64(on_recent)[:, :, state.filled :].any()


@pytest.mark.parametrize("dtype", pk.DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_traffic(dtype, dims):
    """Keys are read once in all, so everything stays below 1.5 reads of the keys for each tile of 32 queries."""
    layout = Layout(4, (60, 40), 150, 40)
    given = problem(Case(dtype, dims, 2, "traffic"), shape=(layout, 900, 190, 64))
    normaliser, sums = check_score(given, seeds=(0,), trace=True)
    rows = 64 + 44 + 2 * 190
    keys = rows * dims[0] * dtype.size
    assert sums.threadgroup_memory <= 32 * 1024
    assert sums.buffers["kept_keys"].read + sums.buffers["recent_keys"].read == keys
    tiles = 2 * 64 // 32
    assert sums.device_bytes_read <= 1.5 * tiles * keys
    assert sums.device_bytes_written == 4 * (given.state.scores.kept.size + 2 * 190)
    # Values are not read for the log-sum-exp, and keys once for each tile of queries.
    assert normaliser.buffers["kept_values"].read + normaliser.buffers["recent_values"].read == 0
    assert normaliser.buffers["kept_keys"].read + normaliser.buffers["recent_keys"].read <= tiles * keys
