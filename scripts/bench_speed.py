"""What ZeroMerge's bookkeeping costs, against mlx-lm's caches in the same run.

    python scripts/bench_speed.py                      (everything; hours with MLX's own BLAS on Linux, see README)
    python scripts/bench_speed.py attention launches   (some of it)

Two caches take turns step by step, so that both see the same machine; a ratio is one of speeds or
times in one run, and the brackets hold its smallest and largest value over the rounds. A ZeroMerge
step is the median of the plain ones, and, each with its share of 1/S, of those that compact and of those
that come next, which bind what the compaction left.

attention  one layer while decoding (update, attention, scores, compaction) against mlx-lm's rotating
           cache with the same N, full of random rows, each step evaluated by itself
decode     the whole model of bench_memory.py: at equal N, and at 40,960 tokens with 5 % of the rows, there
           also with an MLP of 512 instead of 1,376, as what it takes is the same for all caches
fixed      the same N at 4K and at 64K
streaming  prefill of 10K and 40K tokens into 2,048 rows: time, peak memory, the full cache's time
scoring    an exact prefill against the full cache's
memory     5,000 decode steps: active memory, and what a step allocates besides
launches   operations of one decode step of one layer that compute or move data, by name
import     milliseconds of importing zm_mlx when mlx and mlx-lm are loaded

The last line is one JSON document.
"""

import argparse
import importlib
import io
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from bench_memory import environment
from bench_memory_caches import Cache, stream
from bench_memory_point import SYNTHETIC, load_model
from mlx_lm.models.cache import RotatingKVCache
from tqdm import tqdm

from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.host.caches import ROTATING_KEEP
from zm_mlx.host.hook import attention
from zm_mlx.host.probe import probe
from zm_mlx.policies import ZeroMerge
from zm_mlx.report import size
from zm_mlx.state.layout import LayerShape

DEFAULT_ROUNDS = 5
DEFAULT_SEED = 0
HEADS = 8
VIEWS = {"Slice", "Reshape", "Flatten", "Unflatten", "Squeeze", "ExpandDims", "Transpose", "Broadcast", "Depends"}

Row = dict[str, Any]


def measure_attention(rounds: int) -> list[Row]:
    """One layer: a ZeroMerge step against a rotating one with the same N."""
    found = []
    for dim in (64, 128):
        for rows in (512, 2048, 8192):
            rotating, ours = RotatingKVCache(rows, keep=ROTATING_KEEP), _streamed(rows, dim, 3 * rows)
            rotating.update_and_fetch(*_random(2, rows, dim))
            new = _random(3, 1, dim)
            mx.eval(rotating.state, new)
            steps = [_attention_step(c, new) for c in (rotating, ours)]
            seconds = _pairs(steps, ours, rounds, f"attention D {dim} N {rows}")
            found.append({"head_dim": dim, "rows": rows, **_compared(seconds, "rotating", "zeromerge")})
    return found


def _streamed(rows: int, dim: int, tokens: int) -> ZeroMergeCache:
    """The cache of one layer with N rows per head, after so many tokens."""
    cache = ZeroMergeCache(ZeroMerge().layout(rows, HEADS), policy=ZeroMerge())
    stream(cache, LayerShape(HEADS, dim, dim, 4, "float32"), tokens)
    return cache


def _attention_step(cache: Any, new: Sequence[mx.array]) -> Callable[[], None]:
    queries, keys, values = new
    scale = queries.shape[-1] ** -0.5

    def step() -> None:
        mx.eval(attention(queries, *cache.update_and_fetch(keys, values), cache, scale, None))

    return step


def measure_decode(rounds: int) -> list[Row]:
    """The whole model: at equal N, then at 40,960 tokens."""
    found = []
    long = ("full", "rotating:0.05", "quantized:8", "zeromerge:0.05")
    for names, context, intermediate in (
        (("rotating:512", "zeromerge:512"), 4096, 1376),
        (("rotating:2048", "zeromerge:2048"), 8192, 1376),
        (("rotating:8192", "zeromerge:8192"), 16384, 1376),
        (long, 40960, 1376),
        (long, 40960, 512),
    ):
        *others, ours = (_model_step(name, context, intermediate) for name in names)
        steps = [s for s, _ in (*others, ours)]
        seconds = _pairs(steps, ours[1], rounds if context < 40960 else 1, f"decode at {context}")
        for i, name in enumerate(names[:-1]):
            row = _compared([[r[i], r[-1]] for r in seconds], name, names[-1])
            found.append({"context": context, "intermediate": intermediate, **row})
    return found


def _model_step(name: str, context: int, intermediate: int = 1376) -> tuple[Callable[[], None], Any]:
    """A function that decodes a token with the synthetic model, and the first of its caches."""
    model = load_model(SYNTHETIC, DEFAULT_SEED, intermediate_size=intermediate)
    made = Cache.parse(name).filled(model, probe(model), context, context, DEFAULT_SEED)
    token = mx.array([[1]])

    def step() -> None:
        nonlocal token
        token = model(token, cache=made.caches)[:, -1:].argmax(axis=-1)
        mx.eval(token)

    step()
    return step, made.compared[0]


def measure_fixed(rounds: int) -> list[Row]:
    """2,048 rows after 4K and after 64K tokens."""
    short, long = (_model_step("zeromerge:2048", n) for n in (4096, 65536))
    seconds = _pairs([short[0], long[0]], long[1], rounds, "fixed N at 4K and 64K", first=short[1])
    return [_compared(seconds, "4K", "64K")]


def measure_streaming(_: int) -> list[Row]:
    """Time and peak memory of a long prompt in 2,048 rows."""
    runs = {(name, n): _prefill(name, n, 2048) for name, n in
            (("zeromerge:2048", 10240), ("zeromerge:2048", 40960), ("full", 40960))}  # fmt: skip
    short, long, full = runs.values()
    return [
        {
            "seconds": {f"{name} {n}": round(r[0], 2) for (name, n), r in runs.items()},
            "peak_bytes": {f"{name} {n}": r[1] for (name, n), r in runs.items()},
            "40K_over_10K_time": round(long[0] / short[0], 3),
            "40K_over_10K_peak": round(long[1] / short[1], 3),
            "full_over_zeromerge_time": round(full[0] / long[0], 3),
        }
    ]


def measure_scoring(rounds: int) -> list[Row]:
    """An exact prefill against the full cache's: what the scores of the last 512 queries and the compaction add."""
    found = []
    for length in (2048, 8192):
        for step in (512, 2048):
            pairs = [
                [_prefill(name, length, step, "exact")[0] for name in ("full", "zeromerge:0.05")]
                for _ in range(min(3, rounds))
            ]
            added = [ours / full - 1 for full, ours in pairs]
            seconds = round(statistics.median(full for full, _ in pairs), 2)
            found.append({"tokens": length, "step": step, "full_seconds": seconds, "added": _spread(added)})
    return found


def _prefill(name: str, length: int, step: int, prefill: Any = "streaming") -> tuple[float, int]:
    """Seconds to the first token, and peak memory beside the weights."""
    model = load_model(SYNTHETIC, DEFAULT_SEED)
    mx.eval(model.parameters())
    made = Cache.parse(name).make(model, probe(model), length, prefill)
    mx.random.seed(DEFAULT_SEED)
    prompt = mx.random.randint(0, model.args.vocab_size, (length,))
    mx.eval(prompt)
    mx.reset_peak_memory()
    before, begun = mx.get_active_memory(), time.perf_counter()
    generate_step = importlib.import_module("mlx_lm.generate").generate_step
    with tqdm(total=length, desc=f"{name} prefill of {length}, steps of {step}", leave=False) as bar:
        for _ in generate_step(
            prompt,
            model,
            max_tokens=1,
            prompt_cache=made.caches,
            prefill_step_size=step,
            prompt_progress_callback=lambda done, _: bar.update(done - bar.n),
        ):
            return time.perf_counter() - begun, mx.get_peak_memory() - before
    raise AssertionError("no token")


def measure_memory(_: int) -> list[Row]:
    """5,000 steps of one layer with 512 rows."""
    cache, new = _streamed(512, 64, 4096), _random(3, 1, 64)
    mx.eval(new)
    step = _attention_step(cache, new)
    for _ in range(2 * cache.layout.staging):
        step()
    active, beside = [], []
    for _ in tqdm(range(5000), desc="memory", leave=False):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        step()
        active.append(mx.get_active_memory())
        if cache.layer is not None and cache.layer.since_compaction > 1:  # 0 compacts, 1 turns the keys over
            beside.append(mx.get_peak_memory() - before)
    return [
        {
            "cache_bytes": cache.nbytes,
            "active_bytes": [min(active), max(active)],
            "step_allocates_at_most": max(beside),
            "keys_of_one_head": 512 * 64 * 4,
        }
    ]


def measure_launches(_: int) -> list[Row]:
    """Operations of a decode step of one layer, without those that only look at an array in another way."""
    found = []
    rotating = RotatingKVCache(512, keep=ROTATING_KEEP)
    rotating.update_and_fetch(*_random(2, 512, 64))
    caches = {"rotating:512": rotating, "zeromerge:512": _streamed(512, 64, 4096)}
    for name, cache in caches.items():
        new = _random(3, 1, 64)
        for _ in range(2):
            _attention_step(cache, new)()
        out = attention(new[0], *cache.update_and_fetch(*new[1:]), cache, 0.125, None)
        text = io.StringIO()
        mx.export_to_dot(text, out)
        names = Counter(re.findall(r'label ="(\w+)"', text.getvalue()))
        found.append({"cache": name, "operations": {k: n for k, n in sorted(names.items()) if k not in VIEWS}})
    return found


def measure_import(rounds: int) -> list[Row]:
    """Milliseconds, in fresh processes."""
    code = "import time, mlx.core, mlx_lm; t = time.perf_counter(); import zm_mlx; print(time.perf_counter() - t)"
    runs = [float(subprocess.check_output([sys.executable, "-c", code])) * 1e3 for _ in range(rounds)]
    return [{"milliseconds": _spread(runs)}]


# ---- pairs


def _pairs(
    steps: Sequence[Callable[[], None]], ours: ZeroMergeCache, rounds: int, name: str, first: Any = None
) -> list[list[float]]:
    """Seconds of a step of each, for each round; a round takes two compactions of the last one (``ours``)."""
    period = ours.layout.staging
    for step in steps:
        step()
    found = []
    for _ in tqdm(range(rounds), desc=name, leave=False):
        seconds: list[dict[str, list[float]]] = [{"plain": [], "compacts": [], "binds": []} for _ in steps]
        for _ in range(2 * period):
            for i, step in enumerate(steps):
                cache = ours if i == len(steps) - 1 else first
                begun = time.perf_counter()
                step()
                since = cache.layer.since_compaction if cache else None
                kind = {0: "compacts", 1: "binds"}.get(since, "plain")
                seconds[i][kind].append(time.perf_counter() - begun)
        found.append([_mean(s, period) for s in seconds])
    return found


def _mean(seconds: dict[str, list[float]], period: int) -> float:
    """Seconds of a step over a period, in which one compacts and one binds, from the medians of each kind."""
    usual, *rare = (statistics.median(x) if x else None for x in seconds.values())
    return usual + sum(x - usual for x in rare if x is not None) / period


def _compared(seconds: list[list[float]], other: str, ours: str) -> Row:
    """Times of a step, and how many times as fast ours is."""
    times = [statistics.median(r[i] for r in seconds) * 1e6 for i in (0, 1)]
    row = {f"{name}_us": round(t) for name, t in zip((other, ours), times, strict=True)}
    return {**row, "speed": _spread([a / b for a, b in seconds])}


def _spread(values: Sequence[float]) -> list[float]:
    """Median, smallest and largest."""
    return [round(x, 3) for x in (statistics.median(values), min(values), max(values))]


def _random(count: int, rows: int, dim: int) -> list[mx.array]:
    return [mx.random.normal((1, HEADS, rows, dim)) for _ in range(count)]


# ---- what is printed


MEASURES: dict[str, Callable[[int], list[Row]]] = {
    "attention": measure_attention,
    "decode": measure_decode,
    "fixed": measure_fixed,
    "streaming": measure_streaming,
    "scoring": measure_scoring,
    "memory": measure_memory,
    "launches": measure_launches,
    "import": measure_import,
}


def _shown(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{key}: " + ", ".join(_shown(k, v) for k, v in value.items())
    if key.endswith("bytes") and isinstance(value, int):
        return f"{key} {size(value)}"
    if isinstance(value, list) and len(value) == 3:
        return f"{key} {value[0]} [{value[1]} - {value[2]}]"
    return f"{key} {value}"


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"Some of {', '.join(MEASURES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS)
    return parser


def main() -> int:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if unknown := [name for name in args.measures if name not in MEASURES]:
        parser.error(f"there is no measure {unknown[0]!r}; choose from {', '.join(MEASURES)}")
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, not {args.rounds}")
    mx.random.seed(DEFAULT_SEED)
    found: dict[str, list[Row]] = {}
    facts = environment()
    print(", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)
    for name in args.measures or MEASURES:
        found[name] = MEASURES[name](args.rounds)
        for row in found[name]:
            print(f"{name:<10} " + ", ".join(_shown(k, v) for k, v in row.items()), flush=True)
    print(json.dumps({**facts, "rounds": args.rounds, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
