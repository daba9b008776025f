"""From records to results: for each task, length, cache and budget the mean of every number, and the difference to
the sliding window with its paired error; as a table for people and as a document for programs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from .records import Record
from .statistics import Estimate, Values, difference, estimate
from .task import Metric, Task
from .texts import Kind

WINDOW = "streaming_llm"  # what every cache is compared with


@dataclass(frozen=True)
class Group:
    """All records of one task, length, cache and budget."""

    task: str
    prompt_tokens: int
    cache: str
    budget: float
    records: list[Record] = field(default_factory=list)

    def names(self) -> list[str]:
        """The names of its numbers, in their order."""
        return list(dict.fromkeys(key for r in self.records for key in r.values))

    def values(self, key: str, kind: str = "") -> Values:
        """One number of each item; of documents whose name begins with ``kind``."""
        return {
            (r.point.document, r.point.seed, r.point.part): r.values[key]
            for r in self.records
            if key in r.values and r.point.document.startswith(kind)
        }


class Results:
    """Groups of records, found by what they are of."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._found: dict[tuple[str, int, str, float], Group] = {}
        for record in records:
            p = record.point
            key = (p.task, p.prompt_tokens, p.cache, p.budget)
            self._found.setdefault(key, Group(*key)).records.append(record)

    @property
    def groups(self) -> list[Group]:
        return list(self._found.values())

    def of(self, task: str) -> list[Group]:
        return [g for g in self.groups if g.task == task]

    def window(self, group: Group) -> Group | None:
        """The sliding window's group at the same budget; ``None`` for its own and for the full cache's."""
        if group.cache in (WINDOW, "full"):
            return None
        return self._found.get((group.task, group.prompt_tokens, WINDOW, group.budget))

    def mean(self, group: Group, key: str) -> Estimate | None:
        return estimate(group.values(key))

    def against_window(self, group: Group, key: str) -> Estimate | None:
        """The mean difference to the window's, on the same items."""
        window = self.window(group)
        return None if window is None else difference(group.values(key), window.values(key))

    def as_list(self) -> list[dict[str, Any]]:
        """One document for each group."""
        return [self._document(g) for g in self.groups]

    def _document(self, group: Group) -> dict[str, Any]:
        return {
            "task": group.task,
            "prompt_tokens": group.prompt_tokens,
            "cache": group.cache,
            "budget": group.budget,
            "documents": len({r.point.document for r in group.records}),
            "items": len(group.records),
            "metrics": {key: self._metric(group, key) for key in group.names()},
        }

    def _metric(self, group: Group, key: str) -> dict[str, Any]:
        """Mean and error, the difference to the window's, and the means by kind of text where there are several."""
        found, against = self.mean(group, key), self.against_window(group, key)
        document: dict[str, Any] = {} if found is None else {"mean": found.mean, "error": found.error}
        if against is not None:
            document["against_window"] = {"mean": against.mean, "error": against.error}
        by_kind = {kind: estimate(group.values(key, kind)) for kind in get_args(Kind)}
        if all(by_kind.values()):
            document.update({kind: part.mean for kind, part in by_kind.items() if part is not None})
        return document


LEGEND = f"Means over documents ± standard error (difference to {WINDOW} ± its error, paired by document)"


def tables(results: Results, tasks: Sequence[Task]) -> list[str]:
    """Lines: one block for each task, length and metric; caches down, budgets across."""
    lines = [LEGEND]
    for task in tasks:
        groups = results.of(task.name)
        for length in sorted({g.prompt_tokens for g in groups}):
            for metric in task.metrics:
                lines += _block(results, [g for g in groups if g.prompt_tokens == length], metric)
    return lines


def _block(results: Results, groups: Sequence[Group], metric: Metric) -> list[str]:
    full = [g for g in groups if g.cache == "full"]
    budgets = sorted({g.budget for g in groups if g.cache != "full"})
    first = groups[0]
    documents = len({r.point.document for g in groups for r in g.records})
    length = f", {first.prompt_tokens:,} tokens" if first.prompt_tokens else ""
    lines = ["", f"{first.task}: {metric.title}{length}, {documents} documents"]
    lines[-1] += " (lower is better)" if metric.lower else " (higher is better)"
    lines.append(f"{'':<24}" + "".join(f"{f'{100 * b:g} %':>32}" for b in budgets))
    for cache in dict.fromkeys(g.cache for g in groups if g.cache != "full"):
        row = {g.budget: g for g in groups if g.cache == cache}
        cells = [_cell(results, row.get(b), metric.key) for b in budgets]
        lines.append(f"{cache:<24}" + "".join(f"{cell:>32}" for cell in cells))
    for group in full:
        if (found := results.mean(group, metric.key)) is not None:
            lines.append(f"{'full':<24}{_shown(found):>32}")
    return lines


def _cell(results: Results, group: Group | None, key: str) -> str:
    found = None if group is None else results.mean(group, key)
    if group is None or found is None:
        return "-"
    against = results.against_window(group, key)
    return _shown(found) + ("" if against is None else f" ({_shown(against, '+')})")


def _shown(found: Estimate, sign: str = "") -> str:
    error = "" if found.error is None else f" ±{_digits(found.error)}"
    return f"{found.mean:{sign}z.3f}{error}"


def _digits(error: float) -> str:
    """An error without the zero before the point."""
    return f"{error:.3f}".removeprefix("0") if error < 1 else f"{error:.2f}"
