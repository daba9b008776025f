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
from typing import Any

from tqdm import tqdm

from . import __version__, flags
from .engine import Engine
from .errors import UserError
from .evaluation import figure, texts
from .evaluation.caches import CODED, DEFAULT, OF_MLX_LM, STREAMING, Contender
from .evaluation.documents import documents
from .evaluation.records import Records
from .evaluation.run import Outcome, Work, measure, plan
from .evaluation.scoring import rouge
from .evaluation.subject import Subject
from .evaluation.summary import WINDOW, Results, tables
from .evaluation.task import ROOM, Item, Task, items
from .evaluation.tasks import BY_NAME, harness
from .evaluation.tasks.files import Files, read_rows
from .flags import DEFAULT_MODEL
from .interrupts import INTERRUPTED
from .loading import Source, load_model, load_vocabulary, widen
from .policies import BY_NAME as POLICIES
from .sampling import LARGEST, Range
from .terminal import complain, guarded, say, warn

COMMAND = "zm_mlx.evaluate"
TASKS = tuple(BY_NAME)
CACHES = ("streaming_llm", "snapkv", "paper", "zeromerge")
BUDGETS = (0.05, 0.1, 0.2)
DOCUMENTS = 4
PROMPT_TOKENS = 2048
QUESTIONS = 128  # tokens that may come behind a prompt and its continuation
RANGES = {
    "budgets": Range("a share of the full cache's bytes, above 0 and at most 1", float, 1e-9, 1),
    "documents": Range("an integer from 1 up", int, 1, LARGEST),
    "prompt_tokens": Range("an integer from 512 up", int, 512, LARGEST),  # facts and questions need some
    "seeds": Range("an integer from 0 up", int, 0, LARGEST),
}


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description="Measure what a model loses in caches of fixed size: loss of text, recall, agreement with the full "
        "cache, answers to prompts of yours. Goes on where it was stopped"
    )
    add = parser.add_argument
    add("--model")
    add("--adapter-path", help="Folder of an adapter's weights")
    add("--trust-remote-code", action="store_true", help="Allow the tokenizer to run its own code")
    add(
        "--texts",
        nargs="+",
        metavar="PATH",
        help=f"Files, or folders of {', '.join(texts.SUFFIXES)} (default: Python's manual and standard library)",
    )
    add("--data", nargs="+", metavar="FILE", help='JSONL of "prompt" and "answer" or "reference", for the task files')
    add(
        "--lm-eval",
        nargs="+",
        metavar="TASK",
        help="Tasks of the lm-evaluation-harness, or files that define some (pip install lm-eval): the first "
        "--documents of each, and no other tasks but those of --tasks",
    )
    add("--tasks", nargs="+", choices=[*TASKS, "files"], metavar="TASK", help=_listed(TASKS))
    add(
        "--caches",
        nargs="+",
        default=list(CACHES),
        metavar="CACHE",
        help=f"{_listed(CACHES)}; others are {', '.join(sorted({*OF_MLX_LM, *POLICIES} - {*CACHES, 'full'}))}. With "
        f"{' or '.join(CODED)} behind its name rows become codes, with {STREAMING} a cache reads prompts itself. "
        f"full is always measured, and all are compared with {WINDOW}",
    )
    _add_numbers(add, "budgets", BUDGETS, "SHARE", "Of the full cache's bytes")
    _add_numbers(add, "prompt_tokens", (), "N", f"Lengths of prompts (default: {PROMPT_TOKENS})")
    _add_numbers(add, "documents", DOCUMENTS, "N", "Places in the texts; statistics are over them")
    _add_numbers(add, "seeds", (0,), "N", "Each draws other parts of the documents and other facts")
    add(
        "--output",
        default="evaluate.jsonl",
        metavar="FILE",
        help="All that was measured, which a run goes on (default: evaluate.jsonl)",
    )
    add("--json", nargs="?", const="-", metavar="FILE", help="Write results as JSON, or print them on the last line")
    add("--figure", metavar="FILE", help=f"Draw loss against budget; ends in {', '.join(figure.SUFFIXES)}")
    return flags.adopt(parser, COMMAND)


def _listed(names: Sequence[str]) -> str:
    return f"Any of {', '.join(names)} (default: all)" if names is TASKS else f"Default: {', '.join(names)}"


def _add_numbers(add: Any, name: str, default: Any, metavar: str, words: str) -> None:
    """A flag for one number, or for several where the default is a sequence."""
    several = isinstance(default, tuple)
    given = f" (default: {' '.join(map(str, default)) if several else default})" if default else ""

    def parse(text: str) -> int | float:
        try:
            return RANGES[name].parse(text)
        except ValueError as error:  # argparse would leave out the range
            raise UserError(f"{flags.flag(name)} {error}") from error

    add(
        flags.flag(name),
        nargs="+" if several else None,
        type=parse,
        default=list(default) if several else default,
        metavar=metavar,
        help=words + given,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(COMMAND, lambda: _evaluate(argv))


def _evaluate(argv: list[str] | None) -> int:
    args = setup_arg_parser().parse_args(argv)
    flags.check(args)
    contenders = _check(args)
    if args.lm_eval:
        harness.require()
    tasks = _tasks(args)
    given = _texts(args.texts, tasks)
    records = _records(args.output)
    subject = _subject(args)
    if args.lm_eval:
        tasks += harness.harnessed(args.lm_eval, subject.tokenizer, args.documents)
    lengths = _lengths(args.prompt_tokens, subject.context)
    if any(c.shares for c in contenders):
        _say_default(subject)
    works = plan(subject, tasks, _items(args, subject, lengths, given), contenders)
    outcome = Outcome()
    interrupted = _measure(subject, works, records, outcome)
    for reason in outcome.refused:
        warn(f"left out: {reason}")

    results = Results(records.of([p for work in works for p in work.points.values()]))
    if not (results.groups or interrupted):
        raise UserError("nothing could be measured, for the reasons above")
    say("\n".join(tables(results, tasks)))
    if args.figure is not None and _draw(args.figure, subject, results, tasks):
        say(f"\nFigure: {args.figure}")
    if args.json is not None:
        _write(args.json, _document(args, tasks, subject, results, interrupted))
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
    contenders = {Contender("full"): None}
    for name in args.caches:
        try:
            for budget in sorted(set(args.budgets)):
                contenders[Contender(name, 1.0 if name == "full" else budget)] = None
        except ValueError as error:
            raise UserError(f"--caches: {error}") from error
    for name in ("output", "json", "figure"):
        file = getattr(args, name)
        if file not in (None, "-"):
            _check_file(f"--{name}", file)
    if args.figure is not None:
        figure.check(args.figure)
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
    """The tasks asked for, once each, but those of the harness; ``--data`` brings ``files``."""
    asked = args.tasks or ([] if args.lm_eval else TASKS)
    names = list(dict.fromkeys([*asked, *(["files"] if args.data else [])]))
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


def _texts(paths: Sequence[str] | None, tasks: Sequence[Task]) -> list[texts.Text]:
    """The texts, if a task reads any."""
    if not any(task.name in BY_NAME for task in tasks):
        return []
    return texts.default() if paths is None else texts.read(paths)


def _subject(args: argparse.Namespace) -> Subject:
    source = Source(args.model or DEFAULT_MODEL, adapter=args.adapter_path, trust_remote_code=args.trust_remote_code)
    tokenizer = load_vocabulary(source).tokenizer
    model = load_model(source)
    widen(model)
    return Subject(Engine(model, tokenizer, source.name))


def _say_default(subject: Subject) -> None:
    """Which table shares rows out among heads, or that none does, and what the default cannot do with this model."""
    for complaint in subject.found.complaints:
        warn(complaint)
    table = subject.table
    rows = f"uniform rows per head: {subject.found.reason}" if table is None else f"rows per head by the {table.words}"
    say(f"{DEFAULT}: {rows}\n")
    if subject.unmoved:
        layers = f"{subject.unmoved} of {len(subject.shapes)} layers"
        warn(f"{DEFAULT} scores by attention alone in {layers}, whose rotation is not known")


def _lengths(asked: Sequence[int], context: int | None) -> list[int]:
    """The lengths of prompts, which leave the model's context room for what follows."""
    most = None if context is None else context - ROOM - QUESTIONS
    if not asked:
        return [PROMPT_TOKENS if most is None else min(PROMPT_TOKENS, most)]
    for length in asked:
        if most is not None and length > most:
            raise UserError(f"--prompt-tokens {length}: this model's context has room for {most} and what follows them")
    return sorted(set(asked))


def _items(
    args: argparse.Namespace, subject: Subject, lengths: Sequence[int], given: Sequence[texts.Text]
) -> list[Item]:
    """A place in the texts for each document, seed and length."""
    every: list[Item] = []
    for length in lengths if given else ():
        places = documents(given, subject.encode, args.documents, length + ROOM)
        every += items(subject, places, list(dict.fromkeys(args.seeds)), length)
    return every


def _draw(file: str, subject: Subject, results: Results, tasks: Sequence[Task]) -> bool:
    """Whether there was anything to draw."""
    try:
        return figure.draw(results, tasks, Path(subject.engine.name).name, file)
    except OSError as error:
        raise UserError(f"--figure {file}: {error.strerror or error}") from error


def _document(
    args: argparse.Namespace, tasks: Sequence[Task], subject: Subject, results: Results, interrupted: bool
) -> dict[str, Any]:
    lengths = _lengths(args.prompt_tokens, subject.context)
    settings = {name: getattr(args, name) for name in ("texts", "data", "lm_eval", "caches", "budgets")}
    settings["tasks"] = [task.name for task in tasks]
    return {
        "model": subject.engine.name,
        "fingerprint": subject.fingerprint,
        "zm_mlx": __version__,
        "table": None if subject.table is None else subject.table.words,
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


if __name__ == "__main__":
    sys.exit(main())
