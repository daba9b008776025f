"""The Metal kernel of merging, executed from its source, against the plain ops."""

import metal_host
import mlx.core as mx
import numpy as np
import pytest
from tiny import TOLERANCE, f64

from zm_mlx import compress
from zm_mlx.kernels import _common
from zm_mlx.kernels.merge import merge
from zm_mlx.stores import Kept

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
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


def state(residual, heads, dim, value_dim, dtype, *, batch=3, rows=None, heaviest=1000, seed=5):
    """A group's kept rows, the first ``residual`` of them merged from random tokens."""
    rng = np.random.default_rng(seed)
    rows = rows or residual + 2
    weight = np.ones((batch, heads, rows))
    weight[:, :, :residual] = rng.integers(1, heaviest + 1, (batch, heads, residual))
    means = [rng.standard_normal((batch, heads, rows, d)) for d in (dim, value_dim)]
    of = weight[:, :, :residual, None]
    key_sum, value_sum = (x[:, :, :residual] * of for x in means)
    square_sum = (key_sum * means[0][:, :, :residual]).sum(-1) + rng.random(of.shape[:3]) * of[..., 0]
    single = [
        mx.array(x.astype(np.float32)) for x in (weight, rng.random(weight.shape), key_sum, value_sum, square_sum)
    ]
    return Kept(
        *(mx.array(x.astype(np.float32)).astype(dtype) for x in means), *single[:2],
        mx.full(weight.shape, -1, mx.int32), mx.zeros((batch, heads, residual)), *single[2:],
    )  # fmt: skip


def pool(heads, n, dim, value_dim, dtype, *, batch=3, seed=6, share=0.7):
    """Keys, values, scores and victims of a pool; of the last head nobody is a victim, of the first all."""
    rng = np.random.default_rng(seed)
    rows = [
        mx.array(rng.standard_normal((batch, heads, n, d)).astype(np.float32)).astype(dtype) for d in (dim, value_dim)
    ]
    victims = rng.random((batch, heads, n)) < share
    if heads > 2:
        victims[:, 0], victims[:, -1] = True, False
    return *rows, mx.array((rng.random((batch, heads, n)) - 0.3).astype(np.float32)), mx.array(victims)


def run(*arguments, seed=0, trace=False):
    with metal_host.options(seed=seed, trace=trace), metal_host.record() as launches:
        merged = merge(*arguments)
    assert [launch.name for launch in launches] == ["zm_merge"]
    if trace:
        assert not any(b.unwritten for b in launches[0].buffers.values() if b.written)
    return merged, launches[0]


def assert_same(merged, expected, dtype):
    for field, x, y in zip(Kept._fields, merged, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, field
        if field in ("weight", "score", "position"):
            assert mx.array_equal(x, y), field
        else:
            near = TOLERANCE[dtype] if field in ("keys", "values") else 2e-5
            scale = max(1, float(np.abs(f64(y)).max(initial=0))) if field.endswith("sum") else 1
            np.testing.assert_allclose(f64(x), f64(y), atol=near * scale, rtol=1e-4 + near, err_msg=field)


def check(case, n=37, *, fresh, seeds=(1, 2, 3), trace=False, heads=3):
    dtype, dim, value_dim, residual = case
    kept = state(residual, heads, dim, value_dim, dtype)
    arguments = (kept, *pool(heads, n, dim, value_dim, dtype), residual, fresh)
    expected = compress.merge(*arguments)
    for seed in seeds:
        merged, launch = run(*arguments, seed=seed, trace=trace)
        assert_same(merged, expected, dtype)
        assert launch.copied == []


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
    kept = state(residual, 1, 64, 64, mx.float32, batch=1)
    same = mx.repeat(kept.keys[:, :, 1:2], residual, axis=2)
    keys = mx.concatenate([-same[:, :, :1], same[:, :, 1:], kept.keys[:, :, residual:]], axis=2)
    arrived = mx.repeat(same[:, :, :1], 20, axis=2)
    every = mx.ones((1, 1, 20), mx.bool_)
    merged, _ = run(kept._replace(keys=keys), arrived, arrived, mx.ones((1, 1, 20)), every, residual, False)
    joined = f64(merged.weight - kept.weight[:, :, :residual])[0, 0]
    assert joined.tolist() == [0, 20] + [0] * (residual - 2)


def test_half_precision_dot_products_beyond_its_range():
    """Keys of up to 200: dot products of millions, which a half cannot tell apart."""
    kept = state(4, 2, 128, 128, mx.float16)
    kept = kept._replace(keys=kept.keys * 50)
    keys, values, score, victims = pool(2, 50, 128, 128, mx.float16)
    arguments = (kept, keys * 50, values, score, victims, 4, False)
    merged, _ = run(*arguments)
    nearest = (f64(keys * 50) @ f64(kept.keys[:, :, :4]).swapaxes(-1, -2)).argmax(-1)
    joined = [
        [[((nearest[b, h] == r) & np.array(victims[b, h])).sum() for r in range(4)] for h in (0, 1)] for b in range(3)
    ]
    assert f64(merged.weight - kept.weight[:, :, :4]).tolist() == joined
    assert all(np.isfinite(f64(x)).all() for x in merged)


def test_a_mean_of_a_million_tokens_keeps_moving():
    kept = state(2, 1, 64, 64, mx.float16, heaviest=10**6)
    merged, _ = run(kept, *pool(1, 200, 64, 64, mx.float16, share=1), 2, False)
    assert_same(merged, compress.merge(kept, *pool(1, 200, 64, 64, mx.float16, share=1), 2, False), mx.float16)
    assert f64(merged.weight).sum() == f64(kept.weight[:, :, :2]).sum() + 3 * 200
    assert (f64(merged.key_sum) != f64(kept.key_sum)).mean() > 0.9


def test_merged_rows_are_exact_means_of_many_victims():
    kept = state(1, 1, 64, 64, mx.float32, batch=1)
    keys, values, score, victims = pool(1, 3000, 64, 64, mx.float32, batch=1)
    merged, _ = run(kept, keys, values, score, victims, 1, True)
    mine = np.array(victims[0, 0])
    for new, rows in ((merged.keys, keys), (merged.values, values)):
        np.testing.assert_allclose(f64(new[0, 0, 0]), f64(rows[0, 0])[mine].mean(0), atol=1e-6)
    spread = f64(keys[0, 0])[mine].var(0).mean()
    np.testing.assert_allclose(merged.spread.item(), spread, rtol=1e-5)


def test_the_same_bits_in_every_schedule():
    arguments = (state(4, 2, 96, 96, mx.bfloat16), *pool(2, 60, 96, 96, mx.bfloat16), 4, False)
    first, _ = run(*arguments)
    for seed in (1, 2, 3):
        again, _ = run(*arguments, seed=seed)
        assert all(mx.array_equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("residual", [1, 4, 16])
def test_victims_are_read_once(residual):
    kept = state(residual, 4, 128, 128, mx.float16, batch=2)
    arguments = (kept, *pool(4, 64, 128, 128, mx.float16, batch=2, share=1)[:3], mx.ones((2, 4, 64), mx.bool_))
    _, launch = run(*arguments, residual, False, trace=True)
    read = {x: launch.buffers[f"recent_{x}"].read for x in ("keys", "values", "score")}
    assert read == {"keys": 8 * 64 * 256, "values": 8 * 64 * 256, "score": 8 * 64 * 4}
    assert launch.buffers["keys"].read == 8 * residual * 256  # the residual rows, once
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
