"""``score`` (Metal source on the executor, or a Mac's GPU) against ``compress.score``."""

import mlx.core as mx
import numpy as np
import prefill_kernels as pk
import pytest
from prefill_kernels import Case, check_score, problem
from tiny import f64

from zm_mlx.kernels import _flash
from zm_mlx.layout import Layout
from zm_mlx.policy import Policy

PLAIN = Case(mx.float32, (64, 64), 3, "ragged")


@pytest.mark.parametrize("case", pk.covering(seed=1), ids=str)
def test_equals_the_plain_ops(case):
    check_score(*problem(case), tokens=40)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", pk.EVERY, ids=str)
def test_equals_the_plain_ops_everywhere(case):
    check_score(*problem(case, batch=2, sinks=case.group % 2 == 1), tokens=40, seeds=(0, 1, 2, 3))
    if case.group < 16:
        check_score(*problem(case), tokens=40, seeds=(1,), trace=True)


@pytest.mark.parametrize("dtype", pk.DTYPES, ids=str)
@pytest.mark.parametrize("shape", pk.SHAPES)
def test_has_no_races(dtype, shape):
    dims = {mx.float32: (96, 96), mx.float16: (64, 64), mx.bfloat16: (256, 256)}[dtype]
    check_score(*problem(Case(dtype, dims, 3, shape), sinks=True), tokens=9, seeds=(5,), trace=True)


def whole_prompt(case, rows, window, policy=None, sinks=False, spare=0):
    """An exact prefill: the prompt lies in the recent store, of which ``spare`` rows are free."""
    layout = Layout(4, (9, 3), rows + spare - 2, 2)
    return problem(case, shape=(layout, 0, rows, window), policy=policy, sinks=sinks)


@pytest.mark.parametrize("decay", [0.5, 0.98, 1])
def test_the_end_of_a_prompt(decay):
    case = Case(mx.float16, (128, 128), 2, "prompt")
    check_score(*whole_prompt(case, 300, 50, policy=Policy(decay=decay), spare=13), tokens=300)


def test_a_window_that_is_the_whole_prompt():
    check_score(*whole_prompt(Case(mx.float32, (64, 64), 1, "prompt"), 70, 70, sinks=True), tokens=70)


def test_a_window_of_512_queries():
    """The oldest of them fade to 3e-5."""
    check_score(*whole_prompt(Case(mx.float16, (64, 64), 1, "prompt"), 530, 512), tokens=530, seeds=(1,))


def test_sequences_of_a_batch_do_not_mix():
    check_score(*problem(Case(mx.bfloat16, (64, 64), 2, "partly filled"), batch=3, sinks=True), tokens=8)


@pytest.mark.parametrize("tokens", [1, 1000, 100_000])
def test_old_scores_fade_by_the_length_of_the_prompt(tokens):
    check_score(*problem(PLAIN), tokens=tokens, seeds=(1,))


@pytest.mark.parametrize("policy", [Policy(kappa=0), Policy(kappa=100), Policy(alpha=0.6)], ids=str)
def test_every_setting_means_what_it_means_in_the_plain_ops(policy):
    check_score(*problem(PLAIN, policy=policy), tokens=11, seeds=(1,))


def test_weights_of_a_million_tokens():
    (queries, kept, recent), how = problem(PLAIN)
    weight = mx.array(np.where(f64(kept.weight) > 1, 1e6, 1)).astype(mx.float32)
    check_score((queries, kept._replace(weight=weight), recent), how, tokens=11, seeds=(1,))


def test_log_sum_exp_of_rows_that_are_split(monkeypatch):
    monkeypatch.setattr(_flash, "ROWS_OF_A_SPLIT", 8)
    check_score(*problem(PLAIN, sinks=True), tokens=11)


def test_queries_that_are_not_contiguous():
    (queries, kept, recent), how = problem(PLAIN, batch=2)
    turned = mx.contiguous(queries.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    check_score((turned, kept, recent), how, tokens=11, seeds=(1,))


def test_a_row_that_nobody_sees_gets_nothing():
    """Mass sums to the decayed number of queries, over the rows of each head and nowhere else."""
    policy = Policy(decay=0.9)
    (queries, kept, recent), how = problem(Case(mx.float32, (64, 64), 2, "partly filled"), policy=policy)
    kept, recent = (x._replace(score=mx.zeros_like(x.score)) for x in (kept, recent))
    with pk.executor():
        on_kept, on_recent = pk.score(queries, kept, recent, tokens=8, **how)
    expected = 2 * sum(0.9**i for i in range(queries.shape[2]))
    starts = how["layout"].starts
    for h in range(3):
        total = f64(on_kept)[0, starts[h] : starts[h + 1]].sum() + f64(on_recent)[0, h].sum()
        assert total == pytest.approx(expected, rel=1e-5)
    assert not f64(on_kept)[0, starts[0] + how["left"] : starts[1]].any()
    assert not f64(on_recent)[:, :, how["live"] :].any()


@pytest.mark.parametrize("dtype", pk.DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_traffic(dtype, dims):
    """Keys are read once in all, so everything stays below 1.5 reads of the keys for each tile of 32 queries."""
    layout = Layout(4, (60, 40), 150, 40)
    arrays, how = problem(Case(dtype, dims, 2, "traffic"), shape=(layout, 900, 190, 64))
    normaliser, sums = check_score(arrays, how, tokens=64, seeds=(0,), trace=True)
    rows = 64 + 44 + 2 * 190
    keys = rows * dims[0] * dtype.size
    assert sums.threadgroup_memory <= 32 * 1024
    assert sums.buffers["kept_keys"].read + sums.buffers["recent_keys"].read == keys
    tiles = 2 * 64 // 32
    assert sums.device_bytes_read <= 1.5 * tiles * keys
    assert sums.device_bytes_written == 4 * (arrays[1].score.size + 2 * 190)
    # Values are not read for the log-sum-exp, and keys once for each tile of queries.
    assert normaliser.buffers["kept_values"].read + normaliser.buffers["recent_values"].read == 0
    assert normaliser.buffers["kept_keys"].read + normaliser.buffers["recent_keys"].read <= tiles * keys
