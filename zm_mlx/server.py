"""``python -m zm_mlx.server``: mlx-lm's server, OpenAI's API over KV caches of fixed size.

The flags of ``mlx_lm.server`` keep their names and meaning; those of this package come on top.
"""

import argparse
import importlib
import ipaddress
import logging
import os
import signal
import sys
import time
import warnings
from types import SimpleNamespace
from typing import Any

from . import flags
from .budget import Budget
from .drafting import MODEL_TOKENS
from .errors import UserError
from .flags import DEFAULT_MODEL
from .host import ranks
from .host.wired import leave_wired_limit
from .loading import Source
from .report import draft_lines, plan_lines, size
from .saved_prompt import Saved
from .serving.handler import Handler, Server
from .serving.loop import Generator
from .serving.opening import first_snapshot, tokens_of
from .serving.provider import ROWS, Provider, Served
from .serving.waiting import PATIENCE, QUEUE
from .terminal import guarded, say, warn

COMMAND = "zm_mlx.server"
SERVED = (*flags.DRAFTS, "pipeline")
PROMPTS = 4  # read at the same time, by default
STEP = 512  # tokens of each of them in one call of the model, by default
SNAPSHOTS = 32
GRACE = 0.3  # seconds at the end, in which clients hear that the server stops

mlx_lm_server: Any = importlib.import_module("mlx_lm.server")


class _Parser(BaseException):
    """mlx-lm's parser, at the moment when it would parse."""


class _Catching(argparse.ArgumentParser):
    def parse_args(self, *_: Any, **__: Any) -> Any:
        raise _Parser(self)


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's own parser and this package's flags."""
    parser = flags.adopt(_theirs(), COMMAND, SERVED)
    parser.description = "Serve OpenAI's API over KV caches of fixed size (ZeroMerge); mlx_lm.server's flags and more"
    parser.set_defaults(
        log_level="WARNING",
        prompt_concurrency=PROMPTS,
        prefill_step_size=STEP,
        prompt_cache_size=SNAPSHOTS,
        num_draft_tokens=None,
    )
    helps = {
        "log_level": "Set the logging level (default: WARNING)",
        "prompt_concurrency": f"Prompts that are read at the same time, where memory allows (default: {PROMPTS})",
        "prefill_step_size": f"Tokens of each of these prompts in one call of the model (default: {STEP})",
        "prompt_cache_size": f"Prompts and answers that are kept for others that begin alike (default: {SNAPSHOTS})",
        "prompt_cache_bytes": "Bytes that these may take within --max-kv-memory",
        "draft_model": "A smaller model with the same tokens for speculative decoding; requests then take turns",
        "num_draft_tokens": f"Tokens that it proposes at a time (default: {MODEL_TOKENS})",
    }
    for action in parser._actions:
        action.help = helps.get(action.dest, action.help)
    own = parser.add_argument_group("zm_mlx", f"Without --model, the package's small model is used: {DEFAULT_MODEL}")
    own.add_argument(
        "--kv-budget",
        default=None,
        help=f"Size of each sequence's KV cache: rows per head (default: {ROWS}, or the model's context if that is "
        "less), or bytes (512MB)",
    )
    own.add_argument(
        "--max-kv-memory",
        default=None,
        help="Memory for all KV caches together (8GB); sequences and kept prompts each take one --kv-budget of it, and "
        f"requests beyond that wait, up to {QUEUE} of them and {PATIENCE:.0f} seconds (default: half of what is free)",
    )
    own.add_argument(
        "--prompt-cache-file",
        help="A prompt that python -m zm_mlx.cache_prompt saved: requests that begin with it go on from it",
    )
    flags.add_head_rows(own)
    flags.add_policy(own)
    flags.add_bits(parser, own)
    flags.add_memory(own)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the server until it is interrupted; returns the exit code if none was started, else ends the process."""
    started: list[Generator] = []
    code = guarded(COMMAND, lambda: _serve(argv, started), several=True)
    if started:  # a thread that used MLX makes the interpreter's own way out abort
        os._exit(code)
    return code


def _serve(argv: list[str] | None, started: list[Generator]) -> int:
    args, saved, source = ranks.agreed(lambda: _asked(argv))
    tokens = None if saved.file is None else tokens_of(saved)

    def opening(served: Served, snapshots: Any) -> None:
        if tokens is not None:
            first_snapshot(saved, tokens, served, snapshots)

    if args.no_wired_limit:
        leave_wired_limit()
    mlx_lm_server.maybe_set_recommended_wired_limit()
    generator = Generator(Provider(args, source, saved.itemsize), opening)
    started.append(generator)
    try:
        served = generator.loaded.result()
        say("\n".join(_lines(served, args)))
        _run(args, generator)
    finally:
        if generator.loaded.done():  # or the process ends in the middle of loading
            generator.stop_and_join()
            time.sleep(GRACE)
    return 0


def _asked(argv: list[str] | None) -> tuple[argparse.Namespace, Saved, Source]:
    """What the command line asks, checked as far as that goes without a model."""
    args = setup_arg_parser().parse_args(argv)
    flags.check(args, SERVED)
    _check(args)
    logging.basicConfig(level=args.log_level, format="%(asctime)s - %(levelname)s - %(message)s")
    saved = Saved.read(args.prompt_cache_file)
    source = saved.source(args.model, args.adapter_path, args.trust_remote_code)
    args.model = source.name
    return args, saved, source


def _run(args: argparse.Namespace, generator: Generator) -> None:
    """mlx-lm's server of HTTP, with our handler: its own ``run`` takes none. Only rank 0 has one."""
    if ranks.rank():
        generator.join()
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what waits is answered before the process ends
    warnings.filterwarnings("ignore", "mlx_lm.server is not recommended")  # said above, where it matters
    try:
        mlx_lm_server._run_http_server(args.host, args.port, generator, Server, Handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {args.host} --port {args.port}: {getattr(error, 'strerror', None) or error}"
        ) from error


def _lines(served: Served, args: argparse.Namespace) -> list[str]:
    slots, cost = served.slots, served.slots.cost
    for complaint in served.plan.complaints:
        warn(complaint)
    if not _loopback(args.host):
        warn(f"--host {args.host}: whoever reaches this address can use the server, which knows no passwords")
    return [
        *plan_lines(served.plan),
        *(draft_lines(served.draft) if served.draft else []),
        f"Slots: {slots.total} of {size(cost.sequence)}, for sequences and kept prompts, in {size(slots.memory)}; "
        f"{slots.prompts} prompts are read at a time, with {size(cost.piece)} each on top",
        f"Serving: {served.key[0]} at http://{args.host}:{args.port}/v1 (/health, /v1/kv)",
    ]


def _check(args: argparse.Namespace) -> None:
    """Flags that do not work for a server, and values without meaning."""
    if args.num_draft_tokens is not None and args.draft_model is None:
        raise UserError("--num-draft-tokens needs --draft-model")
    args.num_draft_tokens = args.num_draft_tokens or (
        MODEL_TOKENS if args.draft_model else 0
    )  # mlx-lm's handler reads it
    flags.check_several(args)
    if args.kv_budget is not None:
        kind = Budget.parse(args.kv_budget).kind
        if kind == "fraction":
            raise UserError(
                f"--kv-budget {args.kv_budget} is a fraction of the prompt, and a server does not know its prompts: "
                "give rows per head (2048) or bytes (512MB)"
            )
        args.kv_budget = None if kind == "auto" else args.kv_budget
    if args.max_kv_memory is not None and not _bytes(args.max_kv_memory):
        raise UserError(f"--max-kv-memory must be bytes with a unit (8GB, 512MB), not {args.max_kv_memory!r}")
    if args.score == "reread":
        raise UserError("--score reread reads each prompt twice, which a server does not: use replay")
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens must be an integer from 1 up here, not {args.max_tokens}")
    for name, least in (("decode_concurrency", 1), ("prompt_concurrency", 1), ("prompt_cache_size", 0), ("port", 0)):
        if getattr(args, name) < least:
            raise UserError(f"{flags.flag(name)} must be an integer from {least} up, not {getattr(args, name)}")
    if not isinstance(args.chat_template_args, dict):
        raise UserError("--chat-template-args must be a JSON object ({...})")


def _bytes(text: str) -> bool:
    try:
        return Budget.parse(text).kind == "bytes"
    except (ValueError, OverflowError):
        return False


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _theirs() -> argparse.ArgumentParser:
    """mlx-lm's parser, which its ``main`` makes and gives to nobody: it is caught where it would parse."""
    own = mlx_lm_server.argparse
    mlx_lm_server.argparse = SimpleNamespace(**{**vars(own), "ArgumentParser": _Catching})
    try:
        mlx_lm_server.main()
    except _Parser as caught:
        parser: argparse.ArgumentParser = caught.args[0]
        parser.__class__ = argparse.ArgumentParser
        return parser
    finally:
        mlx_lm_server.argparse = own
    raise RuntimeError("mlx_lm.server makes its parser in another way than zm_mlx knows")


if __name__ == "__main__":
    sys.exit(main())
