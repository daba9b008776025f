"""The figure of an evaluation: for each task what it measures first against the budget, one line a cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .summary import WINDOW, Group, Results
from .task import Metric, Task

SUFFIXES = (".png", ".svg", ".pdf")
REMEDY = "--figure needs matplotlib: pip install 'zm-mlx[evaluate]'"
WIDTH, HEIGHT = 3.6, 2.6  # inches of a panel
COLUMNS = 3
DPI = 200
OURS = "zeromerge"
# Okabe and Ito's colours, which the colour-blind tell apart; ours and the window's are their own.
COLOUR_OURS, COLOUR_WINDOW = "#0072B2", "#E69F00"
COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#8C6D31", "#393B79", "#A55194", "#637939", "#17A2A2")
MARKERS = "sDv^<>pXh"  # one fewer than colours, so that pairs repeat late
FULL: Any = {"color": "#000000", "linewidth": 0.8, "linestyle": ":", "zorder": 2}
LABEL = 6.5  # points
STYLE: Any = {
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


def check(file: str) -> None:
    """Refuse what could not be drawn, before anything is measured.

    Raises:
        UserError: another suffix than those of ``SUFFIXES``, or no matplotlib.
    """
    if Path(file).suffix.lower() not in SUFFIXES:
        raise UserError(f"--figure {file}: the name must end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(REMEDY) from error


def draw(results: Results, tasks: Sequence[Task], model: str, file: str) -> bool:
    """Draw one panel for each task and length into a file; without anything to draw there is none.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = _panels(results, tasks)
    if not panels:
        return False
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    caches = list(dict.fromkeys(g.cache for _, _, groups in panels for g in groups if g.cache != "full"))
    styles = {cache: style(cache, caches) for cache in caches}
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.3), layout="constrained")
        figure.suptitle(f"{model}: means and standard errors over documents", fontsize=7, color="#444444")
        every = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (task, metric, groups) in zip(every, panels, strict=False):
            _panel(axes, results, groups, metric, styles)
            length = f", {groups[0].prompt_tokens:,} tokens" if groups[0].prompt_tokens else ""
            axes.set_title(task.name + length, loc="left")
        for axes in every[len(panels) :]:
            axes.set_visible(False)
        figure.savefig(file, dpi=DPI, metadata={"Date": None} if file.lower().endswith(".svg") else None)
    return True


def style(cache: str, caches: Sequence[str]) -> dict[str, Any]:
    """How a cache's line looks: ours thick, the window's and ours in colours of their own."""
    if cache.partition("-")[0] == OURS:
        dashed = cache != OURS
        return {"color": COLOUR_OURS, "linewidth": 2.2, "marker": "o", "linestyle": "--" if dashed else "-"}
    if cache == WINDOW:
        return {"color": COLOUR_WINDOW, "linewidth": 1.6, "marker": "o"}
    i = [c for c in caches if c != WINDOW and c.partition("-")[0] != OURS].index(cache)
    return {"color": COLOURS[i % len(COLOURS)], "linewidth": 0.9, "marker": MARKERS[i % len(MARKERS)]}


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest to those wanted, in the same order, no two nearer than ``gap``."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    blocks: list[list[float]] = []  # sum of (wanted - place in the block), members
    for i in order:
        blocks.append([wanted[i], 1])
        while len(blocks) > 1:
            (above, more), (below, fewer) = blocks[-1], blocks[-2]
            if above / more - below / fewer >= gap * (more + fewer) / 2:
                break
            blocks[-2:] = [[below + above, fewer + more]]
    places = [total / n + gap * (k - (n - 1) / 2) for total, n in blocks for k in range(int(n))]
    found = [0.0] * len(wanted)
    for i, place in zip(order, places, strict=True):
        found[i] = place
    return found


def _panels(results: Results, tasks: Sequence[Task]) -> list[tuple[Task, Metric, list[Group]]]:
    """What there is to draw: groups of one task and length, with the number to show of them."""
    found = []
    for task in tasks:
        groups = results.of(task.name)
        for length in sorted({g.prompt_tokens for g in groups}):
            mine = [g for g in groups if g.prompt_tokens == length]
            if any(g.cache != "full" for g in mine):
                found.append((task, task.metrics[0], mine))
    return found


def _panel(axes: Any, results: Results, groups: Sequence[Group], metric: Metric, styles: dict[str, Any]) -> None:
    from matplotlib.ticker import NullLocator

    budgets = sorted({g.budget for g in groups if g.cache != "full"})
    ends: dict[str, tuple[float, float]] = {}
    for cache, look in styles.items():
        mine = sorted((g for g in groups if g.cache == cache), key=lambda g: g.budget)
        found = [(g.budget, e) for g in mine if (e := results.mean(g, metric.key)) is not None]
        if not found:
            continue
        x, y = [b for b, _ in found], [e.mean for _, e in found]
        front = 4 if cache.startswith(OURS) else 3
        axes.plot(x, y, markersize=3.2, markeredgecolor="white", markeredgewidth=0.4, zorder=front, **look)
        errors = [e.error or 0 for _, e in found]
        axes.errorbar(x, y, errors, fmt="none", ecolor=look["color"], elinewidth=0.6, alpha=0.6)
        ends[cache] = x[-1], y[-1]
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{100 * b:g} %" for b in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("budget (share of the full cache's bytes)")
    axes.set_ylabel(metric.title.replace(" (", "\n("))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(True)
    axes.set_axisbelow(True)
    for group in groups:
        if group.cache == "full" and (whole := results.mean(group, metric.key)) is not None:
            axes.plot([budgets[0] / _span(budgets) ** 0.05, budgets[-1]], [whole.mean] * 2, **FULL)
            ends["full"] = budgets[-1], whole.mean
    _labels(axes, ends, budgets, styles)


def _span(budgets: Sequence[float]) -> float:
    """The largest over the smallest, by powers of which margins are measured."""
    return budgets[-1] / budgets[0] if len(budgets) > 1 else 2.0


def _labels(axes: Any, ends: dict[str, tuple[float, float]], budgets: Sequence[float], styles: dict[str, Any]) -> None:
    """Each cache's name at the right end of its line, moved so that none covers another."""
    low, high = axes.get_ylim()
    for _ in range(2):  # names beyond the axes stretch them, which takes more room for all
        gap = (high - low) * LABEL * 1.15 / 72 / (HEIGHT * 0.68)
        places = apart([y for _, y in ends.values()], gap)
        low, high = min(low, min(places) - gap), max(high, max(places) + gap)
    right = _span(budgets)
    margin = budgets[-1] * right**0.06
    axes.set_xlim(budgets[0] / right**0.05, budgets[-1] * right**0.7)
    axes.set_ylim(low, high)
    for (cache, (x, y)), place in zip(ends.items(), places, strict=True):
        colour = styles.get(cache, {"color": "#000000"})["color"]
        axes.plot([x, margin], [y, place], color=colour, linewidth=0.4, alpha=0.7)
        bold = "bold" if cache.startswith(OURS) else "normal"
        axes.text(margin * right**0.01, place, cache, color=colour, fontsize=LABEL, va="center", fontweight=bold)
