"""The Metal kernel of merging, executed from its source, against the plain ops."""

import metal_host
import mlx.core as mx
import numpy as np
import pytest
from states import FLOATS, f32
from tiny import TOLERANCE, f64

from zm_mlx.ops.kernels import _common
from zm_mlx.ops.kernels.merge import Victims, merge
from zm_mlx.policies import merging
from zm_mlx.state.layout import Layout
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Kept, Merged, Residuals, Scores, State

DIMS = [(64, 128), (80, 64), (96, 96), (128, 80), (256, 256)]
# Each dtype with each pair of dims; residual rows at the edges of what a simdgroup and a thread hold.
COVERING = [(FLOATS[i % 3], *DIMS[i % 5], (1, 2, 3, 4, 5, 7, 15, 16, 17, 33)[i % 10]) for i in range(15)]
COVERING.append((mx.float16, 128, 128, 64))


def name(case):
    return "-".join(str(x).rpartition(".")[2] for x in case)


@pytest.fixture(autouse=True, scope="module")
def executor():
    with metal_host.installed():
        _common.kernel.cache_clear()
        yield
        _common.kernel.cache_clear()


CONTEXT = 2  # rows of a head that are not residual


def problem(case, n=37, *, heads=3, batch=3, share=0.7, heaviest=1000, seed=5):
    """A state whose recent store is a pool of n rows, its layout, and which of these rows are victims, [B, H, n].

    Residual rows are merged from random tokens. Of the last head nobody is a victim, of the first all.
    """
    dtype, dim, value_dim, residual = case
    rng, rows = np.random.default_rng(seed), residual + CONTEXT
    weight = np.ones((batch, heads, rows))
    weight[:, :, :residual] = rng.integers(1, heaviest + 1, (batch, heads, residual))
    means = [rng.standard_normal((batch, heads, rows, d)) for d in (dim, value_dim)]
    tokens = weight[:, :, :residual, None]
    key_sum, value_sum = (x[:, :, :residual] * tokens for x in means)
    square_sum = (key_sum * means[0][:, :, :residual]).sum(-1) + rng.random(tokens.shape[:3]) * tokens[..., 0]
    score = rng.random(weight.shape)
    rng = np.random.default_rng(seed + 1)
    pool = Dense(*(f32(rng.standard_normal((batch, heads, n, d))).astype(dtype) for d in (dim, value_dim)))
    mask = rng.random((batch, heads, n)) < share
    if heads > 2:
        mask[:, 0], mask[:, -1] = True, False
    flat = [f32(x).flatten(1, 2) for x in (*means, weight, score)]
    state = State(
        kept=Kept(Dense(*(x.astype(dtype) for x in flat[:2])), flat[2], mx.full(flat[2].shape, -1, mx.int32)),
        residuals=Residuals(mx.zeros(tokens.shape[:3]), f32(key_sum), f32(value_sum), f32(square_sum)),
        recent=pool,
        scores=(scores := Scores(flat[3], f32(rng.random((batch, heads, n)) - 0.3))),
        reading=Scores.none_like(scores),
        departed=10**6,
        filled=n,
        since_compaction=0,
    )
    return state, Layout(residual, (CONTEXT,) * heads, 1, n), mask


def residual_rows(state, layout):
    """The residual rows of a state as they are, [B, H, R]."""
    shape = (state.kept.weight.shape[0], layout.heads, layout.residual + CONTEXT)

    def first(x):
        return x.reshape(*shape, *x.shape[2:])[:, :, : layout.residual]

    return Merged(state.kept.rows.map(first), first(state.kept.weight), first(state.scores.kept), state.residuals)


def expected(state, layout, mask, fresh):
    """What the plain ops merge, head by head, for heads have different numbers of victims."""
    before, heads = residual_rows(state, layout), []
    for b, h in np.ndindex(mask.shape[:2]):
        rows, one = mx.array(np.flatnonzero(mask[b, h])), (slice(b, b + 1), slice(h, h + 1))
        mine = Merged(
            before.rows.map(lambda x, one=one: x[one]), before.weight[one], before.score[one],
            Residuals(*(x[one] for x in before.residuals)),
        )  # fmt: skip
        if rows.size:
            victims = state.recent.map(lambda x, one=one, rows=rows: x[one][:, :, rows])
            heads.append(merging.merge(mine, victims, state.scores.recent[one][:, :, rows], fresh))
        else:
            heads.append(nobody_joined(mine, state.recent.dtype, fresh))
    every = [leaves(x) for x in heads]
    return [mx.concatenate(list(x)).reshape(*mask.shape[:2], *x[0].shape[2:]) for x in zip(*every, strict=True)]


def nobody_joined(merged, dtype, fresh):
    share = 0 if fresh else 1
    weight, sums = share * merged.weight, [share * x for x in merged.residuals]
    tokens = mx.maximum(weight, 1)[..., None]
    means = [x / tokens for x in sums[1:3]]
    spread = mx.maximum(0, sums[3] / tokens[..., 0] - (means[0] * means[0]).sum(-1)) / means[0].shape[-1]
    return Merged(Dense(*(x.astype(dtype) for x in means)), weight, share * merged.score, Residuals(spread, *sums[1:]))


FIELDS = ("keys", "values", "weight", "score", "spread", "key_sum", "value_sum", "square_sum")


def leaves(merged):
    return [*merged.rows, merged.weight, merged.score, *merged.residuals]


def run(state, layout, mask, fresh, *, seed=0, trace=False):
    # Victims first, in order, as rows of the recent store (see common.h); what follows them is not read.
    n, stored = mask.shape[2], layout.starts[-1]
    at = np.arange(n)
    order = np.sort(np.where(mask, at, at + n), axis=-1) % n
    source = 2 * stored + np.arange(layout.heads)[:, None] * n + order
    victims = Victims(
        *(mx.array(x.astype(np.int32)) for x in (source, mask.sum(-1), np.full(mask.shape[:2], 2 - fresh)))
    )
    with metal_host.options(seed=seed, trace=trace), metal_host.record() as launches:
        merged = merge(state, layout, victims)
    assert [launch.name for launch in launches] == ["zm_merge"]
    if trace:
        assert not any(b.unwritten for b in launches[0].buffers.values() if b.written)
    return merged, launches[0]


def assert_same(merged, reference, dtype):
    for field, x, y in zip(FIELDS, leaves(merged), reference, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, field
        if field in ("weight", "score"):
            assert mx.array_equal(x, y), field
        else:
            near = TOLERANCE[dtype] if field in ("keys", "values") else 2e-5
            scale = max(1, float(np.abs(f64(y)).max(initial=0))) if field.endswith("sum") else 1
            np.testing.assert_allclose(f64(x), f64(y), atol=near * scale, rtol=1e-4 + near, err_msg=field)


def check(case, n=37, *, fresh, seeds=(1, 2, 3), trace=False):
    given = (*problem(case, n), fresh)
    reference = expected(*given)
    for seed in seeds:
        merged, launch = run(*given, seed=seed, trace=trace)
        assert_same(merged, reference, case[0])
        assert launch.copied == []


def with_rows(state, **rows):
    return state._replace(kept=state.kept._replace(rows=state.kept.rows._replace(**rows)))


@pytest.mark.parametrize("fresh", [False, True], ids=["joins", "fills"])
@pytest.mark.parametrize("case", COVERING, ids=name)
def test_merge_equals_the_plain_ops(case, fresh):
    check(case, fresh=fresh)


@pytest.mark.parametrize("fresh", [False, True], ids=["joins", "fills"])
@pytest.mark.parametrize("case", [COVERING[i] for i in (1, 6, 8, 12)], ids=name)
def test_no_races(case, fresh):
    check(case, fresh=fresh, seeds=(4,), trace=True, n=40)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 32, 100])
@pytest.mark.parametrize("fresh", [False, True], ids=["joins", "fills"])
def test_any_number_of_victims(n, fresh):
    check((mx.float32, 80, 64, 4), n, fresh=fresh, seeds=(1,))


@pytest.mark.parametrize("residual", [3, 17])
def test_equal_dot_products_join_the_lowest_row(residual):
    state, layout, mask = problem((mx.float32, 64, 64, residual), 20, heads=1, batch=1, share=1)
    same, before = state.kept.rows.keys[:, 1:2], residual_rows(state, layout)
    keys = mx.concatenate([-same, *[same] * (residual - 1), state.kept.rows.keys[:, residual:]], axis=1)
    arrived = mx.repeat(same[:, None], 20, axis=2)
    merged, _ = run(with_rows(state, keys=keys)._replace(recent=Dense(arrived, arrived)), layout, mask, False)
    joined = f64(merged.weight - before.weight)[0, 0]
    assert joined.tolist() == [0, 20] + [0] * (residual - 2)


def test_half_precision_dot_products_beyond_its_range():
    """Keys of up to 200: dot products of millions, which a half cannot tell apart."""
    state, layout, mask = problem((mx.float16, 128, 128, 4), 50, heads=2)
    state = with_rows(state, keys=state.kept.rows.keys * 50)
    state = state._replace(recent=state.recent._replace(keys=state.recent.keys * 50))
    before = residual_rows(state, layout)
    merged, _ = run(state, layout, mask, False)
    nearest = (f64(state.recent.keys) @ f64(before.rows.keys).swapaxes(-1, -2)).argmax(-1)
    joined = [[[((nearest[b, h] == r) & mask[b, h]).sum() for r in range(4)] for h in (0, 1)] for b in range(3)]
    assert f64(merged.weight - before.weight).tolist() == joined
    assert all(np.isfinite(f64(x)).all() for x in leaves(merged))


def test_a_mean_of_a_million_tokens_keeps_moving():
    state, layout, mask = problem((mx.float16, 64, 64, 2), 200, heads=1, share=1, heaviest=10**6)
    merged, _ = run(state, layout, mask, False)
    assert_same(merged, expected(state, layout, mask, False), mx.float16)
    assert f64(merged.weight).sum() == f64(residual_rows(state, layout).weight).sum() + 3 * 200
    assert (f64(merged.residuals.key_sum) != f64(state.residuals.key_sum)).mean() > 0.9


def test_merged_rows_are_exact_means_of_many_victims():
    state, layout, mask = problem((mx.float32, 64, 64, 1), 3000, heads=1, batch=1)
    merged, _ = run(state, layout, mask, True)
    mine = mask[0, 0]
    for new, rows in zip(merged.rows, state.recent, strict=True):
        np.testing.assert_allclose(f64(new[0, 0, 0]), f64(rows[0, 0])[mine].mean(0), atol=1e-6)
    spread = f64(state.recent.keys[0, 0])[mine].var(0).mean()
    np.testing.assert_allclose(merged.residuals.spread.item(), spread, rtol=1e-5)


def test_the_same_bits_in_every_schedule():
    given = (*problem((mx.bfloat16, 96, 96, 4), 60, heads=2), False)
    first, _ = run(*given)
    for seed in (1, 2, 3):
        again, _ = run(*given, seed=seed)
        assert all(mx.array_equal(x, y) for x, y in zip(leaves(first), leaves(again), strict=True))


@pytest.mark.parametrize("residual", [1, 4, 16])
def test_victims_are_read_once(residual):
    state, layout, mask = problem((mx.float16, 128, 128, residual), 64, heads=4, batch=2)
    _, launch = run(state, layout, np.ones_like(mask), False, trace=True)
    read = {x: launch.buffers[f"recent_{x}"].read for x in ("keys", "values", "score")}
    assert read == {"keys": 8 * 64 * 256, "values": 8 * 64 * 256, "score": 8 * 64 * 4}
    assert launch.buffers["kept_keys"].read == 8 * residual * 256  # the residual rows, once
    sums = 8 * residual * 4 * (2 * 128 + 3)  # sums, squares, weight and score, in and out
    least = sum(read.values()) + 8 * residual * 256 + 2 * sums + 8 * residual * 512
    assert launch.device_bytes_read + launch.device_bytes_written <= 1.2 * least


@pytest.mark.exhaustive
@pytest.mark.parametrize("fresh", [False, True], ids=["joins", "fills"])
@pytest.mark.parametrize("residual", [1, 4, 7, 64])
@pytest.mark.parametrize("value_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float16", "bfloat16"])
def test_every_shape(dtype, dim, value_dim, residual, fresh):
    check((dtype, dim, value_dim, residual), fresh=fresh)
    check((dtype, dim, value_dim, residual), fresh=fresh, seeds=(4,), trace=True)
