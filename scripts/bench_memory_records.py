"""Results of the memory benchmark: a JSONL file of points, what identifies one, ratios and tables."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zm_mlx.report import size

OK = "ok"
OUT_OF_MEMORY = "out of memory"
FAILED = "failed"
KINDS = ("decode", "prefill")
REFERENCE = "full"  # the cache that ratios are against

ENVIRONMENT = ("machine", "blas", "kernels", "mlx", "mlx_lm", "zm_mlx")
SETTINGS = ("decode_tokens", "prefill_step_size", "prefill", "dtype", "seed", "veloxquant_mlx")
IDENTITY = ("model", "kind", "cache", "context", *SETTINGS, *ENVIRONMENT)

Record = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """One number of a point: its title, its key in a record, how it is printed, whether it has a ratio."""

    title: str
    key: str
    show: Callable[[float], str]
    compared: bool = True


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


METRICS = {
    "decode": (
        Metric("KV cache", "kv_bytes", size),
        Metric("peak memory (MLX)", "peak_bytes", size),
        Metric("peak memory of the process", "process_peak_bytes", size),
        Metric("tokens/s (median)", "decode_tps", _number),
        Metric("spread (quartiles)", "decode_spread", lambda x: f"{100 * x:.0f} %", compared=False),
        Metric("tokens/s (mean, with compactions and growth)", "decode_tps_mean", _number),
    ),
    "prefill": (
        Metric("time to first token", "ttft_seconds", lambda x: f"{x:.2f} s"),
        Metric("prompt tokens/s", "prefill_tps", _number),
        Metric("KV cache at the end", "kv_bytes", size),
        Metric("peak memory (MLX)", "peak_bytes", size),
        Metric("peak memory of the process", "process_peak_bytes", size),
    ),
}


def identity(record: Record) -> tuple[Any, ...]:
    """What must be equal for two records to be of one point."""
    return tuple(record.get(name) for name in IDENTITY)


def tokens(count: int) -> str:
    """A number of tokens as people write it: 4K is 4,096."""
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else f"{count}"


class Records:
    """The JSONL file of a benchmark: read once, then appended to.

    Lines that are no record (a process that was killed while it wrote) are left out; ``torn`` counts them.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[Record] = []
        self.torn = 0
        text = path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
        self._ends = not text or text.endswith("\n")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or record["kind"] not in KINDS:
                    raise ValueError(line)
                self.all.append(record)
            except (ValueError, KeyError):
                self.torn += bool(line.strip())

    def of(self, points: Iterable[Record]) -> dict[tuple[Any, ...], Record]:
        """The latest record of each of these points that has one."""
        wanted = {identity(p) for p in points}
        return {identity(r): r for r in self.all if identity(r) in wanted}

    def made_in(self, environment: Record) -> list[Record]:
        """Those of one machine and one set of versions."""
        return [r for r in self.all if all(r.get(name) == environment.get(name) for name in ENVIRONMENT)]

    def append(self, record: Record) -> None:
        """Add a record; it is in the file when this returns."""
        self.all.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("" if self._ends else "\n") + json.dumps(record) + "\n")
        self._ends = True


def ratios(records: Sequence[Record]) -> list[Record]:
    """Each measured point against the full cache's at the same place."""
    place = ("model", "kind", "context")
    full = {tuple(r[k] for k in place): r for r in records if r["cache"] == REFERENCE and r["status"] == OK}
    found = []
    for r in records:
        reference = full.get(tuple(r[k] for k in place))
        if reference is None or r["status"] != OK:
            continue
        pairs = {m.key: (r[m.key], reference[m.key]) for m in METRICS[r["kind"]] if m.compared}
        values = {key: round(a / b, 4) for key, (a, b) in pairs.items() if a is not None and b}
        found.append({**{k: r[k] for k in (*place, "cache")}, **values})
    return found


def tables(records: Sequence[Record]) -> list[str]:
    """One block for each model and kind, one table for each metric: caches down, contexts across."""
    against = {(r["model"], r["kind"], r["context"], r["cache"]): r for r in ratios(records)}
    lines: list[str] = []
    for model in dict.fromkeys(r["model"] for r in records):
        for kind in KINDS:
            mine = [r for r in records if (r["model"], r["kind"]) == (model, kind)]
            contexts = sorted({r["context"] for r in mine})
            for metric in METRICS[kind] if mine else ():
                lines += ["", f"{model}, {kind}: {metric.title}" + (", and ratio to full" if metric.compared else "")]
                lines.append(f"{'':<20}" + "".join(f"{tokens(c):>18}" for c in contexts))
                for cache in dict.fromkeys(r["cache"] for r in mine):
                    row = {r["context"]: r for r in mine if r["cache"] == cache}
                    cells = [_cell(row.get(c), against.get((model, kind, c, cache), {}), metric) for c in contexts]
                    lines.append(f"{cache:<20}" + "".join(f"{cell:>18}" for cell in cells))
    if any(r["status"] == OUT_OF_MEMORY and not r["measured"] for r in records):
        lines += ["", "no room: not run, weights and caches would not fit into the free memory"]
    return lines


def _cell(record: Record | None, ratio: Record, metric: Metric) -> str:
    if record is None:
        return "-"
    if record["status"] != OK:
        return "no room" if record["status"] == OUT_OF_MEMORY and not record["measured"] else record["status"]
    if record[metric.key] is None:
        return "not known"
    beside = f" {ratio[metric.key]:5.2f}x" if metric.compared and metric.key in ratio else ""
    return metric.show(record[metric.key]) + beside
