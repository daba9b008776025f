"""The executor of Metal source finds each fault planted here, and says where it is."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import metal_host
import mlx.core as mx
import numpy as np
import pytest
from metal_host import MetalCompileError, MetalFault
from metal_host.quick import ramp, run, values


@contextmanager
def fault(message: str, **options: Any) -> Iterator[pytest.ExceptionInfo[MetalFault]]:
    with metal_host.options(**options), pytest.raises(MetalFault, match=message) as error:
        yield error


FLOATS = [mx.float32, mx.float16, mx.bfloat16]
# ---- memory faults ------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("trace", [False, True], ids=["plain", "traced"])


@BOTH
@pytest.mark.parametrize("dtype", [*FLOATS, mx.uint8])
def test_read_past_the_end_of_an_input(trace: bool, dtype: mx.Dtype) -> None:
    source = "uint i = thread_position_in_grid.x;\n  o[i] = a[i + 1];"
    with metal_host.options(trace=trace), pytest.raises(MetalFault) as error:
        run(source, {"a": ramp(37, dtype)}, {"o": ((37,), dtype)}, 37, 32)
    assert error.value.kind == "out of bounds"
    assert re.search(
        r"'planted'.*read.*'a'.*source line 2: `o\[i\] = a\[i \+ 1\];`.*thread \(4, 0, 0\)", str(error.value)
    )


@BOTH
def test_write_past_the_end_of_an_output(trace: bool) -> None:
    source = "uint i = thread_position_in_grid.x;\n\n  o[2 * i] = a[i];"
    with fault(r"out-of-bounds write.*'o'.*source line 3.*thread \(17, 0, 0\)", trace=trace):
        run(source, {"a": ramp(33)}, {"o": ((33,), mx.float32)}, 33, 64)


@BOTH
def test_write_before_the_start_of_an_output(trace: bool) -> None:
    with fault("out-of-bounds write at byte -.* of 'o'|out-of-bounds write of 4 bytes at byte -", trace=trace):
        run("device float* p = o;\n p[int(thread_position_in_grid.x) - 1] = 0;", {}, {"o": ((33,), mx.float32)}, 33, 64)


def test_far_away_index_does_not_land_in_another_buffer() -> None:
    source = "o[thread_position_in_grid.x] = a[thread_position_in_grid.x * 10000000];"
    with fault("out-of-bounds read"):
        run(source, {"a": ramp(8), "b": mx.zeros((100000,))}, {"o": ((8,), mx.float32)}, 8, 8)


@BOTH
def test_write_to_an_input(trace: bool) -> None:
    source = "uint i = thread_position_in_grid.x;\n((device float*)a)[i] = 1; o[i] = 0;"
    with fault("write to an input: byte 0 of 'a'.*source line 2", trace=trace) as error:
        run(source, {"a": ramp(33)}, {"o": ((33,), mx.float32)}, 33, 64)
    assert error.value.kind == "input write"


@pytest.mark.parametrize("dtype", FLOATS)
def test_unwritten_memory_is_poison(dtype: mx.Dtype) -> None:
    source = """
        threadgroup T x[64];
        uint i = thread_position_in_grid.x;
        if (i < 20) x[i] = T(1);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (i != 5) o[i] = x[i];
    """
    (out,) = run(source, {}, {"o": ((64,), dtype)}, 64, 64, template=[("T", dtype)])
    expected = [i >= 20 or i == 5 for i in range(64)]
    assert np.isnan(values(out)).tolist() == expected


@pytest.mark.parametrize("where", ["threadgroup", "output"])
def test_read_of_unwritten_memory(where: str) -> None:
    source = """
        threadgroup float x[64];
        uint i = thread_position_in_grid.x;
        if (i < 20) x[i] = 1;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float y = THERE ? x[i] : o[i + 64];
        o[i] = y;
    """
    match = r"read of unwritten memory: .*source line 6.*thread \(" + r"\d+, 0, 0\)"
    with fault(match, trace=True):
        run(source, {}, {"o": ((128,), mx.float32)}, 64, 64, template=[("THERE", where == "threadgroup")])


def test_output_with_an_initial_value_may_be_read_and_is_counted() -> None:
    source = "uint i = thread_position_in_grid.x; if (i < 5) o[i] += 1;"
    with metal_host.options(trace=True):
        (out,) = run(source, {}, {"o": ((8,), mx.bfloat16)}, 8, 8, init_value=2)
        assert out.tolist() == [3.0] * 5 + [2.0] * 3
        run("if (thread_position_in_grid.x < 5) o[thread_position_in_grid.x] = 1;", {}, {"o": ((8,), mx.int64)}, 8, 8)
        assert metal_host.last_launch().buffers["o"].unwritten == 3 * 8


@BOTH
def test_index_beyond_a_threadgroup_array(trace: bool) -> None:
    source = "threadgroup float x[32], y[32];\nuint i = thread_position_in_grid.x;\nif (i == 31) x[i + 1] = 1;\n"
    source += "y[i] = i; o[i] = y[i];"
    with fault("array index 32 is out of bounds.*source line 3", trace=trace):
        run(source, {}, {"o": ((32,), mx.float32)}, 32, 32)


@BOTH
def test_pointer_beyond_a_threadgroup_array(trace: bool) -> None:
    source = "threadgroup float x[32], y[32];\nuint i = thread_position_in_grid.x;\nthreadgroup float* p = x + i;\n"
    source += "p[4] = 1; y[i] = p[4]; o[i] = y[i];"
    with fault("out-of-bounds write", trace=trace):
        run(source, {}, {"o": ((32,), mx.float32)}, 32, 32)


def test_index_beyond_a_private_array() -> None:
    source = "float x[4] = {0};\nuint i = thread_position_in_grid.x;\nx[i] = 1;\no[i] = x[i / 2];"
    with fault(r"array index 4 is out of bounds.*source line 3.*thread \(4, 0, 0\)"):
        run(source, {}, {"o": ((8,), mx.float32)}, 8, 8)


def test_integer_division_by_zero() -> None:
    with fault("division by zero.*source line 1"):
        run(
            "o[thread_position_in_grid.x] = 7 / a[thread_position_in_grid.x];",
            {"a": ramp(8, mx.int32)},
            {"o": ((8,), mx.int32)},
            8,
            8,
        )


@BOTH
def test_too_much_private_memory(trace: bool) -> None:
    source = "float x[40000]; uint i = thread_position_in_grid.x;"
    source += "for (int k = 0; k < 40000; k++) x[(k * 7 + i) % 40000] = k; o[i] = x[i];"
    with fault("private memory", trace=trace):
        run(source, {}, {"o": ((8,), mx.float32)}, 8, 8)


def test_more_than_32_kilobytes_of_threadgroup_memory() -> None:
    source = "threadgroup float x[N];\nthreadgroup half y;\nx[0] = 1; y = 2; o[0] = x[0] + y;"
    run(source, {}, {"o": ((1,), mx.float32)}, 1, 1, template=[("N", 8191)])
    assert metal_host.last_launch().threadgroup_memory == 32766
    with fault("32770 bytes of threadgroup memory.*source line 2") as error:
        run(source, {}, {"o": ((1,), mx.float32)}, 1, 1, template=[("N", 8192)])
    assert error.value.kind == "threadgroup memory"


def test_more_than_1024_threads() -> None:
    with pytest.raises(ValueError, match=r"planted.*1025.*1024"):
        run("o[0] = 1;", {}, {"o": ((1,), mx.float32)}, 1, 1025)


def test_more_buffers_than_metal_takes() -> None:
    kernel = metal_host.metal_kernel("planted", [f"a{i}" for i in range(31)], ["out"], "out[0] = a0;")
    with pytest.raises(ValueError, match=r"planted.*32 buffers.*31"):
        kernel(
            inputs=list(range(31)),
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
        )


def test_kernel_that_does_not_end() -> None:
    source = "uint n = 1;\nwhile (n & 1)\n  n += 2;\no[0] = n;"
    for trace in (False, True):
        with fault("0.2 s.*source line [23]", time_limit=0.2, trace=trace) as error:
            run(source.replace("n & 1", "n & a[0]"), {"a": ramp(8, mx.uint32) + 1}, {"o": ((1,), mx.uint32)}, 1, 1)
        assert error.value.kind == "time"


def test_the_process_survives_a_fault_and_can_go_on() -> None:
    for _ in range(3):
        with pytest.raises(MetalFault):
            run("o[thread_position_in_grid.x + 8] = 1;", {}, {"o": ((8,), mx.float32)}, 8, 8)
        (out,) = run("o[thread_position_in_grid.x] = 1;", {}, {"o": ((8,), mx.float32)}, 8, 8)
        assert out.sum().item() == 8


# ---- synchronisation ------------------------------------------------------------------------------------

REVERSE = """
    threadgroup float x[64];
    uint i = thread_position_in_threadgroup.x;
    x[i] = a[i];
    BARRIER
    o[i] = x[63 - i];
"""


def test_missing_barrier_shows_under_a_random_schedule() -> None:
    with metal_host.options(seed=1):
        (out,) = run(REVERSE.replace("BARRIER", ""), {"a": ramp(64)}, {"o": ((64,), mx.float32)}, 64, 64)
    assert np.isnan(np.array(out)).any()
    good = REVERSE.replace("BARRIER", "threadgroup_barrier(mem_flags::mem_threadgroup);")
    for seed in range(4):
        with metal_host.options(seed=seed, trace=seed > 1):
            (out,) = run(good, {"a": ramp(64)}, {"o": ((64,), mx.float32)}, 64, 64)
        assert out.tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_schedule_decides_what_a_missing_barrier_gives(seed: int) -> None:
    source = "threadgroup float x; uint i = thread_index_in_threadgroup;\n"
    source += "x = i; simdgroup_barrier(mem_flags::mem_none); o[i] = x;"
    results = []
    for each in (seed, seed, seed + 10):
        with metal_host.options(seed=each):
            results.append(run(source, {}, {"o": ((256,), mx.float32)}, 256, 256)[0].tolist())
    assert results[0] == results[1]
    assert results[0] != results[2]


@pytest.mark.parametrize(
    "barrier",
    ["", "simdgroup_barrier(mem_flags::mem_threadgroup);", "threadgroup_barrier(mem_flags::mem_none);"],
    ids=["none", "of the simdgroup", "without the flag"],
)
@pytest.mark.parametrize("seed", [0, 3])
def test_missing_barrier_is_a_race_in_trace_mode(barrier: str, seed: int) -> None:
    source = REVERSE.replace("BARRIER", barrier)
    with fault("data race: .* of a threadgroup variable", trace=True, seed=seed) as error:
        run(source, {"a": ramp(64)}, {"o": ((64,), mx.float32)}, 64, 64)
    assert error.value.kind == "race"
    assert "source line 6" in str(error.value)


def test_write_after_read_without_a_barrier_is_a_race() -> None:
    good = REVERSE.replace("BARRIER", "threadgroup_barrier(mem_flags::mem_threadgroup);")
    with fault("data race: .*source line 7", trace=True):
        run(good + "    x[i] = 2;", {"a": ramp(64)}, {"o": ((64,), mx.float32)}, 64, 64)


def test_simdgroup_barrier_orders_a_simdgroup() -> None:
    source = """
        threadgroup float x[64];
        uint i = thread_position_in_threadgroup.x;
        x[i] = a[i];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        float y = x[i ^ 31];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        x[i ^ 7] = y;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        o[i] = x[i];
    """
    with metal_host.options(trace=True, seed=2):
        (out,) = run(source, {"a": ramp(64)}, {"o": ((64,), mx.float32)}, 64, 64)
    assert out.tolist() == [float((i ^ 7) ^ 31) for i in range(64)]


def test_two_threadgroups_that_write_the_same_output() -> None:
    source = "uint i = thread_position_in_grid.x;\no[i / 2] = i;"
    with fault("data race: write.*'o'.*source line 2", trace=True) as error:
        run(source, {}, {"o": ((32,), mx.float32)}, 64, 1)
    assert "another threadgroup" in str(error.value)
    with fault("data race", trace=True, seed=1):
        run("o[0] = 1;", {}, {"o": ((1,), mx.float32)}, 64, 64)


def test_device_memory_needs_the_device_flag() -> None:
    source = "uint i = thread_index_in_threadgroup;\no[i] = i;\nthreadgroup_barrier(mem_flags::FLAG);\np[i] = o[i ^ 1];"
    outputs = {"o": ((64,), mx.float32), "p": ((64,), mx.float32)}
    with metal_host.options(trace=True):
        run(source.replace("FLAG", "mem_device"), {}, outputs, 64, 64)
        with fault("data race: read of .*'o'.*source line 4"):
            run(source.replace("FLAG", "mem_threadgroup"), {}, outputs, 64, 64)


def test_plain_access_beside_an_atomic_is_a_race() -> None:
    source = "threadgroup atomic_uint n;\natomic_store_explicit(&n, 0, memory_order_relaxed);\n"
    source += "o[thread_index_in_threadgroup] = *(threadgroup uint*)&n;"
    with fault("data race", trace=True):
        run(source, {}, {"o": ((64,), mx.uint32)}, 64, 64)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "if (i < 32)\n threadgroup_barrier(mem_flags::mem_none);",
            r"threadgroup_barrier is reached by 32 of 64 threads.*has returned",
        ),
        (
            "if (i == 40) return;\nthreadgroup_barrier(mem_flags::mem_none);",
            r"threadgroup_barrier is reached by 63 of 64.*\(40, 0, 0\) has ret",
        ),
        (
            "if (i < 40)\n threadgroup_barrier(mem_flags::mem_none);\nelse\n threadgroup_barrier(mem_flags::mem_none);",
            "threadgroup_barrier diverges",
        ),
        ("if (i == 3)\n o[i] = simd_sum(1);", "simd_sum is reached by 1 of 32 threads"),
        ("if (i & 1)\n o[i] = simd_sum(1);\nelse o[i] = simd_max(2);", "simd_.* diverges.*source line 4"),
        (
            "if (i < 7)\n simd_shuffle(i, 3); threadgroup_barrier(mem_flags::mem_none);",
            "simd_shuffle is reached by 7 of 32.*waits in threadgroup_barrier",
        ),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_divergence(source: str, message: str, seed: int) -> None:
    with fault(message, seed=seed) as error:
        run("uint i = thread_index_in_threadgroup;\n" + source, {}, {"o": ((64,), mx.int32)}, 64, 64)
    assert error.value.kind == "divergence"
    assert error.value.line and error.value.line.startswith("source line")


def test_simdgroup_matrix_in_a_partial_simdgroup() -> None:
    source = "simdgroup_float8x8 m;\nsimdgroup_load(m, a);\nsimdgroup_store(m, o + thread_index_in_threadgroup / 64);"
    with fault("simdgroup_matrix operation in a simdgroup of 8 threads.*source line 2"):
        run(source, {"a": ramp(64)}, {"o": ((64,), mx.float32)}, 8, 8)


def test_simdgroup_load_beyond_a_buffer_names_its_line() -> None:
    source = "threadgroup_barrier(mem_flags::mem_none);\nsimdgroup_float8x8 m;\nsimdgroup_load(m, a, 9);\n"
    source += "simdgroup_store(m, o);"
    with fault("out-of-bounds read.*'a'.*source line 3.*thread \\(\\d+, 0, 0\\)"):
        run(source, {"a": ramp(64)}, {"o": ((64,), mx.float32)}, 32, 32)


# ---- what Metal would not compile -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ("", "const float* p = &x; o[i] = *p;", r"`p` is a pointer or reference without an address space"),
        ("float f(const float& v) { return v; }", "o[i] = f(x);", r"`v` is a pointer or reference .*header line 1"),
        (
            "template <typename P>\nstruct S { P* p; };",
            "S<float> s; s.p = &x; o[i] = *s.p;",
            r"`p` is a pointer or reference .*header line 2",
        ),
        ("", "double d = x; o[i] = d;", "double"),
        ("int f(int n) { return n ? f(n - 1) : 0; }", "o[i] = f(i);", "`f` calls itself.*header line 1"),
        (
            "int g(int n);\nint f(int n) { return g(n); }\nint g(int n) { return n ? f(n - 1) : 0; }",
            "o[i] = f(i);",
            "calls itself",
        ),
        ("", "auto f = [](float v) { return v; }; o[i] = f(x);", "lambdas.*source line 2"),
        ("", "bfloat b = x; o[i] = b;", "implicit conversion from float to bfloat, source line 2"),
        (
            "bfloat f(float v) { return v * 2.0f; }",
            "o[i] = f(x);",
            "implicit conversion from float to bfloat, header line 1",
        ),
        ("", "bfloat b = bfloat(x); b += x; o[i] = b;", "implicit conversion from float to bfloat, source line 2"),
        ("", "simdgroup_float8x8 m; o[i] = m.thread_elements()[0];", r"thread_elements.*source line 2"),
        (
            "",
            "device float* p = o; threadgroup float* q = p; o[i] = q[0];",
            "source line 2.*threadgroup float.*device float",
        ),
        ("", "threadgroup float t = 0; o[i] = t;", "cannot have an initialiser, source line 2"),
        ("void f() { threadgroup float t[4]; }", "f(); o[i] = x;", "outside of a kernel function, header line 1"),
        ("", "o[i] = undeclared;", "source line 2.*undeclared"),
    ],
)
def test_not_metal(header: str, body: str, message: str) -> None:
    with pytest.raises(MetalCompileError, match=message) as error:
        run(
            f"uint i = thread_position_in_grid.x; float x = i;\n{body}",
            {},
            {"o": ((8,), mx.float32)},
            8,
            8,
            header=header,
        )
    assert "planted" in str(error.value)


def test_what_metal_allows_is_not_refused() -> None:
    header = """
        template <int N> inline int total(thread const int* v) { return v[0] + total<N - 1>(v + 1); }
        template <> inline int total<0>(thread const int* v) { return 0; }
        struct Pair {
            float a; float b;
            float sum() const { return a + b; }
        };
        template <typename T> inline void put(device T* to, threadgroup const T& from) { *to = from; }  // float* f
        constant float table[2] = {1.0f, 2.0f};
    """
    source = """
        threadgroup bfloat t[8];
        uint i = thread_position_in_grid.x;
        int v[3] = {1, 2, 3}; /* double and [](){} in comments */
        Pair p = {float(total<3>(v)), table[i & 1]};
        Pair q = p;
        t[i] = bfloat(q.sum());
        t[i] = t[i] * bfloat(2.0f);
        half h = static_cast<half>(t[i]);
        t[i] = static_cast<bfloat>(h);
        put(o + i, t[i]);
    """
    (out,) = run(source, {}, {"o": ((8,), mx.bfloat16)}, 8, 8, header=header)
    assert out.tolist() == [14.0, 16.0] * 4
