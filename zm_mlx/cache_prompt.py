"""``python -m zm_mlx.cache_prompt``: a prompt's KV cache in a file, compressed, to be continued.

``python -m zm_mlx.generate --prompt-cache-file`` continues it. The flags of ``mlx_lm.cache_prompt`` keep
their names and meaning; the file has the size of the budget.
"""

import argparse
import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from . import flags, prompts
from .engine import Engine
from .errors import UserError
from .flags import DEFAULT_MODEL
from .host import caches
from .host.caches import CacheSet, Wish
from .host.guard import settled
from .host.plan import context_of
from .host.saved import save_prompt_cache
from .host.wired import leave_wired_limit
from .interrupts import INTERRUPTED
from .loading import WIDENED, Source, folder_of, load_model, load_vocabulary, widen
from .report import peak_line, plan_lines, size
from .terminal import complain, guarded, prefill_bar, say, warn

COMMAND = "zm_mlx.cache_prompt"
ROOM = 1024  # tokens after the prompt for which a budget of auto has rows

mlx_lm_cache_prompt = importlib.import_module("mlx_lm.cache_prompt")


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's own parser and this package's flags."""
    parser = flags.adopt(mlx_lm_cache_prompt.setup_arg_parser(), COMMAND)
    parser.description = "Save the compressed KV cache of a prompt, for python -m zm_mlx.generate --prompt-cache-file"
    own = parser.add_argument_group("zm_mlx", f"Without --model, the package's small model is used: {DEFAULT_MODEL}")
    flags.add_prompt_file(own)
    flags.add_budget(own, f"room for the prompt and {ROOM:,} tokens after it, as memory allows")
    flags.add_head_rows(own)
    flags.add_policy(own)
    flags.add_bits(parser, own)
    flags.add_step(own)
    flags.add_memory(own)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(COMMAND, lambda: _cache_prompt(argv))


def _cache_prompt(argv: list[str] | None) -> int:
    args = setup_arg_parser().parse_args(argv)
    flags.check(args)
    file = args.prompt_cache_file
    _check_file(file)
    step: int = args.prefill_step_size
    if step == 1:
        raise UserError("--prefill-step-size must be 2 or more here: calls of one token are decoding")
    if args.prompt is None and args.prompt_file is None:
        raise UserError("--prompt or --prompt-file is needed")
    text = prompts.read(args.prompt, args.prompt_file)

    config = {} if args.eos_token is None else {"eos_token": args.eos_token}
    source = Source(
        args.model or DEFAULT_MODEL,
        adapter=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
        tokenizer_config=config,
    )
    if args.eos_token is not None:  # transformers would invent the token
        load_vocabulary(replace(source, tokenizer_config={})).require("--eos-token", args.eos_token)
    tokenizer = load_vocabulary(source).tokenizer
    tokens = prompts.encode_open(tokenizer, text)
    model = load_model(source)
    wide = source.name == DEFAULT_MODEL and widen(model)
    engine = Engine(model, tokenizer, source.name)

    head_rows = flags.head_rows(args.head_rows, folder_of(engine.name))
    wish = Wish(
        args.kv_budget,
        args.prefill,
        head_rows,
        args.score,
        args.policy,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        room=False,
    )
    cache_set = caches.fresh(engine.model, "zeromerge", wish, len(tokens), ROOM)
    cache_set = settled(engine.model, cache_set, len(tokens), step, args.force)
    if args.no_wired_limit:
        leave_wired_limit()
    context = context_of(engine.model)
    if context is not None and len(tokens) > context:
        warn(f"{len(tokens)} tokens are more than the {context} that the model was trained on")
    if wide:
        say(WIDENED)
    if cache_set.plan is not None:
        say("\n".join(plan_lines(cache_set.plan, cache_set.unmoved)))
    for complaint in cache_set.complaints:
        warn(complaint)
    try:
        _fill(engine, tokens, cache_set, step)
    except KeyboardInterrupt:
        complain(COMMAND, f"interrupted after {cache_set.seen or 0} of {len(tokens)} tokens, nothing was saved")
        return INTERRUPTED
    say(f"Seen: {cache_set.seen} tokens, {cache_set.state}")
    say(peak_line(mx.get_peak_memory(), cache_set.predicted))
    _save(file, cache_set, {**source.metadata, "tokens": json.dumps(tokens)})  # which a server compares with
    say(f"Saved: {size(Path(file).stat().st_size)} in {file}")
    return 0


def _fill(engine: Engine, tokens: list[int], cache_set: CacheSet, step: int) -> None:
    bar = prefill_bar(len(tokens), True)
    try:
        engine.prefill(tokens, cache_set.every, lambda done, _: bar.update(done - bar.n), step)
    finally:
        bar.close()


def _save(file: str, cache_set: CacheSet, metadata: dict[str, str]) -> None:
    try:
        save_prompt_cache(file, cache_set.every, metadata)
    except (OSError, ValueError) as failure:
        raise UserError(f"--prompt-cache-file: {failure}") from failure


def _check_file(file: str) -> None:
    """Refuse a file that cannot be written, before the prompt is read and computed."""
    path = Path(file)
    folder = path.parent
    if path.suffix != ".safetensors":
        raise UserError(f"--prompt-cache-file {file}: the name of a prompt cache file ends in .safetensors")
    if os.path.isdir(file):
        raise UserError(f"--prompt-cache-file {file}: this is a folder")
    if not os.path.isdir(folder):
        raise UserError(f"--prompt-cache-file {file}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--prompt-cache-file {file}: the folder {folder} cannot be written")


if __name__ == "__main__":
    sys.exit(main())
