"""Prompts and right answers of a user, from JSONL files: exact match, F1, ROUGE-1, -2 and -L.

A line is an object with ``prompt`` and ``answer`` (or ``reference``; a text, or a list of texts that are all
right), and optionally ``max_tokens`` for the answer (128). The prompt goes through the model's chat template, as
in ``python -m zm_mlx.generate``; it is compressed, and the answer is decoded greedily under the cap. Each line is a
document of the statistics. Data sets become such files by renaming:

- XSum: ``prompt`` is an instruction and ``document``, ``reference`` is ``summary``;
- LongBench: ``prompt`` is the task's own template filled with ``context`` and ``input``, ``answer`` is ``answers``;
- RULER: ``prompt`` is ``input``, ``answer`` is ``outputs``; its own score is ``contained`` here.

Traps: exact match and F1 are for short answers; a chatty model fails them with any cache, so compare with ``full``.
ROUGE needs the library rouge-score and is left out without it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import prompts
from ...errors import UserError
from ..caches import Contender
from ..greedy import answer
from ..scoring import contained, exact_match, f1, rouge
from ..subject import Subject
from ..task import Exam, Item, Metric, Values

MAX_TOKENS = 128


@dataclass(frozen=True)
class Row:
    """One line: where it stands, the prompt, the right answers, and how long an answer may be."""

    name: str
    prompt: str
    right: tuple[str, ...]
    max_tokens: int = MAX_TOKENS


@dataclass(frozen=True)
class Files:
    """The task."""

    rows: Sequence[Row] = ()
    name: str = field(default="files", init=False)
    version: int = field(default=1, init=False)
    metrics: Sequence[Metric] = field(init=False)

    def __post_init__(self) -> None:
        found = [("exact", "exact match"), ("f1", "F1"), ("contained", "right answers contained")]
        if rouge() is not None:
            found += [("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("rougeL", "ROUGE-L")]
        object.__setattr__(self, "metrics", tuple(Metric(key, title, lower=False) for key, title in found))

    def items(self, items: Sequence[Item]) -> Sequence[Item]:
        """One for each line, whatever the documents and seeds."""
        return [Item(row.name, _digest(row), 0, 0, list, row=row) for row in self.rows]

    def exam(self, subject: Subject, item: Item) -> Exam:
        return _Exam(subject, item.row)


class _Exam:
    def __init__(self, subject: Subject, row: Row) -> None:
        self.subject, self.row, self.rouge = subject, row, rouge()
        self.prompt = prompts.encode(subject.tokenizer, row.prompt, prompts.Chat())
        room = subject.context
        if room is not None and len(self.prompt) + row.max_tokens > room:
            raise ValueError(f"{row.name}: {len(self.prompt)} tokens and the answer are more than the model's {room}")
        if len(self.prompt) < 2:
            raise ValueError(f"{row.name}: the prompt has fewer than two tokens")
        self.prompted = subject.prompted(self.prompt[:-1])

    def measure(self, contender: Contender) -> Values:
        text, right = self._answer(contender), self.row.right
        values = {"exact": exact_match(text, right), "f1": f1(text, right), "contained": contained(text, right)}
        return {**values, **(self.rouge(text, right) if self.rouge else {})}

    def _answer(self, contender: Contender) -> str:
        """What greedy decoding gives, to the end of the sequence."""
        caches = self.prompted.caches(contender)
        return answer(self.subject, caches, self.prompt[-1], self.row.max_tokens).strip()


def read_rows(paths: Sequence[str]) -> list[Row]:
    """The rows of JSONL files.

    Raises:
        UserError: a file cannot be read, or a line is not as it should be; the message names it.
    """
    rows = [row for path in paths for row in _rows(path)]
    if paths and not rows:
        raise UserError(f"--data {' '.join(paths)}: no line in it")
    return rows


def _rows(path: str) -> list[Row]:
    try:
        lines = Path(path).read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not text in UTF-8 (byte {error.start} cannot be read)") from error
    return [_row(f"{path} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]


def _row(where: str, line: str) -> Row:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"--data {where}: no JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise UserError(f'--data {where}: must be an object with a text "prompt"')
    answer = found.get("answer", found.get("reference"))
    right = [answer] if isinstance(answer, str) else answer
    if not (isinstance(right, list) and right and all(isinstance(r, str) for r in right)):
        raise UserError(f'--data {where}: "answer" or "reference" must be a text or a list of texts')
    most = found.get("max_tokens", MAX_TOKENS)
    if not (type(most) is int and most > 0):  # True is none
        raise UserError(f'--data {where}: "max_tokens" must be a whole number from 1 up')
    if not found["prompt"].strip():
        raise UserError(f"--data {where}: the prompt is empty")
    return Row(where, found["prompt"], tuple(right), most)


def _digest(row: Row) -> str:
    """What tells a line from others, wherever its file lies."""
    return hashlib.sha256(repr((row.prompt, row.right, row.max_tokens)).encode()).hexdigest()[:16]
