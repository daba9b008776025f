"""Finds a clang, builds the runtime and the kernels with it, and keeps what it built.

`ZM_MLX_METAL_HOST_CLANG` names a clang to use; otherwise it is the one of the `ziglang` package, so
that counts of traffic are the same everywhere, or else a clang >= 19 on the path.
`ZM_MLX_METAL_HOST_CACHE` is the folder of the compiled variants, from which nothing is ever removed.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from . import lint
from .errors import MetalCompileError, MetalHostError
from .source import Source

HERE = Path(__file__).parent
RUNTIME = ("scheduler", "simd", "memory", "trace")

KERNEL_FLAGS = (
    "-x clcpp -cl-std=clc++2021 -cl-no-stdinc -nostdinc -cl-single-precision-constant -O1 -ffp-contract=off "
    "-fno-vectorize -fno-slp-vectorize -fPIC -gdwarf-4 -gline-tables-only -fstack-clash-protection "
    "-fsanitize=array-bounds,integer-divide-by-zero -fno-sanitize-recover=all -ferror-limit=8 "
    # Vectors need no alignment, so that a buffer can end exactly at a guard page.
    "-fmax-type-align=1 "
    # Each half and bfloat operation rounds, as on a GPU.
    "-Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none "
    "-Xclang -cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space"
).split()
TRACE_FLAGS = (
    "-fsanitize=thread -mllvm -tsan-instrument-read-before-write=1 -mllvm -tsan-instrument-func-entry-exit=0 "
    "-fno-builtin -mllvm -disable-loop-idiom-all"
).split()
RUNTIME_FLAGS = (
    "-x c++ -std=c++17 -O2 -fPIC -fno-exceptions -fno-rtti -fno-threadsafe-statics -nostdinc++ -D_GNU_SOURCE"
).split()


HEADERS = '#include "msl.h"\n#include "mlx/backend/metal/kernels/utils.h"\n'


@dataclass(frozen=True)
class Toolchain:
    """How to call clang and the linker."""

    clang: tuple[str, ...]
    link: tuple[str, ...]
    release: str
    libc: tuple[str, ...]  # where the C headers are, if clang does not know

    @property
    def target(self) -> tuple[str, ...]:
        machine = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}.get(
            platform.machine().lower()
        )
        if machine is None or not sys.platform.startswith("linux"):
            raise MetalHostError(f"the executor runs on x86-64 and arm64 Linux, not on {platform.platform()}")
        cpu = ("-march=x86-64-v3",) if machine == "x86_64" else ("-march=armv8.2-a+fp16",)
        return ("-target", f"{machine}-linux-gnu", *cpu)


def _version(clang: tuple[str, ...]) -> tuple[int, str]:
    try:
        text = subprocess.run([*clang, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0, ""
    found = re.search(r"(?<!Apple )clang version (\d+)\.\S+", text)
    return (int(found.group(1)), found.group()) if found else (0, "")


@functools.cache
def toolchain() -> Toolchain:
    """The clang that is used by this process."""
    wanted = os.environ.get("ZM_MLX_METAL_HOST_CLANG")
    zig = importlib.util.find_spec("ziglang")
    if zig and zig.origin and not wanted:
        root = Path(zig.origin).parent
        clang = (str(root / "zig"), "clang")
        arch = "aarch64" if platform.machine() in ("aarch64", "arm64") else "x86"
        folders = (f"{arch}-linux-gnu", "generic-glibc", f"{arch}-linux-any", "any-linux-any")
        headers = [root / "lib/libc/include" / f for f in folders] + [root / "lib/include"]
        libc = ["-nostdlibinc", "-D__GLIBC_MINOR__=28"]
        for folder in headers:
            libc += ["-isystem", str(folder)]
        link = (str(root / "zig"), "ld.lld", "-shared")
        return Toolchain(clang, link, f"zig {_version(clang)[1]}", tuple(libc))
    names = [wanted] if wanted else ["clang", *(f"clang-{n}" for n in range(30, 18, -1))]
    for name in names:
        if path := shutil.which(name):
            major, release = _version((path,))
            if major >= 19:
                return Toolchain((path,), (path, "-shared"), release, ())
    raise MetalHostError("no clang >= 19 to run Metal source with: pip install ziglang==0.15.2")


def cache_folder() -> Path:
    """Where compiled variants are kept."""
    chosen = os.environ.get("ZM_MLX_METAL_HOST_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen) if chosen else base / "zm_mlx" / "metal_host"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _fingerprint() -> str:
    """Of everything that a compiled kernel depends on, other than its text and flags."""
    digest = hashlib.sha256(f"{toolchain()} {version('mlx')}".encode())
    for file in sorted(HERE.rglob("*")):
        if file.suffix in (".h", ".cpp", ".py") or file.parent.name == "include":
            digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def _cached(key: str, suffix: str, build: Callable[[Path], None]) -> Path:
    """The file of this key, built in a folder of its own and then moved: processes may race for it."""
    path = cache_folder() / (hashlib.sha256(f"{_fingerprint()} {key}".encode()).hexdigest()[:32] + suffix)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            build(made)
            os.replace(made, path)
    return path


def _run(command: list[str], text: str | None = None, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=folder, check=False)


def runtime_library() -> Path:
    """The scheduler and tracer, as a shared library."""

    def build(made: Path) -> None:
        tools = toolchain()
        sources = [str(HERE / "src" / f"{name}.cpp") for name in RUNTIME]
        done = _run([*tools.clang, *tools.target, *RUNTIME_FLAGS, *tools.libc, "-c", *sources], folder=made.parent)
        if done.returncode == 0:
            done = _run([*tools.link, "-o", str(made), *(f"{name}.o" for name in RUNTIME)], folder=made.parent)
        if done.returncode:
            raise MetalHostError(f"cannot build the executor's runtime:\n{done.stderr}")

    return _cached("runtime", ".so", build)


def _kernel_command() -> list[str]:
    includes: list[str] = []
    for folder in (HERE / "include", Path(str(mx.__file__)).parent / "include"):
        includes += ["-I", str(folder)]
    return [*toolchain().clang, *toolchain().target, *KERNEL_FLAGS, *includes]


def kernel_library(source: Source, trace: bool) -> Path:
    """The compiled kernel; raises MetalCompileError for what Metal would refuse."""
    headers = f"{'#define __FAST_MATH__ 1' * source.fast_math}\n{HEADERS}"
    text = f'typedef int {lint.MARKER};\n#line 1 "{source.name}"\n{source.translated}'

    def check(made: Path) -> None:
        command = [*_kernel_command(), *_precompiled(headers, [])]
        done = _run([*command, "-fsyntax-only", "-w", "-Xclang", "-ast-dump", "-"], text)
        if done.returncode:
            raise _compile_error(source, done.stderr)
        for line, what in lint.complaints(done.stdout):
            raise source.error(line, what)
        made.touch()

    def build(made: Path) -> None:
        flags = TRACE_FLAGS if trace else []
        command = [*_kernel_command(), *flags, *_precompiled(headers, flags)]
        done = _run([*command, "-w", "-c", "-", "-o", "kernel.o"], text, made.parent)
        if done.returncode == 0:
            done = _run([*toolchain().link, "-o", str(made), "kernel.o"], folder=made.parent)
        if done.returncode:
            raise _compile_error(source, done.stderr)

    _cached(headers + text, ".ok", check)
    return _cached(f"{KERNEL_FLAGS} {TRACE_FLAGS if trace else ''} {headers}{text}", ".so", build)


def _precompiled(headers: str, flags: list[str]) -> list[str]:
    """What makes a compilation with these flags begin with ``headers``: reading them takes a third of its time."""

    def build(made: Path) -> None:
        # Without time stamps: a package installed anew has other ones.
        options = ["-w", "-c", "-Xclang", "-emit-pch", "-Xclang", "-fno-pch-timestamp"]
        done = _run([*_kernel_command(), *flags, *options, "-", "-o", made.name], headers, made.parent)
        if done.returncode:
            raise MetalHostError(f"cannot compile the executor's headers:\n{done.stderr}")

    return ["-include-pch", str(_cached(f"{_kernel_command()} {flags} {headers}", ".pch", build))]


def _compile_error(source: Source, stderr: str) -> MetalCompileError:
    """clang's errors in the terms of the source, without its notes about the shim."""
    text = ""
    for block in re.split(r"^(?=\S+:\d+:\d+: )", stderr, flags=re.M):
        found = re.match(r"(\S+):(\d+):\d+: (?:fatal )?(error|note)", block)
        if found and (found.group(1) == source.name or found.group(3) == "error"):
            place = source.where(int(found.group(2))) if found.group(1) == source.name else Path(found.group(1)).name
            text += re.sub(r"^\S+:", f"{place}:".replace("\\", r"\\"), block)
    for opencl, metal in (
        ("global", "device"),
        ("local", "threadgroup"),
        ("private", "thread"),
        ("constant", "constant"),
    ):
        text = text.replace(f"__{opencl}", metal)
    return MetalCompileError(f"kernel '{source.name}' does not compile:\n{text or stderr}")
