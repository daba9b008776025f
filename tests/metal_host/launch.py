"""Runs one launch: copies buffers next to guard pages, calls the runtime, reads the outcome."""

import ctypes
import math
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import compiler
from .dwarf import LineTable
from .errors import MetalFault, MetalHostError
from .source import Source

NOWHERE = 2**32 - 1
_lock = threading.Lock()
_unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@dataclass
class BufferTraffic:
    """What trace mode counted for one input or output, in bytes and in 128-byte lines.

    A line counts once for a simdgroup until its lanes meet at a barrier or a simd operation. `space`
    is constant for inputs of fewer than 8 elements, which a GPU reads through another cache.
    """

    size: int
    space: str = "device"
    read: int = 0
    written: int = 0
    lines_read: int = 0
    lines_written: int = 0
    unwritten: int = 0


@dataclass
class LaunchStatistics:
    """One launch. Traffic is zero unless it was traced; copies are those of ensure_row_contiguous."""

    name: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    seed: int
    traced: bool
    threadgroups: int = 0
    barriers: int = 0
    simdgroup_barriers: int = 0
    simd_operations: int = 0
    atomics: int = 0
    threadgroup_memory: int = 0
    threadgroup_bytes_read: int = 0
    threadgroup_bytes_written: int = 0
    copies: int = 0
    copied_bytes: int = 0
    copied: list[str] = field(default_factory=list)
    buffers: dict[str, BufferTraffic] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def device_bytes_read(self) -> int:
        return sum(b.read for b in self.buffers.values() if b.space == "device")

    @property
    def device_bytes_written(self) -> int:
        return sum(b.written for b in self.buffers.values() if b.space == "device")

    @property
    def lines(self) -> int:
        return sum(b.lines_read + b.lines_written for b in self.buffers.values() if b.space == "device")


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("granule", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
        ("initialised", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("shadow", ctypes.c_void_p),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("lines_read", ctypes.c_uint64),
        ("lines_written", ctypes.c_uint64),
        ("bytes_unwritten", ctypes.c_uint64),
    ]


class _Fault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("site", ctypes.c_uint32),
        ("pc", ctypes.c_uint64),
        ("position", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("text", ctypes.c_char * 400),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("time_limit", ctypes.c_double),
        ("trace", ctypes.c_uint32),
        ("n_buffers", ctypes.c_uint32),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("fault", _Fault),
        ("threadgroups", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("simdgroup_barriers", ctypes.c_uint64),
        ("simd_operations", ctypes.c_uint64),
        ("atomics", ctypes.c_uint64),
        ("threadgroup_memory", ctypes.c_uint64),
        ("threadgroup_bytes_read", ctypes.c_uint64),
        ("threadgroup_bytes_written", ctypes.c_uint64),
    ]


COUNTERS = [item[0] for item in _Launch._fields_[9:]]


@cache
def _runtime() -> ctypes.CDLL:
    for needed in ("libm.so.6", "librt.so.1", "libpthread.so.0", "libdl.so.2"):
        ctypes.CDLL(needed, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(compiler.runtime_library()), mode=ctypes.RTLD_GLOBAL)
    library.mh_map.restype = ctypes.c_void_p
    library.mh_map.argtypes = [ctypes.c_uint64]
    library.mh_protect.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.mh_run.argtypes = [ctypes.POINTER(_Launch)]
    if library.mh_init():
        raise MetalHostError("the system refuses the address space that the executor needs")
    return library


@cache
def _kernel(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


@dataclass
class HostArray:
    """Bytes of an input as the kernel sees them, with its strides in elements."""

    name: str
    address: int
    size: int
    strides: tuple[int, ...]
    keep: Any
    offset: int = 0  # of the first element; not 0 for negative strides


def host_array(name: str, array: mx.array, contiguous: bool) -> tuple[HostArray, bool]:
    """The buffer of an input, and whether MLX would copy it for `ensure_row_contiguous`."""
    plain = array if array.dtype != mx.bfloat16 else array.view(mx.uint16)
    view = np.array(plain, copy=False) if array.size else np.zeros(array.shape, np.uint8)
    row_contiguous, expected = True, view.itemsize
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        row_contiguous &= size == 1 or stride == expected
        expected *= size
    copied = contiguous and not row_contiguous
    if copied:
        view = np.ascontiguousarray(view)
    steps = [(size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)]
    low = sum(s for s in steps if s < 0)
    high = sum(s for s in steps if s > 0) + view.itemsize if array.size else 0
    strides = tuple(stride // view.itemsize for stride in view.strides)
    address = view.__array_interface__["data"][0]
    return HostArray(name, address + low, high - low, strides, (plain, view), -low), copied


def launch(
    source: Source,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[Sequence[int], mx.Dtype]],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    contiguous: bool,
    init_value: float | None,
    seed: int,
    trace: bool,
    time_limit: float,
) -> tuple[list[mx.array], LaunchStatistics]:
    """Runs the kernel over the grid; raises MetalFault."""
    started = time.perf_counter()
    if trace not in source.libraries:
        source.libraries[trace] = compiler.kernel_library(source, trace)
    library_path = source.libraries[trace]
    group = tuple(min(a, b) for a, b in zip(threadgroup, grid, strict=True))
    statistics = LaunchStatistics(source.name, grid, (group[0], group[1], group[2]), seed, trace)
    host: dict[str, HostArray] = {}
    for name, array in inputs.items():
        host[name], copied = host_array(name, array, contiguous)
        if copied:
            statistics.copies += 1
            statistics.copied_bytes += array.nbytes
            statistics.copied.append(name)
    with _lock:
        results = _run(source, library_path, inputs, outputs, host, init_value, statistics, time_limit)
    statistics.seconds = time.perf_counter() - started
    return results, statistics


def _run(
    source: Source,
    library_path: Path,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[Sequence[int], mx.Dtype]],
    host: dict[str, HostArray],
    init_value: float | None,
    statistics: LaunchStatistics,
    time_limit: float,
) -> list[mx.array]:
    runtime = _runtime()
    table = (_Buffer * len(source.parameters))()
    try:
        for buffer, parameter in zip(table, source.parameters, strict=True):
            name = parameter.name
            buffer.name = name.encode()
            if name in outputs:
                shape, dtype = outputs[name]
                size = math.prod(shape) * dtype.size
                buffer.base, buffer.size = runtime.mh_map(size), size
                buffer.writable, buffer.granule = 1, min(dtype.size, 4)
                if init_value is None:
                    ctypes.memset(buffer.base, 0xFF, size)
                else:
                    buffer.initialised = 1
                    value = mx.full((1,), init_value, dtype).view(_unsigned[dtype.size])
                    pattern = np.full(math.prod(shape), np.array(value))
                    ctypes.memmove(buffer.base, pattern.ctypes.data, size)
                continue
            item = host[name] if name in host else _metadata(name, inputs, host)
            buffer.base, buffer.size, buffer.granule = runtime.mh_map(item.size), item.size, 1
            if item.size:
                ctypes.memmove(buffer.base, item.address, item.size)
            runtime.mh_protect(buffer.base, item.size)
            buffer.base += item.offset
        if 0 not in statistics.grid:
            _call(source, library_path, table, statistics, time_limit)
        for buffer, parameter in zip(table, source.parameters, strict=True):
            if parameter.name in inputs or parameter.name in outputs:
                statistics.buffers[parameter.name] = BufferTraffic(
                    buffer.size, parameter.space, buffer.bytes_read, buffer.bytes_written,
                    buffer.lines_read, buffer.lines_written, buffer.bytes_unwritten,
                )  # fmt: skip
        by_name = {p.name: b for p, b in zip(source.parameters, table, strict=True)}
        return [_result(by_name[name], shape, dtype) for name, (shape, dtype) in outputs.items()]
    finally:
        runtime.mh_unmap_all()


def _metadata(name: str, inputs: dict[str, mx.array], host: dict[str, HostArray]) -> HostArray:
    """MLX's `<input>_shape`, `_strides` and `_ndim`."""
    owner, _, what = name.rpartition("_")
    array = inputs[owner]
    if what == "shape":
        values = np.array(array.shape, np.int32)
    elif what == "strides":
        values = np.array(host[owner].strides, np.int64)
    else:
        values = np.array([array.ndim], np.int32)
    return HostArray(name, values.ctypes.data, values.nbytes, (), values)


def _result(buffer: _Buffer, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    if not buffer.size:
        return mx.zeros(shape, dtype)
    kind = np.dtype(f"u{dtype.size}")
    raw = np.frombuffer((ctypes.c_char * buffer.size).from_address(buffer.base), kind)
    return mx.array(raw).reshape(shape).view(dtype)


def _call(source: Source, library_path: Path, table: Any, statistics: LaunchStatistics, time_limit: float) -> None:
    call = _Launch()
    call.entry = ctypes.cast(_kernel(library_path).mh_entry, ctypes.c_void_p).value
    call.grid[:], call.group[:] = statistics.grid, statistics.threadgroup
    call.seed, call.trace = statistics.seed, statistics.traced
    call.time_limit = time_limit
    call.n_buffers, call.buffers = len(table), table
    failed = _runtime().mh_run(ctypes.byref(call))
    for name in COUNTERS:
        setattr(statistics, name, getattr(call, name))
    if failed:
        raise _explain(source, library_path, call.fault, statistics)


def _explain(source: Source, library_path: Path, fault: _Fault, statistics: LaunchStatistics) -> MetalFault:
    lines = LineTable(library_path)

    def line_of(pc: int) -> str | None:
        found = lines.find(pc - 1)
        return source.where(found[1]) if found and found[0].endswith(source.name) else None

    where = line_of(fault.pc) if fault.pc else None
    if where is None and fault.site:
        where = source.where(fault.site >> 8)
    text = fault.text.decode(errors="replace")
    text = re.sub(r"@L(\d+)@", lambda m: f"at {source.where(int(m.group(1)))}", text)
    text = re.sub(r"@P([0-9a-f]+)@", lambda m: f"at {line_of(int(m.group(1), 16)) or 'an unknown line'}", text)
    who = []
    if fault.position[0] != NOWHERE:
        who.append(f"thread {tuple(fault.position)}")
    if fault.group[0] != NOWHERE:
        who.append(f"threadgroup {tuple(fault.group)}")
    message = f"kernel '{source.name}': {text}"
    message += f"; {where}" if where else ""
    message += f"; {' of '.join(who)}" if who else ""
    message += f"; seed {statistics.seed}" if statistics.seed else ""
    return MetalFault(message, MetalFault.KINDS[fault.kind], where)
