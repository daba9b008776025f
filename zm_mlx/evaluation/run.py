"""Measures what is missing: every item of every task with every cache, in an order that makes half a run useful."""

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .. import __version__
from .caches import Contender
from .records import Point, Record, Records
from .subject import Subject
from .task import Item, Task


class Progress(Protocol):
    """A bar, as tqdm's."""

    def set_description(self, desc: str) -> Any: ...

    def update(self, n: int) -> Any: ...


@dataclass(frozen=True)
class Work:
    """One item of one task, and the points of the caches that are to be measured on it."""

    task: Task
    item: Item
    points: dict[Contender, Point]

    def missing(self, records: Records) -> dict[Contender, Point]:
        """Those without a record."""
        return {c: p for c, p in self.points.items() if p not in records.found}


@dataclass
class Outcome:
    """What could not be measured, and why: each reason once."""

    refused: dict[str, None] = field(default_factory=dict)


def plan(subject: Subject, tasks: Sequence[Task], items: Sequence[Item], contenders: Sequence[Contender]) -> list[Work]:
    """All work, the tasks in turns, so that after a part of the time each has that part of its items."""
    found: list[tuple[float, int, Work]] = []
    for number, task in enumerate(tasks):
        mine = task.items(items)
        for i, item in enumerate(mine):
            points = {c: _point(subject, task, item, c) for c in contenders}
            found.append((i / len(mine), number, Work(task, item, points)))
    return [work for _, _, work in sorted(found, key=lambda x: x[:2])]


def measure(subject: Subject, works: Iterable[Work], records: Records, progress: Progress, outcome: Outcome) -> None:
    """Measure what has no record; each result is in the file before the next one begins.

    Caches that cannot take an item are noted in ``outcome``, and left out.
    """
    for work in works:
        missing = work.missing(records)
        if not missing:
            continue
        progress.set_description(title := f"{work.task.name}, {work.item.name}, seed {work.item.seed}")
        try:
            exam = work.task.exam(subject, work.item)
        except ValueError as error:
            outcome.refused[f"{work.task.name}: {error}"] = None
            progress.update(len(missing))
            continue
        for contender, point in missing.items():
            progress.set_description(f"{title}, {label(contender)}")
            begin = time.perf_counter()
            try:
                values = exam.measure(contender)
            except ValueError as error:
                outcome.refused[f"{label(contender)}, {point.task}: {error}"] = None
            else:
                records.append(Record(point, values, time.perf_counter() - begin))
            progress.update(1)


def label(contender: Contender) -> str:
    """A cache's name with its budget."""
    return contender.name if contender.name == "full" else f"{contender.name} at {100 * contender.budget:g} %"


def _settings(subject: Subject, contender: Contender) -> str:
    """Those of the policy, and which table it shares rows out by."""
    if contender.settings is None:
        return ""
    table = subject.table if contender.shares else None
    mark = "" if table is None else f", table {hashlib.sha256(table.text().encode()).hexdigest()[:16]}"
    bits = "" if contender.bits is None else f" {contender.bits} bits"
    return f"{contender.settings!r}{mark}{bits}"


def _point(subject: Subject, task: Task, item: Item, contender: Contender) -> Point:
    return Point(
        task=task.name,
        version=task.version,
        model=subject.fingerprint,
        package=__version__,
        document=item.name,
        digest=item.digest,
        seed=item.seed,
        part=item.part,
        prompt_tokens=item.prompt_tokens,
        cache=contender.name,
        settings=_settings(subject, contender),
        budget=contender.budget,
    )
