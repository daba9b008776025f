"""Measures one point of the memory benchmark in this process: one JSON line on standard output.

    python scripts/bench_memory_point.py '{"kind": "decode", "model": "synthetic", "cache": "full", …}'

``bench_memory.py`` starts one such process for each point, so that no point sees the memory, the
buffers or the compiled kernels of another. What is measured is described there.
"""

import contextlib
import ctypes
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from bench_memory_caches import Cache, Made, epoch
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import load

from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.host.probe import probe
from zm_mlx.state.layout import LayerShape

SYNTHETIC = "synthetic"
LLAMA2_7B = "llama2-7b-shape"
SHAPES: dict[str, dict[str, int]] = {  # of models with random weights
    SYNTHETIC: {
        "num_hidden_layers": 4,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "vocab_size": 1024,
    },
    LLAMA2_7B: {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
}
WARM_UP = 8  # tokens before the timed ones: kernels are compiled and compared, buffers are warm
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RUSAGE_INFO_V4 = 4


def load_model(name: str, seed: int, **changed: int) -> nn.Module:
    """A model by name, its weights not yet evaluated: one of SHAPES (or as ``changed``), or what mlx-lm loads."""
    if name not in SHAPES:
        return load(name, lazy=True)[0]
    mx.random.seed(seed)
    shape = {**SHAPES[name], **changed}
    made = llama.Model(llama.ModelArgs("llama", rms_norm_eps=1e-5, tie_word_embeddings=False, **shape))
    # MLX's CPU backend computes 16-bit matrix products far slower than float32 ones.
    made.set_dtype(mx.float32 if name == SYNTHETIC and mx.default_device() == mx.cpu else mx.float16)
    return made


def weights_bytes(model: nn.Module) -> int:
    return sum(x.nbytes for _, x in tree_flatten(model.parameters()))


def kv_bytes(caches: Sequence[Any]) -> int:
    return sum(c.nbytes for c in caches if not c.empty())


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Everything that is measured at one point."""
    model = load_model(point["model"], point["seed"])
    for _, x in tree_flatten(model.parameters()):  # one by one, or all temporaries exist at once
        mx.eval(x)
    mx.clear_cache()
    shapes = probe(model)
    run = decode if point["kind"] == "decode" else prefill
    return {"weights_bytes": weights_bytes(model), **run(model, shapes, Cache.parse(point["cache"]), point)}


def decode(model: nn.Module, shapes: list[LayerShape], cache: Cache, point: dict[str, Any]) -> dict[str, Any]:
    """Speed and memory of the last ``decode_tokens`` tokens of a context."""
    count, context = point["decode_tokens"], point["context"]
    made = cache.filled(model, shapes, context, context - count - WARM_UP, point["seed"])
    reset_peaks()
    first, token = made.compared[0], mx.array([[1]])

    def step() -> tuple[float, bool]:
        """The seconds of a token, and whether it compacted the cache, or grew its buffer."""
        nonlocal token
        before, begun = epoch(first), time.perf_counter()
        token = model(token, cache=made.caches)[:, -1:].argmax(axis=-1)
        mx.eval(token)
        return time.perf_counter() - begun, epoch(first) != before

    for _ in range(WARM_UP):
        step()
    steps = [step() for _ in range(count)]
    held = kv_bytes(made.caches)
    period = first.layout.staging if isinstance(first, ZeroMergeCache) else cache.period
    while len(steps) < count + period and not any(is_rare for _, is_rare in steps):
        steps.append(step())
    timed = [seconds for seconds, _ in steps[:count]]
    plain = [seconds for seconds, is_rare in steps if not is_rare]
    rare = [seconds for seconds, is_rare in steps if is_rare]
    low, median, high = statistics.quantiles(timed, n=4, method="inclusive") if count > 1 else timed * 3
    mean = statistics.fmean(timed)
    if plain and rare and period:
        usual = statistics.fmean(plain)
        mean = usual + (statistics.fmean(rare) - usual) / period
    return {
        "kv_bytes": held,
        **memory(),
        "decode_tps": 1 / median,
        "decode_tps_quartiles": [1 / high, 1 / low],
        "decode_spread": (high - low) / median,
        "decode_tps_mean": 1 / mean,
        "rare_tokens": len(rare),  # that compacted, or grew a buffer
        "rare_token_seconds": statistics.fmean(rare) if rare else None,
        "rare_token_period": period or None,
        "contents": "seeded random keys and values",
    }


def prefill(model: nn.Module, shapes: list[LayerShape], cache: Cache, point: dict[str, Any]) -> dict[str, Any]:
    """Time to the first token of a prompt of random tokens, and the memory that it takes."""
    length, step = point["context"], point["prefill_step_size"]
    vocabulary = model(mx.array([[0]])).shape[-1]
    mx.random.seed(point["seed"])
    prompt = mx.random.randint(0, vocabulary, (length,))
    generate_step = importlib.import_module("mlx_lm.generate").generate_step  # the package's name of it is a function

    def run(tokens: mx.array) -> tuple[Made, float]:
        made = cache.make(model, shapes, tokens.size, point["prefill"])
        mx.eval(tokens)
        begun, ended = time.perf_counter(), 0.0

        def progress(done: int, total: int) -> None:
            nonlocal ended
            if done == total:  # mlx-lm says so when the first token is there
                ended = time.perf_counter()

        # Without a second token, whose computation mlx-lm would start before the first is there.
        how = {"max_tokens": 0, "prompt_cache": made.caches, "prefill_step_size": step}
        for _ in generate_step(tokens, model, prompt_progress_callback=progress, **how):
            pass
        return made, ended - begun

    run(prompt[:WARM_UP])
    mx.clear_cache()
    reset_peaks()
    made, seconds = run(prompt)
    return {
        "kv_bytes": kv_bytes(made.caches),
        **memory(),
        "ttft_seconds": seconds,
        "prefill_tps": length / seconds,
        "contents": "seeded random tokens",
    }


# ---- memory


def reset_peaks() -> None:
    """Forget the peaks so far, where the system can (on macOS the process's stays one since its start)."""
    mx.reset_peak_memory()
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text("5")


def memory() -> dict[str, Any]:
    """What MLX holds and held, and what the system says of the process."""
    now, peak, kind = process_memory()
    return {
        "active_bytes": mx.get_active_memory(),
        "peak_bytes": mx.get_peak_memory(),
        "process_bytes": now,
        "process_peak_bytes": peak,
        "process_memory_is": kind,
    }


def process_memory() -> tuple[int | None, int | None, str]:
    """Memory of this process now, its highest, and which number it is."""
    if sys.platform == "darwin":
        return *_footprint(), "phys_footprint (peak since the start of the process)"
    try:
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak, "RSS"
    except (OSError, KeyError, ValueError):
        return None, None, "not known"


def _footprint() -> tuple[int | None, int | None]:
    """``ri_phys_footprint``, what macOS compares with its limits, and ``ri_lifetime_max_phys_footprint``.

    ``struct rusage_info_v4`` is 16 bytes of UUID, then 64-bit numbers, of which these are number 7
    and 28; the buffer has room for later versions of it.
    """
    words = (ctypes.c_uint64 * 64)()
    try:
        system = ctypes.CDLL("/usr/lib/libSystem.B.dylib")
        if system.proc_pid_rusage(os.getpid(), RUSAGE_INFO_V4, ctypes.byref(words)):
            return None, None
    except (OSError, AttributeError):
        return None, None
    return words[2 + 7], words[2 + 28]


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))), flush=True)
