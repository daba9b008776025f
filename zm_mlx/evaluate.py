"""``python -m zm_mlx.evaluate``: what a model loses in a cache of fixed size, on texts of your own or of Python's.

Every cache gets the same share of the full cache's bytes. What was measured goes to a file at once, and a
second run with the same flags goes on where the first was stopped.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
from tqdm import tqdm

from . import __version__
from .engine import Engine
from .errors import UserError
from .evaluation import figure, texts
from .evaluation.caches import Contender
from .evaluation.documents import documents
from .evaluation.records import Records
from .evaluation.run import Outcome, Work, measure, plan
from .evaluation.scoring import rouge
from .evaluation.subject import Subject
from .evaluation.summary import Results, tables
from .evaluation.task import ROOM, Item, Task, items
from .evaluation.tasks import BY_NAME
from .evaluation.tasks.files import Files, read_rows
from .flags import DEFAULT_MODEL
from .interrupts import INTERRUPTED
from .loading import Source, load_model, load_vocabulary
from .terminal import complain, guarded, say, warn

COMMAND = "zm_mlx.evaluate"
TASKS = tuple(BY_NAME)
CACHES = ("streaming_llm", "h2o", "snapkv", "adakv", "expected_attention", "paper", "zeromerge")
BUDGETS = (0.05, 0.1, 0.2)
DOCUMENTS = 4
PROMPT_TOKENS = 2048
LEAST_TOKENS = 512  # of a prompt: facts and questions need some
QUESTIONS = 128  # tokens that may come behind a prompt and its continuation


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {COMMAND}",
        description="Measure what a model loses in caches of fixed size: loss of text, recall, agreement with the full "
        "cache, answers to prompts of yours. Goes on where it was stopped",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = _usage_error  # type: ignore[method-assign]
    parser.print_help = lambda file=None: say(parser.format_help(), end="")  # type: ignore[method-assign]
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="Local folder or Hugging Face repository")
    add("--adapter-path", help="Folder with the weights and settings of an adapter")
    add("--trust-remote-code", action="store_true", help="Let the tokenizer run code of its own")
    add(
        "--texts",
        nargs="+",
        metavar="PATH",
        help=f"Files, or folders of {', '.join(texts.SUFFIXES)}; without it Python's manual and standard library",
    )
    add("--data", nargs="+", metavar="FILE", help="JSONL of prompt and answer (or reference), for the task files")
    add("--tasks", nargs="+", default=list(TASKS), choices=[*TASKS, "files"], help="What to measure")
    add("--caches", nargs="+", default=list(CACHES), metavar="CACHE", help="Caches by name; full is always measured")
    add("--budgets", nargs="+", type=float, default=list(BUDGETS), metavar="SHARE", help="Of the full cache's bytes")
    add("--prompt-tokens", nargs="+", type=int, metavar="N", help=f"Lengths of prompts (default: {PROMPT_TOKENS})")
    add("--documents", type=int, default=DOCUMENTS, metavar="N", help="Places in the texts; statistics are over them")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="Each draws other parts of them and other facts")
    add("--output", default="evaluate.jsonl", metavar="FILE", help="File of all that was measured, which a run goes on")
    add(
        "--json", nargs="?", const="-", metavar="FILE", help="Write the results as JSON, or print them on the last line"
    )
    add("--figure", metavar="FILE", help=f"Draw loss against budget; ends in {', '.join(figure.SUFFIXES)}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(COMMAND, lambda: _evaluate(argv))


def _evaluate(argv: list[str] | None) -> int:
    args = setup_arg_parser().parse_args(argv)
    contenders = _check(args)
    tasks = _tasks(args)
    records = _records(args.output)
    subject = _subject(args)
    lengths = _lengths(args.prompt_tokens, subject.context)
    works = plan(subject, tasks, _items(args, subject, lengths, tasks), contenders)
    outcome = Outcome()
    interrupted = _measure(subject, works, records, outcome)
    for reason in outcome.refused:
        warn(f"left out: {reason}")

    points = [p for work in works for p in work.points.values()]
    results = Results(records.of(points))
    say("\n".join(tables(results, tasks)).lstrip("\n"))
    if args.figure is not None:
        figure.draw(results, tasks, f"{_short(args.model)}  ·  paired by document, ± standard error", args.figure)
        say(f"\nFigure: {args.figure}")
    if args.json is not None:
        _write(args.json, _document(args, subject, results, lengths, interrupted))
    return INTERRUPTED if interrupted else 0


def _measure(subject: Subject, works: Sequence[Work], records: Records, outcome: Outcome) -> bool:
    """Measure what is missing, with a bar on standard error; whether Ctrl-C ended it."""
    missing = sum(len(work.missing(records)) for work in works)
    done = sum(len(work.points) for work in works) - missing
    if done:
        complain(COMMAND, f"{done} of {done + missing} measurements are in {records.path} already")
    bar = tqdm(total=missing, unit="measurement", disable=not missing, dynamic_ncols=True, smoothing=0.05)
    try:
        measure(subject, works, records, bar, outcome)
    except KeyboardInterrupt:
        bar.close()
        complain(COMMAND, f"interrupted; run it again to go on, {records.path} has what was measured")
        return True
    except OSError as error:
        raise UserError(f"--output {records.path}: {error.strerror or error}") from error
    finally:
        bar.close()
    return False


def _check(args: argparse.Namespace) -> list[Contender]:
    """What can be said without a model; returns the caches, the full one first."""
    for name in ("documents", "prompt_tokens", "seeds"):
        value = getattr(args, name)
        least = {"documents": 1, "prompt_tokens": LEAST_TOKENS, "seeds": 0}[name]
        if value is not None and min(value if isinstance(value, list) else [value]) < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more")
    contenders = {Contender("full"): None}
    for name in args.caches:
        for budget in sorted(set(args.budgets)):
            try:
                contenders[Contender(name, 1.0 if name == "full" else budget)] = None
            except ValueError as error:
                flag = "--budgets" if str(error).startswith("budget") else "--caches"
                raise UserError(f"{flag}: {error}") from error
    if args.figure is not None:
        figure.check(args.figure)
    for name in ("output", "json"):
        file = getattr(args, name)
        if file not in (None, "-"):
            _check_file(f"--{name}", file)
    return list(contenders)


def _check_file(flag: str, file: str) -> None:
    folder = Path(file).parent
    if os.path.isdir(file):
        raise UserError(f"{flag} {file}: this is a folder")
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {file}: there is no folder {folder}")
    if not os.access(file if os.path.exists(file) else folder, os.W_OK):
        raise UserError(f"{flag} {file}: cannot be written")


def _tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks asked for, once each; ``--data`` brings ``files``."""
    names = list(dict.fromkeys([*args.tasks, *(["files"] if args.data else [])]))
    if "files" in names and not args.data:
        raise UserError("--tasks files: give its prompts and answers by --data FILE")
    found: list[Task] = [BY_NAME[name] for name in names if name != "files"]
    if "files" in names:
        found.append(Files(read_rows(args.data)))
        if rouge() is None:
            warn("ROUGE is left out: pip install 'zm-mlx[evaluate]'")
    return found


def _records(file: str) -> Records:
    try:
        records = Records(Path(file))
    except OSError as error:
        raise UserError(f"--output {file}: {error.strerror or error}") from error
    if records.torn:
        warn(f"{file}: {records.torn} lines are no records of this version and are left alone")
    return records


def _subject(args: argparse.Namespace) -> Subject:
    source = Source(args.model, adapter=args.adapter_path, trust_remote_code=args.trust_remote_code)
    tokenizer = load_vocabulary(source).tokenizer
    model = load_model(source)
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)  # products of 16 bits take 20 times as long there
    return Subject(Engine(model, tokenizer, args.model))


def _lengths(asked: Sequence[int] | None, context: int | None) -> list[int]:
    """The lengths of prompts, which leave the model's context room for what follows."""
    most = None if context is None else context - ROOM - QUESTIONS
    if asked is None:
        return [PROMPT_TOKENS if most is None else min(PROMPT_TOKENS, most)]
    for length in asked:
        if most is not None and length > most:
            raise UserError(f"--prompt-tokens {length}: this model's context has room for {most} and what follows them")
    return sorted(set(asked))


def _items(args: argparse.Namespace, subject: Subject, lengths: Sequence[int], tasks: Sequence[Task]) -> list[Item]:
    """A place in the texts for each document, seed and length."""
    if not any(task.name in BY_NAME for task in tasks):
        return []
    found = texts.default() if args.texts is None else texts.read(args.texts)
    every: list[Item] = []
    for length in lengths:
        places = documents(found, subject.encode, args.documents, length + ROOM)
        every += items(subject, places, list(dict.fromkeys(args.seeds)), length)
    return every


def _document(
    args: argparse.Namespace, subject: Subject, results: Results, lengths: Sequence[int], interrupted: bool
) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in ("texts", "data", "tasks", "caches", "budgets")}
    return {
        "model": args.model,
        "fingerprint": subject.fingerprint,
        "zm_mlx": __version__,
        "settings": {**settings, "prompt_tokens": lengths, "documents": args.documents, "seeds": args.seeds},
        "interrupted": interrupted,
        "results": results.as_list(),
    }


def _write(file: str, document: dict[str, Any]) -> None:
    if file == "-":
        say(json.dumps(document))
        return
    try:
        Path(file).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file}: {error.strerror or error}") from error


def _short(model: str) -> str:
    """The last part of a folder or repository."""
    return model.rstrip("/").rpartition("/")[2]


def _usage_error(message: str) -> NoReturn:
    raise UserError(f"{message} (--help lists the flags)")


if __name__ == "__main__":
    sys.exit(main())
