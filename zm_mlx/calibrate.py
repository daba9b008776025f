"""``python -m zm_mlx.calibrate``: a table of rows per KV head for a model, from any text.

Heads differ in how many old tokens they use, alike on any text. The other commands find the table again by
the model itself, and share a budget's rows out by it; beside a model as ``zm_mlx_table.json`` it goes where
the model goes.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.nn as nn
from tqdm import tqdm

from . import flags
from .calibration import finding
from .calibration.finding import BESIDE
from .calibration.fingerprint import lineage
from .calibration.importance import reread
from .calibration.shares import calibrated
from .calibration.table import DEFAULT_FRACTION, Table
from .calibration.texts import pieces
from .errors import UserError
from .evaluation import texts
from .flags import DEFAULT_MODEL
from .host.plan import context_of
from .host.probe import probe
from .loading import Source, load_model, load_vocabulary, widen
from .sampling import LARGEST, Range
from .terminal import guarded, say

COMMAND = "zm_mlx.calibrate"
DOCUMENTS = 8
TOKENS = 2048
FEWEST = Range("an integer from 256 up", int, 256, LARGEST)  # or the smallest fraction of them is no token


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make a table of rows per KV head, which the other commands find by themselves"
    )
    parser.add_argument("--model")
    parser.add_argument("--adapter-path", help="Folder of an adapter's weights")
    parser.add_argument("--trust-remote-code", action="store_true", help="Allow the tokenizer to run its own code")
    parser.add_argument(
        "--texts",
        nargs="+",
        metavar="PATH",
        help="Files or folders of texts of any kind (default: what Python brings along)",
    )
    parser.add_argument(
        "--documents", default=str(DOCUMENTS), metavar="N", help=f"Pieces of text to read (default: {DOCUMENTS})"
    )
    parser.add_argument(
        "--prompt-tokens", metavar="N", help=f"Tokens of a piece (default: {TOKENS}, or the model's context)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"Where the table goes (default: into the user's cache folder; MODEL/{BESIDE} ships it with a model)",
    )
    return flags.adopt(parser, COMMAND)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(COMMAND, lambda: _calibrate(argv))


def _calibrate(argv: list[str] | None) -> int:
    args = setup_arg_parser().parse_args(argv)
    flags.check(args)
    count = _number("--documents", args.documents, Range("an integer from 1 up", int, 1, LARGEST))
    asked = None if args.prompt_tokens is None else _number("--prompt-tokens", args.prompt_tokens, FEWEST)
    _check_output(args.output)
    given = texts.default() if args.texts is None else texts.read(args.texts)
    source = Source(args.model or DEFAULT_MODEL, adapter=args.adapter_path, trust_remote_code=args.trust_remote_code)
    encode = load_vocabulary(source).tokenizer.encode
    model = load_model(source)
    probe(model)  # a model that cannot be served is refused before all else
    parts = pieces(encode, [t.text for t in given], count, _tokens(asked, context_of(model)))
    table = _table(model, _name(source), parts)
    file = Path(args.output) if args.output is not None else finding.user_folder() / f"{table.model}.json"
    _write(table, file)
    say("\n".join(_lines(table)))
    say(f"Saved: {file}")
    return 0


def _table(model: nn.Module, name: str, parts: Sequence[list[int]]) -> Table:
    made = {"importance": "second reading", "texts": len(parts), "tokens": len(parts[0])}
    mark = lineage(model)
    widen(model)
    with tqdm(parts, desc="Reading", unit="text", leave=False) as bar:
        return Table(mark, name, made, calibrated(model, bar, reread))


def _tokens(asked: int | None, context: int | None) -> int:
    if asked is not None and context is not None and asked > context:
        raise UserError(f"--prompt-tokens {asked} is more than the {context} that the model was trained on")
    return asked or min(TOKENS, context or TOKENS)


def _number(flag: str, text: str, limit: Range) -> int:
    try:
        return int(limit.parse(text))
    except ValueError as error:
        raise UserError(f"{flag} {error}") from error


def _check_output(file: str | None) -> None:
    """Refuse a file that cannot be written, before the model is read."""
    if file is None:
        return
    folder = Path(file).parent
    if os.path.isdir(file):
        raise UserError(f"--output {file}: this is a folder; beside its model a table is called {BESIDE}")
    if not os.path.isdir(folder):
        raise UserError(f"--output {file}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {file}: the folder {folder} cannot be written")


def _write(table: Table, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        table.write(file)
    except OSError as error:
        raise UserError(
            f"the table cannot be written to {file}: {error.strerror or error}; --output chooses"
        ) from error


def _name(source: Source) -> str:
    """What the model is called: the last part of its folder or repository, and its adapter's."""
    names = [Path(os.path.abspath(source.name)).name] + ([Path(source.adapter).name] if source.adapter else [])
    return " + ".join(names)


def _lines(table: Table) -> list[str]:
    """What was found, in short."""
    shares = table.shares(DEFAULT_FRACTION)
    ranked = sorted((x, i, h) for i, layer in enumerate(shares) for h, x in enumerate(layer))
    few = sum(x < 0.5 for x, _, _ in ranked)
    (least, i, h), (most, j, k) = ranked[0], ranked[-1]
    return [
        f"{table.name}: with {DEFAULT_FRACTION:.0%} of the tokens kept, {few} of {len(ranked)} KV heads use less than "
        "half of the mean",
        f"Most: layer {j}, head {k}, {most:.2f} of the mean; least: layer {i}, head {h}, {least:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
