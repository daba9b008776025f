"""The figure of the memory benchmark: memory, decode speed and prefill time against the context, log-log.

    python scripts/bench_memory_figure.py bench_memory.jsonl            (bench_memory.png and bench_memory.svg)
    python scripts/bench_memory_figure.py bench_memory.jsonl --figure paper/memory

As wide as two columns of a paper; one figure for each model of the file. ``bench_memory.py`` draws the
same one at its end. Decode speed is the mean with compactions and growth of buffers in it. A cross
marks where a cache ran out of memory.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_memory_records import KINDS, OK, OUT_OF_MEMORY, Record, Records, identity, tokens

from zm_mlx.report import size

SUFFIXES = (".png", ".svg")
WIDTH, HEIGHT = 7.16, 3.1  # inches; two columns of a paper
DPI = 200
REMEDY = "matplotlib is not installed: pip install -e '.[bench]'"
# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = {
    "full": "#000000",
    "quantized": "#CC79A7",
    "rotating": "#E69F00",
    "zeromerge": "#0072B2",
    "veloxquant": "#009E73",
}
NAMES = {"full": "full", "quantized": "quantized", "rotating": "rotating", "zeromerge": "ZeroMerge"}
OURS = "zeromerge"
BUDGETED = ("rotating", "zeromerge")
# Line and marker tell the caches of one family apart, and are the same for the same budget in all families.
STYLES: tuple[tuple[Any, str], ...] = (("-", "o"), ((0, (4, 1.5)), "s"), ((0, (1.2, 1)), "^"))
FIXED = 2  # of STYLES, for budgets in rows
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "zm_mlx",
}
PANELS = (  # kind, key, title, label of the axis
    ("decode", "kv_bytes", "Memory", "KV cache"),
    ("decode", "decode_tps_mean", "Decode speed", "tokens per second"),
    ("prefill", "ttft_seconds", "Prefill time", "time to first token"),
)


class NoMatplotlib(Exception):
    """The message says how to install it."""


def draw(records: Sequence[Record], stem: Path) -> list[Path]:
    """Draw one figure for each model; returns the files.

    Raises:
        NoMatplotlib: it is not installed.
        OSError: a file cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlib(REMEDY) from error
    models = list(dict.fromkeys(r["model"] for r in records if r["status"] == OK))
    files = []
    for model in models:
        mine = [r for r in records if r["model"] == model]
        name = stem.name if len(models) == 1 else f"{stem.name}-{_short(model)}"
        with rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
            _panels(figure, mine, model)
            for suffix in SUFFIXES:
                files.append(stem.with_name(name + suffix))
                files[-1].parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(files[-1], dpi=DPI, metadata={"Date": None} if suffix == ".svg" else None)
    return files


def _panels(figure: Any, records: list[Record], model: str) -> None:
    from matplotlib.lines import Line2D

    caches = list(dict.fromkeys(r["cache"] for r in records))
    first = records[0]
    lines: dict[str, Any] = {}
    for axes, (kind, key, title, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        mine = [r for r in records if r["kind"] == kind]
        contexts = sorted({r["context"] for r in mine})
        for cache in caches:
            found = sorted((r["context"], r[key]) for r in mine if r["cache"] == cache and r["status"] == OK)
            if not found:
                continue
            x, y = zip(*found, strict=True)
            (lines[cache],) = axes.plot(x, y, **_style(cache, caches))
            if any(r["cache"] == cache and r["status"] == OUT_OF_MEMORY for r in mine):
                axes.plot(x[-1], y[-1], "x", color=lines[cache].get_color(), ms=8, mew=1.8, zorder=6, clip_on=False)
        _axes(axes, key, contexts, title, label, kind)
    title = f"{_short(model)}, {first['dtype']}  ·  {first['machine']}  ·  mlx {first['mlx']}"
    title += f" with {first['blas']}" if first["blas"] else ""
    figure.suptitle(title, fontsize=7, color="#444444")
    by_family = [[c for c in lines if _family(c) == family] for family in COLOURS]
    by_family = [sorted(members, key=caches.index) for members in by_family if members]
    rows = max(map(len, by_family), default=0)
    blank = Line2D([], [], alpha=0)
    entries = [(lines[m[i]], title_of(m[i])) if i < len(m) else (blank, "") for m in by_family for i in range(rows)]
    figure.legend(
        *zip(*entries, strict=True),
        loc="outside lower center",
        ncols=len(by_family),
        frameon=False,
        handlelength=2.6,
        columnspacing=2.0,
        labelspacing=0.35,
        title=_ended(records),
        title_fontsize=6.5,
    )


def _ended(records: list[Record]) -> str | None:
    """Which caches ran out of memory, and from which context on."""
    found: dict[tuple[str, str], int] = {}
    for r in records:
        if r["status"] == OUT_OF_MEMORY:
            key = (r["kind"], r["cache"])
            found[key] = min(r["context"], found.get(key, r["context"]))
    parts = []
    for kind in KINDS:
        caches = [f"{title_of(cache)} at {tokens(n)}" for (k, cache), n in found.items() if k == kind]
        parts += [f"{kind}: {'; '.join(caches)}"] if caches else []
    return f"× out of memory in {'  ·  in '.join(parts)}" if parts else None


def _axes(axes: Any, key: str, contexts: list[int], title: str, label: str, kind: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_title(title, loc="left")
    axes.set_xlabel("context (tokens)" if kind == "decode" else "prompt (tokens)")
    axes.set_ylabel(label)
    axes.grid(True)
    axes.set_axisbelow(True)
    if not contexts:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#888888")
        axes.set(xticks=[], yticks=[])
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [tokens(c) for c in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    shown = {"kv_bytes": _bytes, "ttft_seconds": _seconds}.get(key, lambda y: f"{y:g}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: shown(y)))
    axes.tick_params(length=2.5, width=0.6)


def _bytes(count: float) -> str:
    number, unit = size(count).split()
    return f"{float(number):g} {unit}"


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"


def _short(model: str) -> str:
    """The last part of a folder or repository."""
    return model.rstrip("/").rpartition("/")[2]


def _family(cache: str) -> str:
    return cache.partition(":")[0]


def _style(cache: str, caches: Sequence[str]) -> dict[str, Any]:
    family = _family(cache)
    if family in BUDGETED:
        budget = cache.partition(":")[2]
        fractions = sorted({float(f) for c in caches if _family(c) in BUDGETED and "." in (f := c.partition(":")[2])})
        index = fractions.index(float(budget)) if "." in budget else FIXED
    else:
        index = [c for c in caches if _family(c) == family].index(cache)
    line, marker = STYLES[index % len(STYLES)]
    ours = family == OURS
    return {
        "color": COLOURS[family],
        "linestyle": line,
        "marker": marker,
        "linewidth": 2.0 if ours else 1.0,
        "markersize": 4.4 if ours else 3.4,
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
        "zorder": 3 if ours else 4,  # a thin line stays visible on a thick one of the same bytes
        "solid_capstyle": "round",
    }


def title_of(cache: str) -> str:
    """A cache's name for people."""
    family, _, rest = cache.partition(":")
    if family == "quantized":
        return f"quantized, {rest} bits"
    if family == "veloxquant":
        method, _, rest = rest.partition(":")
        family = f"VeloxQuant {method}"
    else:
        family = NAMES[family]
    if not rest:
        return family
    return f"{family}, {float(rest) * 100:g} %" if "." in rest else f"{family}, {int(rest):,} rows"


def main(argv: list[str] | None = None) -> int:
    """Draw the figure of a file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="What bench_memory.py wrote (--output)")
    parser.add_argument("--figure", type=Path, help="Figure without its suffix (default: beside the results)")
    args = parser.parse_args(argv)
    try:
        records = Records(args.results)
        if not records.all:
            raise OSError(2, "no results in it")
        last = records.all[-1]
        mine = list({identity(r): r for r in records.made_in(last)}.values())
        if len(mine) < len(records.all):
            print(f"drawn: {len(mine)} of {len(records.all)} records, of {last['machine']}, mlx {last['mlx']}")
        stem = args.figure or args.results.with_suffix("")
        files = draw(mine, stem.with_suffix("") if stem.suffix in SUFFIXES else stem)
    except OSError as error:
        print(f"bench_memory_figure: error: {args.results}: {error.strerror or error}", file=sys.stderr)
        return 2
    except NoMatplotlib as error:
        print(f"bench_memory_figure: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
