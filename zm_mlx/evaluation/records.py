"""What was measured, one JSON document a line, so that a run goes on where it was stopped."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """One item with one cache: all that decides what is measured.

    Attributes:
        task, version: which task, and which version of it.
        model: the model's fingerprint.
        package: version of this package.
        document, digest: the item's document, and what tells it from others of the name.
        seed, part, prompt_tokens: the rest of the item.
        cache, settings, budget: the cache's name, the settings of its policy, its share of the full cache's bytes.
    """

    task: str
    version: int
    model: str
    package: str
    document: str
    digest: str
    seed: int
    part: int
    prompt_tokens: int
    cache: str
    settings: str
    budget: float


@dataclass(frozen=True)
class Record:
    """A point, what was measured there, and how long it took."""

    point: Point
    values: dict[str, float]
    seconds: float

    def as_json(self) -> str:
        return json.dumps({**asdict(self.point), "seconds": round(self.seconds, 3), "values": self.values})

    @classmethod
    def parse(cls, line: str) -> "Record":
        """The record of a line.

        Raises:
            ValueError: it is none.
        """
        found = json.loads(line)
        try:
            point = Point(**{f.name: found[f.name] for f in fields(Point)})
            values = {str(name): float(value) for name, value in found["values"].items()}
            return cls(point, values, float(found["seconds"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record: {error}") from error


class Records:
    """A file of records: read once, then appended to; without a file they are held only.

    Lines that are no record are left out and stay where they are: of a process that was killed while it wrote,
    or of a later version.

    Attributes:
        found: the latest record of each point.
        torn: lines that are no record.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.found, self.torn = path, dict[Point, Record](), 0
        text = path.read_bytes().decode("utf-8", errors="replace") if path is not None and path.exists() else ""
        self._ends = not text or text.endswith("\n")
        for line in filter(str.strip, text.splitlines()):
            try:
                record = Record.parse(line)
                self.found[record.point] = record
            except ValueError:
                self.torn += 1

    def append(self, record: Record) -> None:
        """Add a record; it is in the file when this returns."""
        self.found[record.point] = record
        if self.path is None:
            return
        line = ("" if self._ends else "\n") + record.as_json() + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._ends = True

    def of(self, points: list[Point]) -> list[Record]:
        """The records of these points, as far as there are any."""
        return [self.found[p] for p in points if p in self.found]
