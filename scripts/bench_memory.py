"""Memory and speed of KV caches against the length of the context.

    python scripts/bench_memory.py                     (a synthetic model: runs anywhere, downloads nothing)
    python scripts/bench_memory.py --quick             (two minutes on two slow CPU cores)
    python scripts/bench_memory.py --llama2-7b-shape   (LLaMA-2-7B with random weights: 13 GB, and its caches)
    python scripts/bench_memory.py --model mlx-community/Llama-2-7b-chat-mlx --caches full zeromerge:2048

First comes a static card: what each cache should hold at each context. Then each point, that is a
model, a cache, a context and a kind, is measured in a process of its own:

decode   The caches are filled with seeded random keys and values, as a context would leave them, and
         the last tokens of the context (--decode-tokens) are decoded one by one, greedily, by the real
         model, each evaluated before the next begins: KV bytes at the end, MLX's active and peak memory,
         memory of the process, tokens/s as the median with quartiles. A ZeroMerge cache compacts every
         S tokens and mlx-lm's buffers grow every 256: if no timed token did so, decoding goes on to the
         first that does, and the mean tokens/s has its share of it. (Filling spares the prefill. What
         keys and values say does not change what they cost.)
prefill  A prompt of random tokens through mlx-lm's generate_step: time to the first token, prompt
         tokens/s, and peak memory with the chunks of the prompt in it.

Not measured: quality (nothing here says that the tokens are any good), batches, and the pipelining of
mlx-lm's generation. Layers with a sliding window keep mlx-lm's own caches, which start empty in decode
points. Memory of the process is RSS on Linux and phys_footprint on macOS, which also counts the GPU's;
both include buffers that MLX keeps for reuse. A speed holds for the machine that ran it and for no other.

A point that would not fit (weights and caches against the free memory) is not started, since an
overcommitted GPU can take a Mac down: it is recorded as out of memory, not measured. Results are
appended to --output as they come; the same command continues where it was stopped. The table goes to
standard output, progress to standard error; the last line is one JSON document.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import bench_memory_figure as figure
import bench_memory_point as point
import mlx.core as mx
from bench_memory_caches import VELOXQUANT, Cache, has_veloxquant
from bench_memory_records import (
    FAILED,
    IDENTITY,
    KINDS,
    OK,
    OUT_OF_MEMORY,
    Record,
    Records,
    identity,
    ratios,
    tables,
    tokens,
)
from tqdm import tqdm

from zm_mlx.doctor import machine
from zm_mlx.errors import UnsupportedModelError, UserError
from zm_mlx.host.memory import free_bytes
from zm_mlx.host.probe import probe
from zm_mlx.interrupts import INTERRUPTED
from zm_mlx.ops import choose
from zm_mlx.report import size
from zm_mlx.state.layout import LayerShape

DEFAULT_CACHES = (
    "full quantized:8 quantized:4 rotating:0.05 rotating:2048 zeromerge:0.05 zeromerge:0.10 zeromerge:2048".split()
)
DEFAULT_CONTEXTS = [1024 * 2**i for i in range(7)]  # 1K to 64K
DEFAULT_PREFILL_LENGTHS = DEFAULT_CONTEXTS[:4]  # on a CPU; all of them where there is a GPU
DEFAULT_DECODE_TOKENS = 64
DEFAULT_PREFILL_STEP_SIZE = 2048
DEFAULT_PREFILL = "streaming"
DEFAULT_SEED = 0
DEFAULT_OUTPUT = "bench_memory.jsonl"
QUICK = {
    "caches": ["full", "quantized:4", "rotating:0.10", "zeromerge:0.10"],
    "contexts": [1024, 4096, 16384],
    "prefill_lengths": [128, 512],
    "decode_tokens": 32,
}
POINT = Path(point.__file__)
# What MLX's allocators and the C++ and Python runtimes say; Linux and macOS kill without a word.
NO_MEMORY = (
    "unable to allocate",
    "insufficient memory",
    "out of memory",
    "outofmemory",
    "maximum allowed buffer size",
    "bad_alloc",
    "memoryerror",
)


@dataclass(frozen=True)
class Subject:
    """A model, as far as points and the card need it."""

    name: str
    shapes: list[LayerShape]
    weights_bytes: int

    @property
    def dtype(self) -> str:
        return self.shapes[0].dtype.rpartition(".")[2]


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = _usage_error  # type: ignore[method-assign]
    parser.add_argument("--model", action="append", help="Local folder or Hugging Face repository; repeatable")
    parser.add_argument("--llama2-7b-shape", action="store_true", help="LLaMA-2-7B in float16 with random weights")
    parser.add_argument("--caches", nargs="+", metavar="NAME", help=f"Default: {' '.join(DEFAULT_CACHES)}")
    parser.add_argument("--contexts", nargs="*", type=_tokens, metavar="N", help="Of decode points; 4K is 4096")
    parser.add_argument("--prefill-lengths", nargs="*", type=_tokens, metavar="N", help="Of prefill points")
    parser.add_argument("--decode-tokens", type=int, help=f"Timed tokens (default {DEFAULT_DECODE_TOKENS})")
    parser.add_argument("--prefill-step-size", type=int, default=DEFAULT_PREFILL_STEP_SIZE, help="As in mlx-lm")
    parser.add_argument("--prefill", choices=["streaming", "exact"], default=DEFAULT_PREFILL, help="Of ZeroMerge")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--output", type=Path, default=Path(DEFAULT_OUTPUT), help=f"Default: {DEFAULT_OUTPUT}")
    parser.add_argument("--figure", type=Path, help="Figure without its suffix (default: beside --output)")
    parser.add_argument("--no-figure", action="store_true")
    parser.add_argument("--card", action="store_true", help="Print the static card and measure nothing")
    parser.add_argument("--quick", action="store_true", help="Few short points; other flags still count")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    try:
        args = setup_arg_parser().parse_args(argv)
        _complete(args)
        caches = [_cache(name) for name in args.caches]
        subjects = [_subject(name, args.seed) for name in args.model]
        print("\n".join(line for s in subjects for line in card(s, caches, args)), flush=True)
        return 0 if args.card else _bench(args, caches, subjects)
    except UserError as error:
        print(f"bench_memory: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench_memory: interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED


def _bench(args: argparse.Namespace, caches: list[Cache], subjects: list[Subject]) -> int:
    points = [p for s in subjects for p in _points(args, caches, s)]
    try:
        records = Records(args.output)
        args.output.touch()
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror or error}") from error
    done = records.of(points)
    todo = [p for p in points if identity(p) not in done or done[identity(p)]["status"] == FAILED]
    _say_what_is_there(args, records, points, len(todo))
    by_name = {s.name: s for s in subjects}
    interrupted = False
    bar = tqdm(total=len(points), initial=len(points) - len(todo), unit="point", desc="Measuring")
    try:
        for p in todo:
            bar.set_postfix_str(f"{p['kind']} {p['cache']} at {tokens(p['context'])}")
            record = {**p, **_result(p, by_name[p["model"]])}
            records.append(record)
            if record["status"] == FAILED:
                bar.write(f"failed: {p['kind']} {p['cache']} at {tokens(p['context'])}: {record['reason']}", sys.stderr)
            bar.update()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
    found = records.of(points)
    mine = [found[i] for i in map(identity, points) if i in found]
    print("\n".join(tables(mine)))
    count = Counter(r["status"] for r in mine)
    drawn = [] if args.no_figure else _draw(args, mine)
    if interrupted:
        print(f"\ninterrupted with {len(mine)} of {len(points)} points; the same command resumes")
    document = {
        **environment(),
        "interrupted": interrupted,
        "counts": dict(count),
        "figures": [str(path) for path in drawn],
        "points": mine,
        "ratios": ratios(mine),
    }
    print(json.dumps(document), flush=True)
    return INTERRUPTED if interrupted else 1 if count[FAILED] else 0


# ---- points


def _points(args: argparse.Namespace, caches: list[Cache], subject: Subject) -> list[Record]:
    """Decode points, then prefill points, short contexts first: what is there early is comparable."""
    shared = {**environment(), "model": subject.name, "dtype": subject.dtype, "seed": args.seed}
    found = []
    for kind, lengths in zip(KINDS, (args.contexts, args.prefill_lengths), strict=True):
        for context in lengths:
            for cache in caches:
                own: Record = {**shared, "kind": kind, "cache": cache.name, "context": context}
                if kind == "decode":
                    own["decode_tokens"] = args.decode_tokens
                    own["predicted_kv_bytes"] = cache.holds(subject.shapes, context, _decoded(args))
                    own["predicted_need_bytes"] = subject.weights_bytes + own["predicted_kv_bytes"]
                else:
                    own["prefill_step_size"] = args.prefill_step_size
                    own["prefill"] = args.prefill if cache.family == "zeromerge" else None
                    need = cache.prefill_holds(subject.shapes, context, args.prefill_step_size, args.prefill)
                    own["predicted_need_bytes"] = subject.weights_bytes + need
                own["veloxquant_mlx"] = version("VeloxQuant-MLX") if cache.family == "veloxquant" else None
                # What identifies a point comes first in its line.
                found.append({**{name: own.get(name) for name in IDENTITY}, **own})
    return found


def environment() -> Record:
    """The machine and the versions that a result holds for."""
    facts, device = machine(), mx.default_device().type.name
    preloaded = [Path(p).name for p in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        # Without the kernel's release, which changes with every update.
        "machine": f"{facts['chip']}, {cores} cores, {facts['system'].partition('-')[0]}, {device.upper()}",
        "blas": " ".join(p for p in preloaded if "blas" in p.lower()) or None,
        "kernels": "metal" if choose.has_metal() and choose.mode() != "ops" else "ops",
        "mlx": facts["mlx"],
        "mlx_lm": facts["mlx-lm"],
        "zm_mlx": facts["zm_mlx"],
    }


def _result(p: Record, subject: Subject) -> Record:
    """Measure a point in a process of its own, if it fits."""
    free, need = free_bytes(), p["predicted_need_bytes"]
    if free is not None and need > free:
        reason = f"weights and caches take {size(need)}, {size(free)} are free"
        return {"status": OUT_OF_MEMORY, "measured": False, "reason": reason, "free_bytes": free}
    out, err, code = _run(p)
    last = err.strip().splitlines()[-1] if err.strip() else f"the process ended with code {code} and no message"
    if code == 0:
        try:
            return {"status": OK, "measured": True, **json.loads(out.splitlines()[-1]), "free_bytes": free}
        except (IndexError, ValueError):
            return {"status": FAILED, "measured": True, "reason": f"no result: {last}"}
    if code == -signal.SIGKILL:
        last = "killed by the system"
    elif not (code == -signal.SIGSEGV and _limited()) and not any(words in err.lower() for words in NO_MEMORY):
        return {"status": FAILED, "measured": True, "reason": last}
    return {"status": OUT_OF_MEMORY, "measured": True, "reason": last, "free_bytes": free}


def _run(p: Record) -> tuple[str, str, int]:
    command = [sys.executable, str(POINT), json.dumps(p)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        return *process.communicate(), process.returncode
    finally:
        process.kill()  # does nothing unless Ctrl-C came
        process.wait()


def _limited() -> bool:
    """Whether the address space has a limit: MLX's CPU backend then writes to the null that malloc returns."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


# ---- what is printed


def card(subject: Subject, caches: Sequence[Cache], args: argparse.Namespace) -> list[str]:
    """What each cache should hold, from shapes alone."""
    contexts, decoded = (args.contexts, _decoded(args)) if args.contexts else (args.prefill_lengths, 0)
    first, layers = subject.shapes[0], len(subject.shapes)
    token = sum(s.token_bytes for s in subject.shapes)
    lines = [
        f"{subject.name}: {layers} layers x {first.heads} KV heads x head dim {first.head_dim}, {subject.dtype}, "
        f"weights {size(subject.weights_bytes)}, {size(token)} of keys and values a token",
        f"{'should hold':<20}" + "".join(f"{tokens(c):>18}" for c in contexts),
    ]
    for cache in caches:
        try:
            held = [(cache.holds(subject.shapes, c, decoded), c * token) for c in contexts]
        except ValueError as error:
            raise UserError(f"--caches {cache}: {error}") from error
        lines.append(f"{cache.name:<20}" + "".join(f"{f'{size(a)} {a / b:5.2f}x':>18}" for a, b in held))
    if first.itemsize > 2 and any(c.family == "veloxquant" for c in caches):
        lines.append("(VeloxQuant-MLX stores 16-bit numbers, also of a float32 model)")
    lines.append("(x: of the keys and values of all tokens)")
    if args.contexts:
        lines.append("(decode points: caches are filled with seeded random keys and values, not by a prefill)")
    return lines


def _say_what_is_there(args: argparse.Namespace, records: Records, points: list[Record], todo: int) -> None:
    foreign = len(records.all) - len(records.made_in(environment()))
    if records.all:
        print(f"{args.output}: {len(points) - todo} of {len(points)} points are done, {todo} are to be measured")
    if foreign:
        print(f"{args.output}: {foreign} records of another machine, version or setup of MLX are ignored")
    if records.torn:
        print(f"{args.output}: {records.torn} lines are no records (a run that was killed?) and are ignored")
    sys.stdout.flush()


def _draw(args: argparse.Namespace, records: list[Record]) -> list[Path]:
    stem = args.figure or args.output.with_suffix("")
    try:
        return figure.draw(records, stem)
    except figure.NoMatplotlib as error:
        print(f"\nno figure: {error}")
    except OSError as error:
        print(f"\nno figure: {stem}: {error.strerror or error}")
    return []


# ---- flags


def _complete(args: argparse.Namespace) -> None:
    """Fill in defaults and check what needs no model."""
    lengths = DEFAULT_CONTEXTS if mx.default_device() == mx.gpu else DEFAULT_PREFILL_LENGTHS
    veloxquant = [f"veloxquant:{method}" for method in VELOXQUANT] if has_veloxquant() else []
    usual = {
        "caches": [*DEFAULT_CACHES, *veloxquant],
        "contexts": DEFAULT_CONTEXTS,
        "prefill_lengths": lengths,
        "decode_tokens": DEFAULT_DECODE_TOKENS,
    }
    for name, value in {**usual, **(QUICK if args.quick else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("caches", "contexts", "prefill_lengths"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    args.model = list(dict.fromkeys((args.model or []) + [point.LLAMA2_7B] * args.llama2_7b_shape)) or [point.SYNTHETIC]
    for name in ("decode_tokens", "prefill_step_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    if not args.contexts and not args.prefill_lengths:
        raise UserError("--contexts and --prefill-lengths are both empty: give one of them a length")
    if args.contexts and min(args.contexts) <= _decoded(args):
        raise UserError(
            f"--contexts {min(args.contexts)} is too short for the {_decoded(args)} tokens that are decoded in it: "
            "give a longer one, or fewer --decode-tokens"
        )
    if args.figure is not None and args.figure.suffix in figure.SUFFIXES:
        args.figure = args.figure.with_suffix("")


def _decoded(args: argparse.Namespace) -> int:
    return int(args.decode_tokens) + point.WARM_UP


def _cache(name: str) -> Cache:
    try:
        return Cache.parse(name)
    except ValueError as error:
        raise UserError(f"--caches {name}: {error}") from error


def _subject(name: str, seed: int) -> Subject:
    """Look at a model without evaluating its weights."""
    try:
        model = point.load_model(name, seed)
    except Exception as error:  # the loader, the Hub's client and the network fail in many ways
        raise UserError(f"--model {name}: cannot be loaded; check the name and the network ({error})") from error
    try:
        return Subject(name, probe(model), point.weights_bytes(model))
    except UnsupportedModelError as error:
        raise UserError(f"--model {name}: {error}") from error


def _tokens(text: str) -> int:
    """A number of tokens: 4096 or 4K."""
    number, unit = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens (4096 or 4K)")
    return int(number) * unit


def _usage_error(message: str) -> NoReturn:
    raise UserError(f"{message} (--help lists the flags)")


if __name__ == "__main__":
    sys.exit(main())
