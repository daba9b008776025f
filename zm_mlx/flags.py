"""Flags that several commands share: how mlx-lm's parsers become ours, and checks that need no model."""

import argparse
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from .budget import Budget
from .calibration.finding import BESIDE, Search
from .calibration.table import Table, TableError
from .drafting import LOOKUP_TOKENS, MODEL_TOKENS
from .engine import LIMITS
from .errors import UserError
from .host import ranks
from .host.prefill import STEP
from .phases import PIECE
from .policies import DEFAULT, OFFERED, named
from .policies.policy import SCORES
from .prompts import RESERVED, encodable
from .sampling import RANGES, Range, Sampling
from .state.coding import BITS, GROUPS, CodingError
from .terminal import say

DEFAULT_MODEL = str(Path(__file__).parent / "small_model")

CODED = "--kv-bits rounds rows when a compaction passes them, from the first on"
SPECULATIVE = "speculative decoding is for zm_mlx.generate, zm_mlx.chat and zm_mlx.server"
CODES = {
    "kv_bits": Range("8 or 4", int, 8, 8, BITS),
    "kv_group_size": Range("64 or 32", int, 64, 64, GROUPS),
}
DRAFTS = ("draft_model", "num_draft_tokens")
REFUSED = {
    "max_kv_size": "use --kv-budget, which holds for every model",
    "quantized_kv_start": CODED,
    "draft_model": SPECULATIVE,
    "num_draft_tokens": SPECULATIVE,
    "image": "images are mlx_lm.generate's",
    "quantize_activations": "use mlx_lm.generate",
    "pipeline": "zm_mlx.generate and zm_mlx.server run a model on several machines",
}
# argparse takes -1 for a value, but -1e5 and -inf for flags.
NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-(inf|infinity|nan)$", re.IGNORECASE)
TEXTS = ("prompt", "system_prompt", "prefill_response", "chat_template_config", "extra_eos_token", "eos_token")


def adopt(parser: argparse.ArgumentParser, command: str, served: Collection[str] = ()) -> argparse.ArgumentParser:
    """Make a parser of mlx-lm ours: its name, errors, ranges, default model, and flags refused but for ``served``."""
    parser.prog = f"python -m {command}"
    parser.error = _usage_error  # type: ignore[method-assign]
    # argparse's own drops what cannot be written.
    parser.print_help = lambda file=None: say(parser.format_help(), end="")  # type: ignore[method-assign]
    parser._negative_number_matcher = NEGATIVE
    ranges = {**RANGES, **LIMITS}
    for action in parser._actions:
        if action.dest in REFUSED and action.dest not in served:
            action.default, action.type = None, None  # None says that the flag was not given, whatever its value
            action.help = f"Refused here: {REFUSED[action.dest]}"
        elif action.dest in ranges:
            action.type = _number(action, ranges[action.dest])
            words = (action.help or "").rstrip(".")
            action.help = f"{words}; {ranges[action.dest].words}".replace("%", "%%")
        elif action.dest == "prompt":  # or --prompt-file
            action.required = False
    # None, not the default: a saved prompt names its own model.
    parser.set_defaults(model=None, prompt=None)
    _describe(parser, "model", "Local folder or Hugging Face repository; without it the small model of the package")
    _describe(parser, "prompt_cache_file", "File of a saved prompt, which python -m zm_mlx.cache_prompt writes")
    return parser


def add_prompt_file(group: Any) -> None:
    group.add_argument("--prompt-file", help="Text file in UTF-8 with the prompt, as it is ('-' reads from stdin)")


def add_budget(group: Any, auto: str) -> None:
    """``--kv-budget`` and ``--prefill``; ``auto`` says what a budget of auto means to the command."""
    group.add_argument(
        "--kv-budget",
        default=None,
        help="Size of the KV cache: a fraction of the prompt with a decimal point (0.2), rows per head (2048), "
        f"bytes for the whole model (512MB, 1.5GB), or auto: {auto} (default)",
    )
    group.add_argument(
        "--prefill",
        choices=["auto", "exact", "streaming"],
        default="auto",
        help="exact holds the whole prompt and compresses it once, streaming never holds more than the budget and "
        f"{PIECE} tokens of the prompt; "
        "auto is exact where the prompt fits into memory (default)",
    )


def add_policy(group: Any) -> None:
    """``--policy`` and ``--score``."""
    group.add_argument(
        "--policy",
        choices=OFFERED,
        default=None,
        metavar="NAME",
        help=f"The method that decides which tokens stay: {', '.join(OFFERED)} (default: {DEFAULT})",
    )
    group.add_argument(
        "--score",
        choices=SCORES,
        default=None,
        help="What keeps a token: the attention it gets (attention), or that and what the prompt's own queries give it "
        "when they are asked again from behind it, for a few percent of the prefill's arithmetic (replay), or what a "
        "second reading of the prompt gives it, at twice the prefill time (reread); without it the policy's own, which "
        f"is {named(DEFAULT).score} for {DEFAULT}",
    )


def add_bits(parser: argparse.ArgumentParser, group: Any) -> None:
    """``--kv-bits`` and ``--kv-group-size``, which not all of mlx-lm's commands have."""
    for name in ("kv_bits", "kv_group_size"):
        found = [action for action in parser._actions if action.dest == name]
        action = found[0] if found else group.add_argument(flag(name))
        action.default, action.type = None, _number(action, CODES[name])
    _describe(
        parser,
        "kv_bits",
        "Hold rows as codes of 8 or 4 bits once a compaction passes them: about half, or less than a third, of the "
        "bytes of 16-bit numbers, or as many more rows in a budget of bytes (default: as they are)",
    )
    _describe(
        parser,
        "kv_group_size",
        "With --kv-bits: numbers that share a scale and a bias, 64 or 32 (default: 64, or 32 where head dims need it)",
    )


def add_head_rows(group: Any) -> None:
    group.add_argument(
        "--head-rows",
        default=None,
        metavar="TABLE",
        help="How rows are shared out among KV heads: by a file of python -m zm_mlx.calibrate, none (uniformly), "
        f"or auto: by {BESIDE} in the model's folder, the user's own table or one of the package (default)",
    )


def add_step(group: Any) -> None:
    """``--prefill-step-size``, for a command of mlx-lm's that has none."""
    limit = LIMITS["prefill_step_size"]
    action = group.add_argument(
        "--prefill-step-size",
        default=STEP,
        help=f"Tokens of the prompt in one call of the model (default: {STEP}); {limit.words}",
    )
    action.type = _number(action, limit)


def add_memory(group: Any) -> None:
    """``--force`` and ``--no-wired-limit``."""
    group.add_argument(
        "--force",
        action="store_true",
        help="Go on where the memory guard would refuse a prompt, whose predicted peak is more than what is free",
    )
    group.add_argument(
        "--no-wired-limit",
        action="store_true",
        help="Do not let mlx-lm wire memory on macOS, where wired memory that runs out has crashed machines",
    )


def add_draft(parser: argparse.ArgumentParser, group: Any) -> None:
    """``--prompt-lookup`` beside mlx-lm's flags for a draft model, which not all of its commands have."""
    if not any(action.dest == "draft_model" for action in parser._actions):
        group.add_argument("--draft-model")
        count = group.add_argument("--num-draft-tokens")
        count.type = _number(count, LIMITS["num_draft_tokens"])
    group.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="Speculative decoding without a draft model: where the last tokens came before in the prompt or the text, "
        "propose what followed them there; faster where the text quotes its prompt",
    )
    _describe(parser, "draft_model", "A smaller model with the same tokens for speculative decoding")
    parser.set_defaults(num_draft_tokens=None)
    _describe(
        parser,
        "num_draft_tokens",
        f"Tokens that are proposed at a time, {LIMITS['num_draft_tokens'].words[len('an integer from ') :]} "
        f"(default: {MODEL_TOKENS}, with --prompt-lookup {LOOKUP_TOKENS})",
    )


def check(args: argparse.Namespace, served: Collection[str] = ()) -> None:
    """What can be said without a model, for the flags that a command has; ``served`` as for ``adopt``.

    Raises:
        UserError: a flag that is refused, a text that cannot be encoded, or a value without meaning.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name, remedy in REFUSED.items():
        if name in given and name not in served:
            raise UserError(f"{flag(name)} does not work here: {remedy}")
    for name in ("model", "draft_model", "adapter_path", "prompt_file", "prompt_cache_file", "head_rows"):
        if given.get(name, "name").strip() == "":
            raise UserError(f"{flag(name)} needs a name, not {given[name]!r}")
    for name in TEXTS:
        for text in [given.get(name, "")] if name != "extra_eos_token" else given.get(name, ()):
            encodable(flag(name), text)
    if "prompt" in given and "prompt_file" in given:
        raise UserError("--prompt and --prompt-file: give one of them")
    if "kv_budget" in given:
        budget(args.kv_budget)
    if "head_rows" in given:
        head_rows(args.head_rows)
    if "kv_group_size" in given and "kv_bits" not in given:
        raise UserError("--kv-group-size needs --kv-bits, without which no rows become codes")
    if "kv_bits" in given:
        try:
            replace(named(given.get("policy", DEFAULT)), kv_bits=args.kv_bits, kv_group_size=args.kv_group_size)
        except CodingError as error:
            raise UserError(f"--kv-bits {args.kv_bits}: {error}") from error
    if "score" in given:
        try:
            named(given.get("policy", DEFAULT), args.score)
        except ValueError as error:
            raise UserError(f"--score {args.score} does not go with --policy {args.policy}: {error}") from error


def check_several(args: argparse.Namespace) -> None:
    """Refuse what does not go with the several processes of ``mlx.launch``, or only goes with them."""
    if ranks.count() == 1:
        if args.pipeline:
            raise UserError("--pipeline splits a model's layers among the processes of mlx.launch, and there is one")
        return
    reasons = {
        "prompt_cache_file": "a saved prompt is of a whole model",
        "adapter_path": "mlx-lm does not split adapters; mlx_lm.fuse makes a model of it",
        "draft_model": "drafts are for one process",
        "prompt_lookup": "drafts are for one process",
    }
    for name, why in reasons.items():
        if getattr(args, name, None) not in (None, False):
            raise UserError(f"{flag(name)} does not go with mlx.launch: {why}")
    if "-" in (getattr(args, "prompt", None), getattr(args, "prompt_file", None)):
        raise UserError("a prompt from standard input does not go with mlx.launch, which never ends it: give a file")


def budget(text: str) -> Budget:
    """A budget as it was given."""
    try:
        return Budget.parse(text)
    except (ValueError, OverflowError) as error:
        raise UserError(f"--kv-budget: {error}") from error


def head_rows(text: str | None, folder: Path | None = None) -> Table | Search | None:
    """A table of rows per head as it was given, or a search for one, first in the model's folder."""
    if text is None or text == "auto":
        return Search(folder)
    if text == "none":
        return None
    try:
        return Table.read(text)
    except TableError as error:
        raise UserError(f"--head-rows: {error}") from error


def sampling(args: argparse.Namespace) -> Sampling:
    """The sampling that a command's flags ask for; it does not have all of them."""
    return Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling) if hasattr(args, f.name)})


def check_vocabulary(sampling: Sampling, size: int) -> None:
    """Refuse sampling that needs more tokens than the model has."""
    try:
        sampling.check_vocabulary(size)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise UserError(f"{flag(name)} {rest}") from error


def template_options(text: str | None) -> Mapping[str, Any]:
    """``--chat-template-config``: what goes to the chat template besides the messages."""
    if text is None:
        return {}
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--chat-template-config must be a JSON object: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"--chat-template-config must be a JSON object ({{...}}), not {text[:40]}")
    if taken := sorted(RESERVED & options.keys()):
        raise UserError(f"--chat-template-config must not hold {', '.join(taken)}: set by this command itself")
    return options


def flag(name: str) -> str:
    """The flag of a name in ``args``."""
    return "--" + name.replace("_", "-")


def _number(action: argparse.Action, limit: Range) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            return limit.parse(text)
        except ValueError as error:  # argparse would leave out the range
            raise UserError(f"{flag(action.dest)} {error}") from error

    return parse


def _describe(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    for action in parser._actions:
        if action.dest == name:
            action.help = text


def _usage_error(message: str) -> NoReturn:
    raise UserError(f"{message} (--help lists the flags)")
