"""What the tests of ``attend_chunk`` and ``score`` share: cases, random stores, comparison with the plain ops."""

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from random import Random

import metal_host
import mlx.core as mx
import numpy as np
from test_compress import queries_of, stores
from tiny import TOLERANCE, f64

from zm_mlx import compress
from zm_mlx.kernels import _common
from zm_mlx.kernels.attend_chunk import attend_chunk
from zm_mlx.kernels.score import score
from zm_mlx.layout import Layout
from zm_mlx.policy import Policy

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 128), (128, 80))
GROUPS = (1, 2, 3, 5, 7, 8, 16, 71)
RAGGED = Layout(4, (61, 9, 0), 20, 9)  # one head has (nearly) everything, one its floor
SHAPES = {  # layout, left, live, L
    "ragged": (RAGGED, 400, 27, 9),
    "partly filled": (RAGGED, 33, 29, 8),  # the largest head has room, the others have merged
    "nothing kept": (Layout(4, (9, 9), 40, 5), 0, 41, 13),
    "one live row": (Layout(2, (3,), 1, 1), 0, 1, 1),
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

    left = set().union(*map(pairs, cases))
    chance, chosen = Random(seed), []
    while left:
        best = max(chance.sample(cases, min(200, len(cases))), key=lambda c: len(pairs(c) & left))
        if pairs(best) & left:
            chosen.append(best)
            left -= pairs(best)
    return chosen


@contextmanager
def executor(seed=0, trace=False):
    """The kernels run on the CPU; the launches are collected."""
    _common.kernel.cache_clear()
    with metal_host.installed(), metal_host.options(seed=seed, trace=trace), metal_host.record() as launches:
        yield launches
    _common.kernel.cache_clear()


def problem(case, *, shape=None, batch=1, seed=0, empty=(1,), policy=None, sinks=False):
    """Queries, kept and recent store, and the other arguments of ``compress.attend``; ``shape`` as in SHAPES."""
    layout, left, live, length = shape or SHAPES[case.shape]
    dim, value_dim = case.dims
    empty = empty if layout.residual > 1 else ()
    how = {"batch": batch, "dim": dim, "value_dim": value_dim, "dtype": case.dtype, "seed": seed, "empty": empty}
    kept, recent = poisoned(*stores(layout, left=left, live=live, **how), layout, left, live)
    queries = queries_of(layout, length, case.group, dim, case.dtype, batch=batch, seed=seed + 1)
    sink = mx.array(np.random.default_rng(seed).standard_normal(queries.shape[1]) * 3).astype(case.dtype)
    return (queries, kept, recent), {
        "left": left,
        "live": live,
        "layout": layout,
        "policy": policy or Policy(),
        "scale": 0.5 / dim**0.5,
        "sinks": sink if sinks else None,
    }


def poisoned(kept, recent, layout, left, live):
    """NaN in the keys and values of all rows that do not live."""
    dead = np.zeros(kept.weight.shape[1], bool)
    for begin, end in pairwise(layout.starts):
        dead[begin + left : end] = True
    past = np.arange(recent.keys.shape[2]) >= live

    def filled(x, rows):
        return mx.where(mx.array(rows)[:, None], mx.array(mx.nan, x.dtype), x)

    kept = kept._replace(keys=filled(kept.keys, dead), values=filled(kept.values, dead))
    return kept, recent._replace(keys=filled(recent.keys, past), values=filled(recent.values, past))


def same(found, expected, dtype):
    """Outputs (if there are three results) within the tolerance of the dtype, scores within that of float32."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        is_output = len(found) == 3 and i == 0
        error = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]} if is_output else {"atol": 3e-5, "rtol": 1e-4}
        np.testing.assert_allclose(f64(a), f64(b), **error, err_msg=f"result {i} of {len(found)}")


def check_attend(arrays, how, seeds=SEEDS, trace=False):
    """``attend_chunk`` equals its twin, bit for bit the same whatever the schedule; the launches of the last run."""
    return _check(lambda: attend_chunk(*arrays, **how), compress.attend(*arrays, **how), arrays, seeds, trace)


def check_score(arrays, how, tokens, seeds=SEEDS, trace=False):
    """``score`` equals its twin."""
    expected = compress.score(*arrays, tokens=tokens, **how)
    return _check(lambda: score(*arrays, tokens=tokens, **how), expected, arrays, seeds, trace)


def _check(run, expected, arrays, seeds, trace):
    first = None
    for seed in seeds:
        with executor(seed, trace) as launches:
            found = run()
        same(found, expected, arrays[0].dtype)
        first = first or found
        assert all(mx.array_equal(a, b) for a, b in zip(first, found, strict=True)), "depends on the schedule"
        for launch in launches:
            assert set(launch.copied) <= {"queries"}, f"{launch.name} copies {launch.copied}"
            if trace:
                # Inputs are never written, and nobody writes what stands for an empty array.
                partly = [n for n, buffer in launch.buffers.items() if buffer.written and buffer.unwritten]
                assert not partly, f"{launch.name} leaves parts of {partly} unwritten"
    return launches
