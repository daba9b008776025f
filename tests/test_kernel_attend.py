"""The decode kernel, run from its Metal source, against the plain ops."""

from itertools import combinations, product

import metal_host
import mlx.core as mx
import numpy as np
import pytest
from states import FLOATS, Given, f32, names, random_queries, random_state
from tiny import f64

from zm_mlx.ops.kernels import _common
from zm_mlx.ops.kernels import attend as kernels
from zm_mlx.ops.plain import attention
from zm_mlx.policies import Policy
from zm_mlx.state.layout import Layout
from zm_mlx.state.state import Call

DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 5, 7, 8, 16, 71)
TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}  # one rounding of the output

# Hazards of the rows: layout, departed, filled. All but the last are small enough to trace.
ROWS = {
    "one head has everything, others their floor": (Layout(3, (150, 0, 0), 20, 9), 500, 27),
    "a head without kept rows": (Layout(0, (37, 0), 16, 8), 99, 24),
    "one row": (Layout(4, (9, 9), 5, 3), 0, 1),
    "kept rows partly filled, not a multiple of 32": (Layout(3, (60, 60, 30), 40, 11), 45, 50),
    "exactly full before anything merges": (Layout(3, (60, 61), 7, 5), 63, 9),
    "merged, uniform": (Layout(4, (95, 95), 20, 9), 1000, 21),
    "split": (Layout(4, (800, 30), 40, 20), 3000, 49),
}
LARGE = ("split",)


@pytest.fixture(autouse=True)
def _executor():
    _common.kernel.cache_clear()
    with metal_host.installed():
        yield
    _common.kernel.cache_clear()


def pairwise(*axes):
    """Rows that contain every pair of values of two axes, found greedily."""
    missing = {(i, a, j, b) for i, j in combinations(range(len(axes)), 2) for a, b in product(axes[i], axes[j])}
    while missing:
        i, a, j, b = min(missing, key=str)
        row = {i: a, j: b}
        for at in sorted(set(range(len(axes))) - {i, j}):
            pairs = {x: {(k, row[k], at, x) if k < at else (at, x, k, row[k]) for k in row} for x in axes[at]}
            row[at] = max(axes[at], key=lambda x, pairs=pairs: len(pairs[x] & missing))
        values = tuple(row[at] for at in range(len(axes)))
        missing -= {(i, values[i], j, values[j]) for i, j in combinations(range(len(axes)), 2)}
        yield values


def data(layout, departed, filled, *, groups=2, dim=64, value_dim=64, dtype=mx.float32, batch=2, size=0.4):
    more = {"batch": batch, "dim": dim, "value_dim": value_dim, "dtype": dtype}
    state = random_state(layout, departed=departed, filled=filled, **more)
    queries = random_queries(layout, 1, groups, dim, mx.float32, batch=batch) * size
    return Given(Call(queries.astype(dtype), dim**-0.5), state, layout, Policy())


def attend(given):
    """Output, and the new scores of the kept and of the recent rows."""
    out, scores = kernels.attend(*given)
    return out, *scores


def plain(given):
    out, scores = attention.attend(*given)
    return out, *scores


def check(given, *, seeds=(1, 2, 3), traced=True, tolerance=None):
    """The kernel equals its twin under each schedule, reads nothing unwritten and copies no store."""
    expected, queries = plain(given), given.call.queries
    tolerance = tolerance or TOLERANCE[queries.dtype]
    mass = 1e-5 + 1e-6 * queries.shape[1] / given.layout.heads
    for seed, trace in [*((seed, False) for seed in seeds), *([(4, True)] if traced else [])]:
        with metal_host.options(seed=seed, trace=trace), metal_host.record() as launches:
            found = attend(given)
        for x, y, error in zip(found, expected, (tolerance, mass, mass), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
            np.testing.assert_allclose(f64(x), f64(y), atol=error, rtol=max(error, 1e-5))
        for launch in launches:
            assert not {name for name in launch.copied if name != "queries"}, "a store is copied"
            assert launch.threadgroup_memory <= _common.MAX_THREADGROUP_BYTES
        if trace:
            written = kernels.OUTPUTS if given.state.scores.kept.size else ("output", "new_recent_score")
            assert all(launches[-1].buffers[name].unwritten == 0 for name in written)
    return launches


@pytest.mark.parametrize(
    ("dtype", "dim", "groups", "rows", "same"),
    list(pairwise(FLOATS, DIMS, GROUPS, list(ROWS), (True, False))),
    ids=lambda x: names([x])[0] if x in FLOATS else str(x),
)
def test_equals_the_plain_ops(dtype, dim, groups, rows, same):
    value_dim = dim if same else DIMS[DIMS.index(dim) - 2]
    given = data(*ROWS[rows], groups=groups, dim=dim, value_dim=value_dim, dtype=dtype)
    check(given, traced=rows not in LARGE)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rows", list(ROWS))
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
def test_equals_the_plain_ops_in_every_combination(dtype, dim, groups, rows):
    for value_dim in {dim, 64, 256}:
        given = data(*ROWS[rows], groups=groups, dim=dim, value_dim=value_dim, dtype=dtype)
        check(given, traced=rows not in LARGE)


@pytest.mark.parametrize("groups", [3, 9])
@pytest.mark.parametrize("rows", ["a head without kept rows", "merged, uniform", "split"])
@pytest.mark.parametrize("dtype", FLOATS, ids=names(FLOATS))
def test_sinks_take_probability_and_nothing_else(dtype, rows, groups):
    given = data(*ROWS[rows], groups=groups, dtype=dtype)
    sinks = np.random.default_rng(3).standard_normal(given.call.queries.shape[1]) * 4
    check(given.with_call(sinks=mx.array(sinks).astype(dtype)), traced=rows not in LARGE)


@pytest.mark.parametrize(
    "policy",
    [Policy(kappa=0), Policy(kappa=0.05), Policy(kappa=100), Policy(alpha=0), Policy(alpha=0.6), Policy(decay=1)],
    ids=lambda p: f"alpha {p.alpha} kappa {p.kappa} decay {p.decay}",
)
@pytest.mark.parametrize("groups", [3, 16])
def test_every_setting_means_what_the_plain_ops_make_of_it(policy, groups):
    check(data(*ROWS["merged, uniform"], groups=groups)._replace(policy=policy), seeds=(1,))


def test_spread_counts_only_where_rows_are_merged():
    """The same spread on a head that is full of raw rows, on one that has merged, and on one with room."""
    layout = Layout(3, (60, 30, 90), 7, 5)
    given = data(layout, 63, 9)
    merged = np.array([begin + 63 > end for begin, end in zip(layout.starts, layout.starts[1:], strict=False)])
    assert merged.any() and not merged.all()
    spread = f64(given.state.residuals.spread)
    assert not spread[:, ~merged].any()

    def spread_by(x):
        residuals = given.state.residuals._replace(spread=f32(x))
        return given._replace(state=given.state._replace(residuals=residuals))

    expected = plain(spread_by(spread))
    for x, y in zip(attend(spread_by(spread + (1 - merged)[None, :, None])), expected, strict=True):
        np.testing.assert_allclose(f64(x), f64(y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", ["merged, uniform", "split"])
@pytest.mark.parametrize("groups", [2, 8, 71])
def test_weights_up_to_a_million_and_empty_rows(rows, groups):
    given = data(*ROWS[rows], groups=groups)
    kept, starts = given.state.kept, given.layout.starts
    weight, keys, values = f64(kept.weight), f64(kept.rows.keys), f64(kept.rows.values)
    for begin in starts[:-1]:
        weight[:, begin : begin + 4] = [1e6, 3, 0, 12345]
        weight[1, begin + 7 : begin + 29 : 3] = 0
    weight[0, 300:700] = 0  # whole splits of nothing
    keys[weight == 0], values[weight == 0] = np.nan, np.inf
    finite = {"keys": f32(np.nan_to_num(keys)), "values": f32(np.nan_to_num(values, posinf=0))}
    expected = plain(given.with_kept(weight=f32(weight), **finite))
    given = given.with_kept(weight=f32(weight), keys=f32(keys), values=f32(values))
    for seed in (0, 1, 2):
        with metal_host.options(seed=seed):
            found = attend(given)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(f64(x), f64(y), atol=3e-5, rtol=1e-4)


def test_sequences_of_a_batch_filled_differently():
    given = data(*ROWS["merged, uniform"], groups=5, batch=3)
    weight = f64(given.state.kept.weight)
    weight[0, 4:], weight[1, :99] = 0, 0
    weight[2, ::2] = 0
    check(given.with_kept(weight=f32(weight)))


@pytest.mark.parametrize("rows", ["merged, uniform", "split"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_logits_near_and_beyond_the_largest_half(dtype, rows):
    given = data(*ROWS[rows], groups=4, dtype=dtype, size=300)
    keys = given.state.recent.keys[0, 0, : given.state.filled]
    assert np.abs(f64(given.call.queries[:1, :4, 0]) @ f64(keys).T).max() > 1e4
    check(given.with_call(scale=1.0), traced=rows not in LARGE)
    # Beyond 65504, unless computed in float32.
    check(given.with_call(scale=30.0), seeds=(1,), traced=False)


def test_logits_far_below_zero_with_an_empty_split():
    """A split without rows must not pass for one with logits of 0."""
    layout = Layout(4, (800, 800), 40, 20)
    given = data(layout, 2, 1, size=1)
    assert kernels.splits_of(4, 2, 864)[0] > 1
    state = given.state
    kept, recent = (-1000 * mx.ones_like(x.keys) / 64 for x in (state.kept.rows, state.recent))
    given = given._replace(state=state._replace(recent=state.recent._replace(keys=recent))).with_kept(keys=kept)
    check(given.with_call(queries=mx.ones_like(given.call.queries), scale=1.0), traced=False)


@pytest.mark.parametrize("groups", [1, 6, 16])
def test_equal_rows_get_equal_scores(groups):
    layout = Layout(0, (120, 70), 20, 10)
    given = data(layout, 300, 25, groups=groups)
    keys, scores = given.state.kept.rows.keys, given.state.scores
    given = given._replace(state=given.state._replace(scores=scores._replace(kept=0 * scores.kept)))
    found = attend(given.with_kept(keys=mx.broadcast_to(keys[:, :1], keys.shape) + 0))[1]
    for begin, end in zip(layout.starts, layout.starts[1:], strict=False):
        assert mx.array_equal(found[:, begin:end].min(axis=1), found[:, begin:end].max(axis=1))


def test_queries_that_are_not_contiguous():
    given = data(*ROWS["merged, uniform"], groups=3)
    wide = mx.concatenate([given.call.queries, given.call.queries + 1], axis=-1).transpose(0, 2, 1, 3)
    launches = check(given.with_call(queries=wide[..., :64].transpose(0, 2, 1, 3)))
    assert launches[0].copied == ["queries"]


@pytest.mark.parametrize("heads", [1, 8])  # the starts of fewer than 7 heads come through another address space
def test_both_address_spaces_of_small_inputs(heads):
    check(data(Layout(1, (0,) * heads, 2, 1), 9, 3, batch=1))
    check(data(Layout(2, (1,) * heads, 2, 6), 9, 3, batch=3, groups=9))


# ---- shapes and splits


def test_the_stores_alone_decide_the_splits():
    """Nothing is built anew while tokens arrive, and a longer fill does not change the grid."""
    layout = ROWS["split"][0]
    grids = set()
    for departed, filled in ((0, 1), (30, 60), (804, 44), (9000, 60)):
        given = data(layout, departed, filled)
        with metal_host.record() as launches:
            attend(given)
        grids.add(tuple((x.name, x.grid) for x in launches))
    assert len(grids) == 1 and len(grids.pop()) == 2
    assert _common.kernel.cache_info().currsize == 2


def test_every_split_has_room_for_its_rows_and_one_head_fills_a_gpu():
    for capacity, tile, many in product((1, 31, 255, 256, 700, 1025, 4097, 32768), range(1, 9), (1, 2, 8, 31, 32, 500)):
        splits, rows = kernels.splits_of(many, tile, capacity)
        assert splits * rows >= capacity and rows * tile <= kernels.LOGITS
        floats = tile * rows + rows + 8 * 256 + 3 * tile
        assert 4 * floats <= _common.MAX_THREADGROUP_BYTES
    assert kernels.splits_of(1, 1, 32768)[0] >= 128
    assert kernels.splits_of(1, 4, 8192)[0] >= 32
    assert kernels.splits_of(32, 1, 1024)[0] == 1


@pytest.mark.parametrize("groups", [1, 8])
def test_32k_rows(groups):
    layout = Policy().layout(32768, 1)
    given = data(layout, 10**6, layout.recent, groups=groups, dtype=mx.float16, batch=1)
    check(given, seeds=(1,), traced=False)


def test_more_splits_than_threads(monkeypatch):
    monkeypatch.setattr(kernels, "LOGITS", 32)
    layout = Layout(2, (8300,), 60, 10)
    assert kernels.splits_of(1, 1, 8372)[0] > kernels.THREADS
    check(data(layout, 9999, 65, groups=1, batch=1), seeds=(1,))


# ---- traffic


def traffic(heads, groups, dim, rows, dtype=mx.float16, value_dim=None, fill=1.0):
    """Launches over uniform heads, the filled rows, the bytes counted and the fewest possible."""
    layout, value_dim = Policy().layout(rows, heads), value_dim or dim
    filled = layout.recent if fill == 1 else layout.proximity + 1
    given = data(layout, 10 * rows, filled, groups=groups, dim=dim, value_dim=value_dim, dtype=dtype, batch=1)
    with metal_host.options(trace=True), metal_host.record() as launches:
        mx.eval(attend(given))
    counted = sum(x.device_bytes_read + x.device_bytes_written for x in launches)
    old, tiles = layout.starts[-1], kernels.tiles_of(groups)[0]
    every = old + heads * filled
    least = tiles * (every * (dim + value_dim) * dtype.size + 4 * old) + 4 * every  # K, V, weight; score
    least += 4 * every + heads * groups * value_dim * dtype.size  # scores and output
    return launches, every, counted, least


@pytest.mark.parametrize(
    ("heads", "groups", "dim", "rows", "options"),
    [
        (32, 1, 128, 512, {}),
        (8, 4, 128, 512, {}),
        (8, 7, 128, 512, {}),
        (8, 7, 128, 1100, {"fill": 0.9}),
        (4, 8, 64, 560, {"fill": 0.9}),
        (1, 8, 64, 1600, {"value_dim": 256, "fill": 0.9}),
        (2, 1, 80, 2048, {"dtype": mx.float32}),
        (2, 2, 64, 256, {"dtype": mx.bfloat16}),
        (1, 16, 64, 600, {}),
    ],
    ids=str,
)
def test_traffic_stays_within_a_tenth_of_the_least(heads, groups, dim, rows, options):
    """Split rows may cost 8 bytes more for each query head: their logits, written and read once."""
    launches, every, counted, least = traffic(heads, groups, dim, rows, **options)
    scratch = 8 * groups * every if len(launches) > 1 else 0
    print(f"{counted:,} bytes, least {least:,}, scratch {scratch:,}: {(counted - scratch) / least:.3f}")
    assert counted <= 1.10 * least + scratch


@pytest.mark.parametrize("groups", [1, 4, 8, 16])
def test_keys_and_values_are_read_once_for_8_query_heads(groups):
    """At 4 query heads a quarter of what sdpa_vector requests, which reads a row for each (test_metal_host)."""
    launches, every, _, _ = traffic(2, groups, 128, 300, value_dim=64)
    for name, width in (("keys", 128), ("values", 64)):
        read = sum(launches[0].buffers[f"{store}_{name}"].read for store in ("kept", "recent"))
        assert read == -(-groups // 8) * every * width * 2


def test_empty_rows_are_not_read():
    given = data(*ROWS["merged, uniform"], groups=2)
    weight = given.state.kept.weight
    with metal_host.options(trace=True):
        attend(given.with_kept(weight=weight * (mx.arange(weight.shape[1]) % 2)))
    for name in ("keys", "values"):
        assert metal_host.last_launch().buffers[f"kept_{name}"].read == given.state.kept.rows.keys.nbytes // 2


def test_a_bound_step_serves_all_tokens_until_the_next_compaction():
    """What is bound must not hold the fill, the scores or the recent rows of the first token."""
    for rows in ("merged, uniform", "split", "a head without kept rows"):
        given = data(*ROWS[rows], groups=3)
        step = kernels.bind(*given._replace(state=given.state._replace(filled=3))).step
        later = data(*ROWS[rows], groups=3)
        state = later.state
        state = state._replace(
            recent=state.recent.map(lambda x: 2 * x), scores=state.scores._replace(kept=3 * state.scores.kept)
        )
        later = later.with_call(queries=-later.call.queries)._replace(state=state)
        out, scores = step(later.call.queries, later.state)
        for x, y in zip((out, *scores), plain(later), strict=True):
            np.testing.assert_allclose(f64(x), f64(y), atol=2e-5, rtol=1e-5)
