"""The executor of Metal source: what it computes, how inputs reach a kernel, what it counts."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import metal_host
import mlx.core as mx
import numpy as np
import pytest
from metal_host import MetalCompileError
from metal_host.quick import ramp, run, values

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}


# ---- kernels compute what they say ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_elementwise_with_vectors_and_math(dtype: mx.Dtype) -> None:
    a = mx.random.normal((64,), key=mx.random.key(1)).astype(dtype)
    source = """
        uint i = thread_position_in_grid.x;
        vec<T, 4> v = ((const device vec<T, 4>*)a)[i];
        float4 f = float4(v.wz, v.x, v.y);
        f = metal::select(metal::fast::exp(f), float4(metal::rsqrt(f.x + 9.0f)), f > 1.0f);
        f.xy = clamp(f.yx, float2(0.1f), float2(0.9f, 2.0f));
        using F4 = float4;
        using T4 = vec<T, 4>;
        T4 r = T4(fma(F4(f.xy, f.z, f.w), F4(2.0f), F4(a[4 * i])));
        ((device T4*)o)[i] = r;
    """
    (out,) = run(source, {"a": a}, {"o": ((64,), dtype)}, 16, 8, template=[("T", dtype)])
    v = values(a).reshape(16, 4)[:, [3, 2, 0, 1]]
    f = np.where(v > 1, 1 / np.sqrt(v[:, :1] + 9), np.exp(v))
    f[:, :2] = np.clip(f[:, [1, 0]], 0.1, [0.9, 2.0])
    expected = f * 2 + values(a).reshape(16, 4)[:, :1]
    np.testing.assert_allclose(values(out).reshape(16, 4), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_row_softmax_under_random_schedules_and_traced(dtype: mx.Dtype, seed: int) -> None:
    x = mx.random.normal((5, 200), key=mx.random.key(2)).astype(dtype)
    source = """
        threadgroup float best[4], total[4];
        uint row = threadgroup_position_in_grid.x, t = thread_index_in_threadgroup;
        uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
        float m = -INFINITY;
        for (int c = t; c < N; c += 128) m = max(m, float(x[row * N + c]));
        m = simd_max(m);
        if (lane == 0) best[sg] = m;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        m = simd_max(best[lane % 4]);
        float s = 0;
        for (int c = t; c < N; c += 128) s += metal::exp(float(x[row * N + c]) - m);
        s = simd_sum(s);
        if (lane == 0) total[sg] = s;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        s = total[0] + total[1] + total[2] + total[3];
        for (int c = t; c < N; c += 128) o[row * N + c] = T(metal::exp(float(x[row * N + c]) - m) / s);
    """
    with metal_host.options(seed=seed, trace=seed == 2):
        (out,) = run(source, {"x": x}, {"o": (x.shape, dtype)}, 5 * 128, 128, template=[("T", dtype), ("N", 200)])
    np.testing.assert_allclose(values(out), values(mx.softmax(x.astype(mx.float32), -1)), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [*FLOATS, mx.int32, mx.uint32, mx.int16, mx.uint8])
def test_simd_operations(dtype: mx.Dtype) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        T x = a[i];
        o[i] = simd_sum(x);
        o[64 + i] = simd_max(x);
        o[128 + i] = simd_min(x);
        o[192 + i] = simd_shuffle_xor(x, 5);
        o[256 + i] = simd_shuffle_down(x, 3);
        o[320 + i] = simd_shuffle_up(x, 3);
        o[384 + i] = simd_broadcast(x, 7);
        o[448 + i] = simd_shuffle(x, ushort(31 - thread_index_in_simdgroup));
        o[512 + i] = simd_prefix_inclusive_sum(x);
        o[576 + i] = simd_prefix_exclusive_sum(x);
        o[640 + i] = simd_shuffle_and_fill_up(x, T(1), 2);
    """
    a = mx.array((np.arange(64) * 7 % 5).astype(np.int32)).astype(dtype)
    (out,) = run(source, {"a": a}, {"o": ((11, 64), dtype)}, 64, 64, template=[("T", dtype)])
    x = values(a).reshape(2, 32)
    lanes = np.arange(32)
    sums = np.cumsum(x, 1)
    fill = np.where(lanes < 2, 1, x[:, np.maximum(lanes - 2, 0)])
    expected = [
        np.broadcast_to(x.sum(1, keepdims=True), x.shape),
        np.broadcast_to(x.max(1, keepdims=True), x.shape),
        np.broadcast_to(x.min(1, keepdims=True), x.shape),
        x[:, lanes ^ 5],
        x[:, np.where(lanes < 29, lanes + 3, lanes)],
        x[:, np.where(lanes >= 3, lanes - 3, lanes)],
        np.broadcast_to(x[:, 7:8], x.shape),
        x[:, ::-1],
        sums,
        sums - x,
        fill,
    ]
    np.testing.assert_array_equal(values(out), np.stack(expected).reshape(11, 64))


def test_votes_in_a_partial_simdgroup() -> None:
    source = """
        uint i = thread_position_in_grid.x;
        bool odd = i & 1;
        o[i] = uint(ulong(simd_ballot(odd)));
        o[40 + i] = simd_any(i == 39) + 2 * simd_all(i >= 32) + 4 * threads_per_threadgroup.x;
        o[80 + i] = simd_sum(1u);
    """
    (out,) = run(source, {}, {"o": ((3, 40), mx.uint32)}, 40, 64)
    full, rest = 0xAAAAAAAA, 0xAA
    got = np.array(out)
    np.testing.assert_array_equal(got[0], [full] * 32 + [rest] * 8)
    np.testing.assert_array_equal(got[1], [160] * 32 + [163] * 8)
    np.testing.assert_array_equal(got[2], [32] * 32 + [8] * 8)


def test_positions_in_a_three_dimensional_grid_with_partial_groups() -> None:
    source = """
        uint3 p = thread_position_in_grid, t = thread_position_in_threadgroup;
        uint3 g = threadgroup_position_in_grid, n = threads_per_threadgroup;
        uint3 full = dispatch_threads_per_threadgroup, grid = threads_per_grid, groups = threadgroups_per_grid;
        bool right = all(p == g * full + t) && grid.x == 5 && groups.x == 2 && groups.z == 2;
        right &= n.x == (g.x ? 2 : 3) && thread_index_in_threadgroup == t.x + n.x * (t.y + n.y * t.z);
        o[p.x + 5 * (p.y + 4 * p.z)] = right;
    """
    (out,) = run(source, {}, {"o": ((60,), mx.bool_)}, (5, 4, 3), (3, 2, 2))
    assert np.array(out).all()


@pytest.mark.parametrize("space", ["threadgroup", "device"])
def test_histogram_by_integer_atomics(space: str) -> None:
    a = mx.random.randint(0, 16, (1000,), key=mx.random.key(3))
    if space == "device":
        source = "atomic_fetch_add_explicit(&o[a[thread_position_in_grid.x]], 1, memory_order_relaxed);"
        group = 64
    else:
        source = """
            threadgroup atomic_uint h[16];
            uint t = thread_index_in_threadgroup;
            if (t < 16) atomic_store_explicit(&h[t], 0, memory_order_relaxed);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (uint i = t; i < 1000; i += 250) atomic_fetch_add_explicit(&h[a[i]], 1, memory_order_relaxed);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (t < 16) o[t] = atomic_load_explicit(&h[t], memory_order_relaxed);
        """
        group = 250
    with metal_host.options(trace=True, seed=5):
        (out,) = run(
            source,
            {"a": a},
            {"o": ((16,), mx.uint32)},
            250 if space == "threadgroup" else 1000,
            group,
            init_value=0,
            atomic_outputs=space == "device",
        )
    np.testing.assert_array_equal(np.array(out), np.bincount(np.array(a), minlength=16))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transposed", [False, True])
def test_simdgroup_matrix_product(dtype: mx.Dtype, transposed: bool) -> None:
    source = """
        threadgroup T tile[32 * 8];
        uint2 at = threadgroup_position_in_grid.xy * 8;
        uint lane = thread_index_in_simdgroup;
        simdgroup_matrix<float, 8, 8> c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        for (uint i = lane; i < 256; i += 32) tile[i] = a[(at.y + i / 32) * 32 + i % 32];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint k = 0; k < 32; k += 8) {
            simdgroup_matrix<T, 8, 8> x, y;
            simdgroup_load(x, tile, 32, ulong2(k, 0));
            simdgroup_load(y, TR ? b + at.x * 32 + k : b + k * 24 + at.x, TR ? 32 : 24, ulong2(0, 0), TR);
            simdgroup_multiply_accumulate(c, x, y, c);
        }
        simdgroup_store(c, o + at.y * 24 + at.x, 24);
    """
    a = mx.random.normal((16, 32), key=mx.random.key(4)).astype(dtype)
    b = mx.random.normal((32, 24), key=mx.random.key(5)).astype(dtype)
    with metal_host.options(seed=1, trace=transposed):
        (out,) = run(
            source,
            {"a": a, "b": mx.contiguous(b.T) if transposed else b},
            {"o": ((16, 24), mx.float32)},
            (3 * 32, 2, 1),
            (32, 1, 1),
            template=[("T", dtype), ("TR", transposed)],
        )
    np.testing.assert_allclose(np.array(out), values(a) @ values(b), atol=1e-5)
    if transposed:
        traffic = metal_host.last_launch().buffers
        assert traffic["a"].read == 3 * a.nbytes
        assert traffic["b"].read == 2 * b.nbytes
        assert traffic["o"].written == out.nbytes


@pytest.mark.parametrize("dtype", FLOATS)
def test_mlx_own_attention_kernel(dtype: mx.Dtype) -> None:
    """The body of MLX's sdpa_vector, from the headers in its wheel, against MLX's CPU attention."""
    text = (Path(str(mx.__file__)).parent / "include/mlx/backend/metal/kernels/sdpa_vector.h").read_text()
    body = re.search(r"void sdpa_vector\(.*?\) \{\n(.*?)\n\}\n", text, re.S)
    assert body
    flags = re.findall(r"^constant bool (\w+) ", text, re.M)
    header = "".join(f"constant constexpr bool {flag} = false;\n" for flag in flags)
    absent = "const device bool* bmask = nullptr; const device T *fmask = nullptr, *sinks = nullptr;"
    absent += "int mask_kv_seq_stride = 0, mask_q_seq_stride = 0, mask_head_stride = 0, num_q_heads = 1;"
    names = """uint3 tid = threadgroup_position_in_grid, tpg = threadgroups_per_grid;
        uint simd_gid = simdgroup_index_in_threadgroup, simd_lid = thread_index_in_simdgroup;"""
    heads, kv_heads, n, d = 8, 2, 300, 128
    queries, keys, vals = (
        mx.random.normal((1, h, length, d), key=mx.random.key(h + length)).astype(dtype)
        for h, length in ((heads, 1), (kv_heads, n), (kv_heads, n + 1))
    )
    vals = vals[:, :, :n]
    scalars = {"k_head_stride": n * d, "k_seq_stride": d, "v_head_stride": n * d, "v_seq_stride": d}
    inputs = {"queries": queries, "keys": keys, "values": vals, "gqa_factor": heads // kv_heads, "N": n}
    inputs |= {name: mx.array(value, mx.uint64) for name, value in scalars.items()} | {"scale": d**-0.5}
    with metal_host.options(trace=True):
        (out,) = run(
            absent + names + body.group(1),
            inputs,
            {"out": (queries.shape, dtype)},
            heads * 1024,
            1024,
            header=header,
            template=[("T", dtype), ("D", d), ("V", d)],
        )
    expected = mx.fast.scaled_dot_product_attention(queries, keys, vals, scale=d**-0.5)
    np.testing.assert_allclose(values(out), values(expected), atol=TOLERANCE[dtype] / 4)
    launch = metal_host.last_launch()
    assert launch.buffers["keys"].read == heads * n * d * dtype.size  # once per query head
    assert launch.copied == ["values"]
    assert launch.copied_bytes == kv_heads * n * d * dtype.size


def test_half_and_bfloat_round_at_every_operation() -> None:
    source = "T x = a[0]; o[0] = x * x + x; o[1] = -x;"
    for dtype in (mx.float16, mx.bfloat16):
        a = mx.full((8,), 1.01171875, dtype)
        (out,) = run(source, {"a": a}, {"o": ((2,), dtype)}, 1, 1, template=[("T", dtype)])
        assert out[0].item() == (a * a + a)[0].item()


def test_under_grad_and_as_a_replacement_for_mlx() -> None:
    with metal_host.installed():
        kernel: Any = mx.fast.metal_kernel(
            name="square",
            input_names=["a"],
            output_names=["o"],
            source="uint i = thread_position_in_grid.x; o[i] = a[i] * a[i];",
        )

        def forward(a: mx.array) -> Any:
            shape = {"output_shapes": [a.shape], "output_dtypes": [a.dtype]}
            return kernel(inputs=[a], grid=(a.size, 1, 1), threadgroup=(8, 1, 1), **shape)[0]

        square: Any = mx.custom_function(forward)
        square.vjp(lambda a, cotangent, _: 2 * a * cotangent)
        value, gradient = mx.value_and_grad(lambda a: square(a).sum())(ramp(10))
    assert value.item() == 285
    assert gradient.tolist() == [2.0 * i for i in range(10)]
    assert mx.fast.metal_kernel is not metal_host.metal_kernel


# ---- how inputs arrive --------------------------------------------------------------------------------


def test_non_contiguous_inputs_are_copied_and_counted() -> None:
    base = ramp(48).reshape(4, 12)
    source = "uint i = thread_position_in_grid.x; o[i] = a[i];"
    for array, copied in (
        (base, 0),
        (base[1:3], 0),
        (base.T, 1),
        (base[:, :10], 1),
        (base[:, :1], 1),
        (base[:1, 2:9], 0),
    ):
        (out,) = run(source, {"a": array}, {"o": (array.shape, mx.float32)}, array.size, 8)
        np.testing.assert_array_equal(np.array(out), np.array(array))
        launch = metal_host.last_launch()
        assert (launch.copies, launch.copied_bytes) == (copied, copied * array.nbytes), array.shape


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_are_given_where_nothing_is_copied(dtype: mx.Dtype) -> None:
    base = ramp(60, dtype).reshape(3, 4, 5)
    source = """
        uint3 p = thread_position_in_grid;
        uint to = (p.z * a_shape[1] + p.y) * a_shape[2] + p.x;
        o[to] = a[p.z * a_strides[0] + p.y * a_strides[1] + p.x * a_strides[2]];
        if (a_ndim != 3) o[0] = 99;
    """
    for array in (base, base.transpose(2, 0, 1), base[:, 1:3, ::2], base[::-1], mx.broadcast_to(base[:1], (4, 4, 5))):
        (out,) = run(
            source,
            {"a": array},
            {"o": (array.shape, dtype)},
            (array.shape[2], array.shape[1], array.shape[0]),
            (2, 2, 2),
            ensure_row_contiguous=False,
        )
        np.testing.assert_array_equal(values(out), values(array))
        assert metal_host.last_launch().copies == 0


def test_address_space_of_an_input_depends_on_its_size() -> None:
    source = "uint i = thread_position_in_grid.x; const device float* p = a; o[i] = p[i] + b;"
    (out,) = run(source, {"a": ramp(8), "b": mx.array(1.0)}, {"o": ((8,), mx.float32)}, 8, 8)
    assert out.tolist() == list(range(1, 9))
    with pytest.raises(
        MetalCompileError, match=r"'device float' from 'constant float'|device float.*const constant float"
    ):
        run(source, {"a": ramp(7), "b": mx.array(1.0)}, {"o": ((7,), mx.float32)}, 7, 7)


# ---- figures and housekeeping ---------------------------------------------------------------------------------


def test_traffic_is_counted() -> None:
    source = """
        threadgroup float x[64];
        uint i = thread_position_in_grid.x, t = thread_index_in_threadgroup;
        x[t] = a[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float y = 0;
        for (int k = 0; k < 4; k++) y += a[(i + 32 * k) % 256];
        o[i] = half(simd_sum(y) + x[t ^ 1] + c[0]);
    """
    with metal_host.options(trace=True), metal_host.record() as launches:
        run(source, {"a": ramp(256), "c": ramp(4)}, {"o": ((256,), mx.float16)}, 256, 64)
    (launch,) = launches
    assert launch.buffers["a"].read == 256 * 4 * 5
    assert launch.buffers["a"].lines_read == 8 * (1 + 4)  # the barrier makes the first line count again
    assert launch.buffers["o"].written == 512
    assert launch.buffers["c"].space == "constant"
    assert (launch.device_bytes_read, launch.device_bytes_written) == (5120, 512)
    assert (launch.threadgroup_bytes_read, launch.threadgroup_bytes_written) == (1024, 1024)
    assert (launch.threadgroups, launch.barriers, launch.simd_operations) == (4, 4, 8)
    assert launch.threadgroup_memory == 256


def test_processes_share_a_cold_cache(tmp_path: Path) -> None:
    code = "import mlx.core as mx\nfrom metal_host.quick import run\n"
    code += "print(run('o[thread_position_in_grid.x] = 1;', {}, {'o': ((8,), mx.float32)}, 8, 8)[0].sum().item())"
    environment = {
        "PYTHONPATH": str(Path(__file__).parent),
        "ZM_MLX_METAL_HOST_CACHE": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    workers = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [worker.communicate()[0].strip() for worker in workers] == ["8.0", "8.0"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".ok", ".pch", ".so", ".so"]
