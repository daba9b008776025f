"""Runs kernels written for `mx.fast.metal_kernel` on the CPU, from the very text that MLX generates.

    kernel = metal_host.metal_kernel(name=..., input_names=..., output_names=..., source=...)
    with metal_host.options(trace=True, seed=3), metal_host.record() as launches:
        (out,) = kernel(inputs=[a], grid=(256, 1, 1), threadgroup=(64, 1, 1), output_shapes=..., output_dtypes=...)
    print(launches[0].buffers["a"].read, launches[0].barriers)

`installed()` puts `metal_kernel` in the place of MLX's. clang compiles the text as C++ for OpenCL, where
address spaces are types as they are in Metal (`source.py`, `lint.py`, `compiler.py`, `include/`); threads
are fibers of one OS thread that change at barriers and simd operations (`src/`).

Faithful: the generated text, its address spaces and attributes; the grid with its clipped and partial
groups; copies for `ensure_row_contiguous`, judged by the strides that the CPU's arrays have; 32-wide simd
groups; IEEE float arithmetic without contraction; half and bfloat rounded at every operation.

Found in every launch: access out of a buffer, write to an input, array index out of bounds, divergent
barriers and simd operations, more than 32 KiB of threadgroup memory or 1,024 threads, integer division by
zero, loops without end (`time_limit`); in the source: pointers without address space, `double`, recursion,
lambdas, implicit conversion to bfloat, `thread_elements()`. Outputs and threadgroup memory begin as NaN.
Found with `trace=True`, to the byte and for every schedule: data races (the flags of barriers count, and
threadgroups are never ordered), reads of unwritten memory, access out of a threadgroup variable. A random
schedule (`seed`) runs threads and threadgroups in another order, which shows in the results of a race.

Not faithful:
- The order in which simd reductions and simdgroup matrices add (here a tree, and float sums over k from
  0 to 7 that are rounded once): compare with tolerances. Transcendental functions are those of libm, also
  under `fast::`; `math_mode="fast"` only defines the macro.
- The memory model beyond barriers: between two of them a thread runs alone, atomics are ordered, and nobody
  waits for another thread by spinning. Threadgroups run one after the other.
- Which lane holds which element of a simdgroup matrix. Lanes that have returned or took another branch make
  a simd operation an error, where a GPU goes on with the active ones. Shuffles from lanes that do not exist
  give NaN. With `transpose_matrix`, the origin is meant in memory's rows and columns.
- Speed, registers, occupancy and caches. Traffic counts what the optimised code requests, so it can change
  with the compiler. Alignment of vectors is not checked.
- Evaluation is eager: it works under `mx.grad`, not inside `mx.compile` or `mx.vmap`.
Not there: textures, complex numbers, quad-group functions, vectors of bool, `T(x)` between half and bfloat
(`static_cast<T>(x)` is there).

Hosts: Linux on x86-64 (with AVX2) and on arm64; the arm64 code has been compiled but never run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from .errors import MetalCompileError, MetalFault, MetalHostError
from .launch import BufferTraffic, LaunchStatistics, launch
from .source import Source, generated_text, mlx_metal_kernel

__all__ = [
    "BufferTraffic",
    "LaunchStatistics",
    "MetalCompileError",
    "MetalFault",
    "MetalHostError",
    "installed",
    "last_launch",
    "metal_kernel",
    "options",
    "record",
    "settings",
]


@dataclass
class Settings:
    """How launches run: `seed` 0 is the plain order of threads, any other number a random one.

    `time_limit` is in seconds of processor time for one launch.
    """

    seed: int = 0
    trace: bool = False
    time_limit: float = 300.0


settings = Settings()
_last: LaunchStatistics | None = None
_records: list[list[LaunchStatistics]] = []


@contextmanager
def options(
    *, seed: int | None = None, trace: bool | None = None, time_limit: float | None = None
) -> Iterator[Settings]:
    """Changes the settings for a while."""
    before = vars(settings).copy()
    changes = {"seed": seed, "trace": trace, "time_limit": time_limit}
    vars(settings).update({name: value for name, value in changes.items() if value is not None})
    try:
        yield settings
    finally:
        vars(settings).update(before)


@contextmanager
def record() -> Iterator[list[LaunchStatistics]]:
    """Collects the statistics of all launches made inside."""
    launches: list[LaunchStatistics] = []
    _records.append(launches)
    try:
        yield launches
    finally:
        _records[:] = [r for r in _records if r is not launches]


@contextmanager
def installed() -> Iterator[None]:
    """Puts `metal_kernel` in the place of `mx.fast.metal_kernel`."""
    before = mx.fast.metal_kernel
    mx.fast.metal_kernel = cast(Any, metal_kernel)
    try:
        yield
    finally:
        mx.fast.metal_kernel = before


def last_launch() -> LaunchStatistics:
    """The statistics of the latest launch that ended well."""
    if _last is None:
        raise MetalHostError("nothing was launched")
    return _last


class _Kernel:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._mlx: Any = mlx_metal_kernel(**arguments)
        self._sources: dict[Any, Source] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        global _last
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        source = self._source(arrays, output_shapes, output_dtypes, grid, threadgroup, template)
        if verbose:
            print(f"Generated source code for `{source.name}`:\n```\n{source.text}\n```")
        if (threads := threadgroup[0] * threadgroup[1] * threadgroup[2]) > 1024:
            raise ValueError(
                f"kernel '{source.name}': thread group size ({threads}) is greater than "
                "the maximum allowed threads per threadgroup (1024)"
            )
        if (buffers := len(source.parameters)) > 31:
            raise ValueError(f"kernel '{source.name}': {buffers} buffers, and Metal takes 31 at most")
        mx.eval(arrays)
        results, statistics = launch(
            source,
            dict(zip(self._arguments["input_names"], arrays, strict=True)),
            dict(zip(self._arguments["output_names"], zip(output_shapes, output_dtypes, strict=True), strict=True)),
            grid,
            threadgroup,
            self._arguments["ensure_row_contiguous"],
            init_value,
            settings.seed,
            settings.trace,
            settings.time_limit,
        )
        _last = statistics
        for launches in _records:
            launches.append(statistics)
        return results

    def _source(
        self,
        arrays: list[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None,
    ) -> Source:
        kinds = tuple((a.dtype, a.ndim == 0, a.size < 8) for a in arrays)
        key = (kinds, tuple(output_dtypes), len(output_shapes), tuple(template or ()))
        if key not in self._sources:

            def call(inputs: list[mx.array]) -> Any:
                return self._mlx(
                    inputs=inputs,
                    output_shapes=output_shapes,
                    output_dtypes=output_dtypes,
                    grid=grid,
                    threadgroup=threadgroup,
                    template=template,
                )

            text = generated_text(call, [(a.shape, a.dtype) for a in arrays])
            fast = (self._arguments.get("compile_options") or {}).get("math_mode") == "fast"
            self._sources[key] = Source(
                self._arguments["name"], text, self._arguments["header"], self._arguments["source"], fast
            )
        return self._sources[key]


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: dict[str, Any] | None = None,
) -> _Kernel:
    """A kernel to be called like one of `mx.fast.metal_kernel`, but run here and now, on the CPU."""
    arguments = {
        "name": name,
        "input_names": list(input_names),
        "output_names": list(output_names),
        "source": source,
        "header": header,
        "ensure_row_contiguous": ensure_row_contiguous,
        "atomic_outputs": atomic_outputs,
    }
    if compile_options is not None:
        arguments["compile_options"] = compile_options
    return _Kernel(arguments)
