"""What the tests of ``attend_chunk`` and ``score`` share: cases, random stores, comparison with the plain ops."""

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from random import Random

import metal_host
import mlx.core as mx
import numpy as np
from states import Given, random_queries, random_state
from tiny import TOLERANCE, f64

from zm_mlx.ops.kernels import _common
from zm_mlx.ops.kernels.attend_chunk import attend_chunk
from zm_mlx.ops.kernels.score import score
from zm_mlx.ops.plain import attention
from zm_mlx.policies import Policy
from zm_mlx.state.layout import Layout
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Call

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 128), (128, 80))
GROUPS = (1, 2, 3, 5, 7, 8, 16, 71)
RAGGED = Layout(4, (61, 9, 0), 20, 9)  # one head has (nearly) everything, one its floor
SHAPES = {  # layout, departed, filled, L
    "ragged": (RAGGED, 400, 27, 9),
    "partly filled": (RAGGED, 33, 29, 8),  # the largest head has room, the others have merged
    "nothing kept": (Layout(4, (9, 9), 40, 5), 0, 41, 13),
    "one row": (Layout(2, (3,), 1, 1), 0, 1, 1),
    "one row beside kept ones": (Layout(4, (29, 4), 3, 2), 90, 1, 1),
    "no residual rows": (Layout(0, (32, 7), 8, 8), 90, 16, 3),
    "no kept rows": (Layout(0, (0, 0), 8, 9), 90, 17, 7),
    "less than 8 of everything": (Layout(2, (1,), 2, 1), 50, 3, 3),  # other address spaces
    "nine heads": (Layout(1, (3,) * 9, 2, 2), 50, 4, 2),
}
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Case:
    dtype: mx.Dtype
    dims: tuple[int, int]
    group: int
    shape: str

    def __str__(self) -> str:
        return f"{str(self.dtype)[9:]} D {self.dims} G {self.group} {self.shape}"


EVERY = [Case(*x) for x in product(DTYPES, DIMS, GROUPS, SHAPES)]


def covering(cases=EVERY, seed=0):
    """Few cases in which any two values of two parameters meet."""

    def pairs(case):
        return set(combinations(enumerate((case.dtype, case.dims, case.group, case.shape)), 2))

    missing = set().union(*map(pairs, cases))
    chance, chosen = Random(seed), []
    while missing:
        best = max(chance.sample(cases, min(200, len(cases))), key=lambda c: len(pairs(c) & missing))
        if pairs(best) & missing:
            chosen.append(best)
            missing -= pairs(best)
    return chosen


@contextmanager
def executor(seed=0, trace=False):
    """The kernels run on the CPU; the launches are collected."""
    _common.kernel.cache_clear()
    with metal_host.installed(), metal_host.options(seed=seed, trace=trace), metal_host.record() as launches:
        yield launches
    _common.kernel.cache_clear()


def problem(case, *, shape=None, batch=1, seed=0, empty=(1,), policy=None, sinks=False):
    """The arguments of ``attend_chunk``; ``shape`` as in SHAPES."""
    layout, departed, filled, length = shape or SHAPES[case.shape]
    dim, value_dim = case.dims
    empty = empty if layout.residual > 1 else ()
    more = {"batch": batch, "dim": dim, "value_dim": value_dim, "dtype": case.dtype, "seed": seed, "empty": empty}
    state = poisoned(random_state(layout, departed=departed, filled=filled, **more), layout)
    queries = random_queries(layout, length, case.group, dim, case.dtype, batch=batch, seed=seed + 1)
    sink = mx.array(np.random.default_rng(seed).standard_normal(queries.shape[1]) * 3).astype(case.dtype)
    return Given(Call(queries, 0.5 / dim**0.5, sink if sinks else None), state, layout, policy or Policy())


def poisoned(state, layout):
    """NaN in the keys and values of all rows that are not filled."""
    beyond = np.zeros(state.kept.weight.shape[1], bool)
    for begin, end in pairwise(layout.starts):
        beyond[begin + state.departed : end] = True
    past = np.arange(state.recent_rows) >= state.filled

    def nowhere(rows, places):
        return Dense(*(mx.where(mx.array(places)[:, None], mx.array(mx.nan, x.dtype), x) for x in rows))

    kept = state.kept._replace(rows=nowhere(state.kept.rows, beyond))
    return state._replace(kept=kept, recent=nowhere(state.recent, past))


def flat(results):
    """Output and scores, or scores alone, as a list of arrays."""
    return [y for x in results for y in ([x] if isinstance(x, mx.array) else x)]


def same(found, expected, dtype):
    """Outputs (if there are three results) within the tolerance of the dtype, scores within that of float32."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        is_output = len(found) == 3 and i == 0
        error = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]} if is_output else {"atol": 3e-5, "rtol": 1e-4}
        np.testing.assert_allclose(f64(a), f64(b), **error, err_msg=f"result {i} of {len(found)}")


def check_attend(given, seeds=SEEDS, trace=False):
    """``attend_chunk`` equals its twin, bit for bit the same whatever the schedule; the launches of the last run."""
    return _check(attend_chunk, attention.attend, given, seeds, trace)


def check_score(given, seeds=SEEDS, trace=False):
    """``score`` equals its twin."""
    return _check(score, attention.score, given, seeds, trace)


def _check(kernel, plain, given, seeds, trace):
    expected, first = flat(plain(*given)), None
    for seed in seeds:
        with executor(seed, trace) as launches:
            found = flat(kernel(*given))
        same(found, expected, given.call.queries.dtype)
        first = first or found
        assert all(mx.array_equal(a, b) for a, b in zip(first, found, strict=True)), "depends on the schedule"
        for launch in launches:
            assert set(launch.copied) <= {"queries"}, f"{launch.name} copies {launch.copied}"
            if trace:
                # Inputs are never written, and nobody writes what stands for an empty array.
                partly = [n for n, buffer in launch.buffers.items() if buffer.written and buffer.unwritten]
                assert not partly, f"{launch.name} leaves parts of {partly} unwritten"
    return launches
