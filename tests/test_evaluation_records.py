"""Runs that stop and go on: nothing that was measured is lost or measured twice, and nothing else passes for it."""

from dataclasses import dataclass, field, replace

import pytest
from evaluated import POINT, item, record, subject

from zm_mlx.evaluation import run
from zm_mlx.evaluation.caches import Contender
from zm_mlx.evaluation.records import Record, Records
from zm_mlx.evaluation.run import Outcome, measure, plan
from zm_mlx.evaluation.task import Metric
from zm_mlx.policies import BY_NAME

CONTENDERS = [Contender("full"), *(Contender(name, b) for name in ("streaming_llm", "zeromerge") for b in (0.1, 0.2))]
ITEMS = [item(seed, 512, name) for seed in (0, 1) for name in ("prose 0", "prose 1")]


class Bar:
    """Counts as tqdm does."""

    def __init__(self):
        self.done = 0

    def set_description(self, desc):
        pass

    def update(self, n):
        self.done += n


@dataclass
class Task:
    """Notes what it is asked; raises at one of its measurements."""

    name: str = "recall"
    version: int = 1
    metrics: tuple = (Metric("loss", "loss"),)
    fails_at: int | None = None
    failure: type = KeyboardInterrupt
    asked: list = field(default_factory=list)
    exams: int = 0

    def items(self, items):
        return items

    def exam(self, subject, item):
        self.exams += 1
        task = self

        class Exam:
            def measure(self, contender):
                if len(task.asked) == task.fails_at:
                    task.fails_at = None
                    raise task.failure("too small")
                task.asked.append((item.name, item.seed, contender))
                return {"loss": len(task.asked) / 7}

        return Exam()


def go(task, path, contenders=CONTENDERS, items=ITEMS):
    """The records after a run, and what was left out."""
    records, outcome, bar = Records(path), Outcome(), Bar()
    works = plan(subject(), [task], items, contenders)
    measure(subject(), works, records, bar, outcome)
    return records, outcome, bar


@pytest.mark.parametrize("stop", [0, 1, 7, 19])
def test_a_run_after_ctrl_c_measures_what_is_missing_and_nothing_else(tmp_path, stop):
    path, task = tmp_path / "x.jsonl", Task(fails_at=stop)
    with pytest.raises(KeyboardInterrupt):
        go(task, path)
    assert len(Records(path).found) == stop  # each is in the file at once
    before = {p: r.values for p, r in Records(path).found.items()}
    records, _, bar = go(task, path)
    assert bar.done == 20 - stop
    assert len(task.asked) == len(set(task.asked)) == 20 == len(path.read_text().splitlines())
    written = Records(path).found
    assert {p: r.values for p, r in written.items()} == {p: r.values for p, r in records.found.items()}
    assert {p: records.found[p].values for p in before} == before


def test_a_run_that_is_complete_reads_no_prompt(tmp_path):
    task = Task()
    go(task, tmp_path / "x.jsonl")
    exams = task.exams
    go(task, tmp_path / "x.jsonl")
    assert task.exams == exams == len(ITEMS)


@pytest.mark.parametrize("change", ["policy", "version", "package", "document", "seed", "length", "budget", "cache"])
def test_what_was_changed_is_measured_again(tmp_path, monkeypatch, change):
    task, path = Task(), tmp_path / "x.jsonl"
    ours = [Contender("zeromerge", 0.1)]
    go(task, path, ours, ITEMS[:1])
    again, items = ours, ITEMS[:1]
    if change == "policy":
        again = [Contender("zeromerge", 0.1, replace(BY_NAME["zeromerge"](), decay=0.5))]
    elif change == "version":
        task.version = 2
    elif change == "package":
        monkeypatch.setattr(run, "__version__", "0.0.0")
    elif change == "document":
        items = [replace(items[0], digest="of another text")]
    elif change == "seed":
        items = [replace(items[0], seed=9)]
    elif change == "length":
        items = [replace(items[0], prompt_tokens=513)]
    elif change == "budget":
        again = [Contender("zeromerge", 0.11)]
    else:
        again = [Contender("zeromerge-streaming", 0.1)]
    go(task, path, again, items)
    assert len(task.asked) == 2 == len(Records(path).found)


def test_another_table_of_rows_per_head_is_another_measurement(tmp_path):
    class Table:
        def text(self):
            return "shares"

    class Other:
        fingerprint = subject().fingerprint
        table = Table()

    points = [plan(s, [Task()], ITEMS[:1], CONTENDERS)[0].points for s in (subject(), Other())]
    changed = {c.name for c in CONTENDERS if points[0][c] != points[1][c]}
    assert changed == {"zeromerge"}


def test_a_cache_that_cannot_take_an_item_is_said_once_and_the_rest_goes_on(tmp_path):
    task = Task(fails_at=3, failure=ValueError)
    records, outcome, bar = go(task, tmp_path / "x.jsonl")
    assert list(outcome.refused) == ["zeromerge at 10 %, recall: too small"]
    assert len(records.found) == 19 and bar.done == 20


def test_an_item_without_an_exam_is_said_and_the_rest_goes_on(tmp_path):
    class Refusing(Task):
        def exam(self, subject, item):
            if item.seed == 1:
                raise ValueError("too long")
            return super().exam(subject, item)

    records, outcome, bar = go(Refusing(), tmp_path / "x.jsonl")
    assert list(outcome.refused) == ["recall: too long"] and len(records.found) == 10 and bar.done == 20


def test_half_a_run_has_half_of_every_task():
    tasks = [Task("a"), Task("b")]
    works = plan(subject(), tasks, ITEMS, CONTENDERS)
    assert [w.task.name for w in works] == ["a", "b"] * 4
    assert [w.item.seed for w in works] == [0, 0, 0, 0, 1, 1, 1, 1]


# ---- files


def test_a_record_is_read_as_it_was_written(tmp_path):
    path, found = tmp_path / "x.jsonl", record({"loss": 0.1 + 0.2, "exact": 1.0})
    Records(path).append(found)
    assert Records(path).of([found.point]) == [found]
    assert Record.parse(found.as_json()) == found


def test_a_line_that_a_killed_process_left_half_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "x.jsonl"
    Records(path).append(record({"loss": 1.0}))
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    records = Records(path)
    assert records.torn == 1
    records.append(record({"loss": 2.0}, seed=1))
    records.append(record({"loss": 3.0}, seed=2))
    again = Records(path)
    assert [r.values["loss"] for r in again.found.values()] == [1.0, 2.0, 3.0] and again.torn == 1
    assert path.read_text().startswith(whole)


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}", '{"task": "recall"}', "\udcff"])
def test_lines_that_are_no_records_are_counted_and_stay(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(line.encode("utf-8", "surrogateescape") + b"\n")
    before = path.read_bytes()
    records = Records(path)
    records.append(record({"loss": 1.0}))
    assert records.torn == 1 and path.read_bytes().startswith(before)


def test_the_later_record_of_a_point_counts(tmp_path):
    path = tmp_path / "x.jsonl"
    for x in (1.0, 2.0):
        Records(path).append(record({"loss": x}))
    assert Records(path).of([POINT])[0].values == {"loss": 2.0}
