"""Attention over codes: the plain operations against float64, the decode kernel against the plain operations."""

import metal_host
import mlx.core as mx
import numpy as np
import pytest
import tiny
import twin
from coded import coded_state, numbers
from states import Given, random_queries
from tiny import f64

import zm_mlx
from zm_mlx.ops.choose import _verified
from zm_mlx.ops.kernels import _common
from zm_mlx.ops.kernels import attend as kernels
from zm_mlx.ops.plain import attention, half
from zm_mlx.policies import Policy
from zm_mlx.state.coding import Coding
from zm_mlx.state.layout import Layout
from zm_mlx.state.state import Call

GROUPED = Layout(3, (60, 60, 30), 40, 11)
# layout, departed, filled, closed
ROWS = {
    "nothing is closed": (GROUPED, 0, 9, 0),
    "kept rows partly filled": (GROUPED, 45, 50, 40),
    "merged, all but the newest closed": (GROUPED, 1000, 47, 40),
    "no residual rows, a head without kept rows": (Layout(0, (37, 0), 16, 8), 99, 24, 16),
    "few rows": (Layout(1, (1, 0), 2, 3), 9, 4, 2),
}
LARGE = (Layout(4, (800, 30), 40, 20), 3000, 49, 40)  # split
CODINGS = [Coding(8, 64), Coding(4, 32)]
KINDS = [(64, 128, 4, mx.float32), (96, 64, 1, mx.float16), (256, 64, 9, mx.bfloat16)]


def given(rows, coding, dim=64, value_dim=64, groups=2, dtype=mx.float32, length=1, batch=2) -> Given:
    layout, departed, filled, closed = rows
    if dim % coding.group or value_dim % coding.group:
        coding = Coding(coding.bits, 32)
    more = {"dim": dim, "value_dim": value_dim, "dtype": dtype, "batch": batch, "departed": departed}
    state, layout = coded_state(layout, coding, closed=closed, filled=filled, **more)
    return Given(call_of(layout, length, groups, dim, dtype, batch), state, layout, Policy(kappa=1.0))


def call_of(layout, length, groups, dim, dtype, batch):
    return Call(random_queries(layout, length, groups, dim, dtype, batch), 0.4 * dim**-0.5)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("operation", [attention.attend, half.attend])
def test_the_formula_in_float64(rows, coding, operation):
    case = given(ROWS[rows], coding, length=3 if ROWS[rows][2] - ROWS[rows][3] >= 3 else 1)
    call, state, layout, policy = case
    out, (on_kept, on_recent) = operation(*case)
    length, groups = call.length, call.queries.shape[1] // layout.heads
    for b in range(2):
        for h in range(layout.heads):
            begin, end = layout.starts[h : h + 2]
            old = min(end - begin, state.departed)
            merged = layout.residual if state.departed > end - begin else 0
            rows_of = []
            for name in ("keys", "values"):
                held, recent = state.kept.rows, state.recent
                residual = f64(getattr(held.residual, name)[b, h])[:merged]
                context = numbers(held.coded, name)[b, begin + merged : begin + old]
                newest = f64(getattr(recent.numbers, name)[b, h])[: state.filled - state.closed]
                rows_of.append(np.concatenate([residual, context, numbers(recent.coded, name)[b, h], newest]))
            weight = np.concatenate([f64(state.kept.weight)[b, begin : begin + old], np.ones(state.filled)])
            spread = np.zeros(len(weight))
            spread[:merged] = f64(state.residuals.spread)[b, h][:merged]
            visible = np.arange(len(weight)) <= (old + state.filled - length + np.arange(length))[:, None]
            mine = slice(h * groups, (h + 1) * groups)
            want, p = twin.attention(
                f64(call.queries)[b, mine], *rows_of, weight, spread, visible,
                scale=call.scale, alpha=policy.alpha, kappa=policy.kappa,
            )  # fmt: skip
            np.testing.assert_allclose(f64(out)[b, mine], want, atol=3e-5)
            mass = twin.mass(p, policy.decay)
            before = policy.decay**length * f64(state.scores.kept)[b, begin:end]
            before[:old] += mass[:old]
            np.testing.assert_allclose(f64(on_kept)[b, begin:end], before, atol=3e-5)
            before = policy.decay**length * f64(state.scores.recent)[b, h, : state.filled] + mass[old:]
            np.testing.assert_allclose(f64(on_recent)[b, h, : state.filled], before, atol=3e-5)


# ---- the kernel


@pytest.fixture
def executor():
    _common.kernel.cache_clear()
    _verified.cache_clear()
    with metal_host.installed():
        yield
    _common.kernel.cache_clear()
    _verified.cache_clear()


def compare(case: Given, seed: int = 1, traced: bool = True) -> None:
    want, scores = attention.attend(*case)
    with metal_host.options(seed=seed, trace=traced), metal_host.record() as launches:
        out, found = kernels.attend(*case)
        mx.eval(out, found)
    tolerance = {mx.float32: 2e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}[case.call.queries.dtype]
    np.testing.assert_allclose(f64(out), f64(want), atol=tolerance, rtol=tolerance)
    for x, y in zip(found, scores, strict=True):
        np.testing.assert_allclose(f64(x), f64(y), atol=2e-5, rtol=1e-4)
    assert not any(x.copied for x in launches)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_kernel_equals_its_twin_in_all_phases_of_rows(executor, rows, coding):
    compare(given(ROWS[rows], coding))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("dim", "value_dim", "groups", "dtype"), KINDS)
def test_the_kernel_equals_its_twin_in_all_shapes(executor, bits, dim, value_dim, groups, dtype):
    coding = Coding(bits, 64)
    compare(given(ROWS["merged, all but the newest closed"], coding, dim, value_dim, groups, dtype), seed=2)


def test_split_rows(executor):
    compare(given(LARGE, CODINGS[1], groups=3), traced=False)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 4, 128), (8, 2, 64)])
def test_each_code_is_read_once(executor, coding, heads, groups, dim):
    """Bytes within a tenth of the fewest: codes, their scales and biases, what is no code, scores, output."""
    layout = Policy(kv_bits=coding.bits).layout(512, heads)
    rows = (layout, 10**4, layout.recent, layout.proximity)
    case = given(rows, coding, dim, dim, groups, mx.float16, batch=1)
    with metal_host.options(trace=True), metal_host.record() as launches:
        mx.eval(kernels.attend(*case))
    counted = sum(x.device_bytes_read + x.device_bytes_written for x in launches)
    old = layout.starts[-1]
    every = old + heads * layout.recent
    exact = heads * (layout.residual + layout.staging)
    least = (every - exact) * 2 * coding.nbytes(dim, 2) + exact * 4 * dim + 4 * old + 8 * every
    least += 4 * heads * groups * dim
    scratch = 8 * groups * every if len(launches) > 1 else 0
    assert counted <= 1.10 * least + scratch


def test_one_token_after_another_goes_through_the_kernel_and_the_rest_through_plain_operations(executor):
    model = tiny.model(head_dim=64, heads=4, kv_heads=2, layers=1)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7] * 2
    found = {}
    for kind in ("metal", "ops"):
        caches = zm_mlx.make_prompt_cache(model, 40, kv_bits=8, kernels=kind, policy=Policy())
        with metal_host.record() as launches:
            logits = tiny.feed(model, caches, mx.array([tokens[:50]]), 50)
            steps = [model(mx.array([[t]]), cache=caches) for t in tokens[50:]]
            mx.eval(steps, [c.state for c in caches])
        found[kind] = f64(mx.concatenate([logits, *steps], axis=1))
        names = {x.name for x in launches}
        assert names == ({"zm_attend_coded"} if kind == "metal" else set())
    np.testing.assert_allclose(found["metal"], found["ops"], atol=2e-3, rtol=1e-3)
