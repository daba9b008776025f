"""``python -m zm_mlx.chat``: a conversation without an end in a KV cache of fixed size.

The flags of ``mlx_lm.chat`` keep their names and meaning; those of this package come on top. From a pipe
each line is a turn, and nothing but answers goes to standard output.
"""

import argparse
import importlib
import sys
import time
from dataclasses import replace

import mlx.core as mx

from . import drafting, flags, prompts
from .budget import Budget
from .chatting import commands, lines
from .chatting.interrupting import Interrupts
from .chatting.session import Session
from .engine import Engine, Settings
from .errors import UserError
from .flags import DEFAULT_MODEL
from .host import caches
from .host.caches import Wish
from .host.wired import leave_wired_limit
from .loading import WIDENED, folder_of, load_model, load_vocabulary, widen
from .report import Run, draft_lines, plan_lines
from .saved_prompt import Saved
from .terminal import complain, guarded, one_line, prefill_bar, say, warn

COMMAND = "zm_mlx.chat"
ROWS = 2048  # of a conversation's budget, per KV head
LONG = 512  # tokens of a turn from which on their reading shows a bar

mlx_lm_chat = importlib.import_module("mlx_lm.chat")


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's own parser and this package's flags."""
    parser = flags.adopt(mlx_lm_chat.setup_arg_parser(), COMMAND)
    parser.description = "Chat without an end in a KV cache of fixed size (ZeroMerge); mlx_lm.chat's flags and more"
    own = parser.add_argument_group("zm_mlx", f"Without --model, the package's small model is used: {DEFAULT_MODEL}")
    own.add_argument(
        "--kv-budget",
        default=None,
        help=f"Size of the KV cache, fixed for the whole conversation: rows per head (default: {ROWS}), bytes for the "
        "whole model (512MB, 1.5GB), or auto: the model's context, as memory allows",
    )
    own.add_argument(
        "--prompt-cache-file",
        help="Begin with what python -m zm_mlx.cache_prompt or /save wrote; its budget holds",
    )
    flags.add_head_rows(own)
    flags.add_policy(own)
    flags.add_bits(parser, own)
    flags.add_memory(own)
    flags.add_draft(parser, own)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(COMMAND, lambda: _chat(argv))


def _chat(argv: list[str] | None) -> int:
    args = setup_arg_parser().parse_args(argv)
    flags.check(args, flags.DRAFTS)
    asked = drafting.Asked(args.draft_model, args.prompt_lookup, args.num_draft_tokens, args.trust_remote_code)
    _check(args)
    settings = Settings(args.max_tokens, args.prefill_step_size, flags.sampling(args))
    someone = lines.interactive()
    session = _session(args, settings, someone, asked)
    if args.no_wired_limit:
        leave_wired_limit()
    _warn(session)
    if someone:
        say("Lines that begin with a slash are commands: /help lists them.")
    _talk(session, settings, someone)
    return 0


def _session(args: argparse.Namespace, settings: Settings, shown: bool, asked: drafting.Asked) -> Session:
    """The model and the conversation that the flags ask for; what is wrong shows before the weights."""
    saved = Saved.read(args.prompt_cache_file)
    source = saved.source(args.model, args.adapter_path, args.trust_remote_code)
    vocabulary = load_vocabulary(source)
    flags.check_vocabulary(settings.sampling, vocabulary.size)
    if asked.source is not None:
        drafting.require_same_tokens(asked.source, vocabulary, source.name)
    prompts.uses_template(vocabulary.tokenizer, prompts.Chat(args.system_prompt))
    mx.random.seed(settings.sampling.seed or 0)  # before the model, as in mlx-lm
    engine = Engine(load_model(source), vocabulary.tokenizer, source.name)
    wide = source.name == DEFAULT_MODEL and widen(engine.model, saved.itemsize)
    head_rows = flags.head_rows(args.head_rows, folder_of(source.name))
    wish = Wish(
        args.kv_budget,
        "streaming",
        head_rows,
        args.score,
        args.policy,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        room=not args.force,
    )
    session = Session(engine, source, replace(wish, budget=args.kv_budget or str(ROWS)), force=args.force)
    if args.prompt_cache_file is not None:
        found = caches.continued(engine.model, args.prompt_cache_file, wish, 1)
        try:
            session.go_on(found, session.standing(saved.metadata), saved.said)
        except ValueError as error:
            raise UserError(f"--prompt-cache-file {args.prompt_cache_file}: {error}") from error
    elif args.system_prompt is not None:
        session.begin(args.system_prompt)
    draft = drafting.load(asked, session.conversation.caches)
    if draft is not None:
        session.speculate(draft)
    if shown:
        if wide:
            say(WIDENED)
        if args.prompt_cache_file is None:
            say("\n".join(plan_lines(session.plan, session.conversation.caches.unmoved)))
        else:
            say(f"Loaded: {commands.facts(session)}")
        if draft is not None:
            say("\n".join(draft_lines(draft)))
    return session


def _check(args: argparse.Namespace) -> None:
    """Flags that do not go together, or not with a conversation."""
    saved = args.prompt_cache_file is not None
    if args.kv_budget is not None and Budget.parse(args.kv_budget).kind == "fraction":
        raise UserError(
            f"--kv-budget {args.kv_budget} is a fraction of the prompt, and a conversation has no length that is known "
            "before: give rows per head (2048) or bytes (512MB)"
        )
    if args.score == "reread" and args.prefill_step_size == 1:
        raise UserError("--score reread needs a --prefill-step-size of 2 or more: calls of one token are decoding")
    if saved and args.head_rows is not None:
        raise UserError("--head-rows does not go with --prompt-cache-file: the saved prompt keeps its rows")
    if saved and args.system_prompt is not None:
        raise UserError(
            "--system-prompt does not go with --prompt-cache-file: the saved prompt holds already what comes before"
        )


def _warn(session: Session) -> None:
    """What someone should know of this model before the first turn."""
    for complaint in session.conversation.caches.complaints:
        warn(complaint)
    if not session.templated:
        warn("this model has no chat template: text goes in as it is, and its continuation comes out")
    elif prompts.rewrites(session.engine.tokenizer, prompts.Chat(session.conversation.standing.system)):
        warn(
            "this model's chat template shows earlier turns in another form once others follow (such as answers "
            "without their thinking); here they stay in the cache as they were"
        )


def _talk(session: Session, settings: Settings, someone: bool) -> None:
    """Turns and commands until the input ends or /exit; without a terminal the first mistake ends them."""
    read = lines.typed if someone else lines.piped
    while True:
        try:
            entry = lines.next_entry(read)
            if entry is None:
                break
            if entry.command:
                if not commands.run(entry.text, session):
                    return
            elif entry.text.strip():
                _turn(session, entry.text, settings, someone)
        except UserError as error:
            if not someone:
                raise
            complain(COMMAND, one_line(error))
        except KeyboardInterrupt:
            if not someone:
                raise
            say("\n(/exit or Ctrl-D leaves)")
    if someone:
        say()


def _turn(session: Session, text: str, settings: Settings, someone: bool) -> None:
    """One turn: its tokens are read, and the answer is shown as it comes. Ctrl-C ends it with what there is."""
    conversation = session.conversation
    tokens = conversation.encode(text)
    session.guard(len(tokens), settings.prefill_step_size, settings.max_tokens)
    session.warn_of_context(len(tokens))
    run = Run("zeromerge", len(tokens))
    bar = prefill_bar(len(tokens), someone and len(tokens) >= LONG)

    def progress(done: int, total: int) -> None:
        run.prefilled(done, total)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    with Interrupts() as interrupts:
        try:
            for response in conversation.answer(tokens, settings, lambda: interrupts.noted, progress):
                run.add(response)
                say(response.text, end="")
        finally:
            bar.close()
    run.generation_seconds = max(0.0, time.perf_counter() - run.started - run.prompt_seconds)
    say()
    if interrupts.noted and not someone:
        raise KeyboardInterrupt
    if someone:
        say(_closing(run, len(conversation.standing.pending), interrupts.noted, settings))
    session.warn_of_context()


def _closing(run: Run, waiting: int, interrupted: bool, settings: Settings) -> str:
    """The line below an answer; ``waiting`` are the tokens of the turn that were not read."""
    read = f"{run.prompt_done}" + (f" of {run.prompt_tokens}" if waiting else "")
    parts = [
        f"read {read} tokens, {run.prompt_tps:.1f} tokens-per-sec",
        f"answered {len(run.tokens)}, {run.generation_tps:.1f} tokens-per-sec",
    ]
    if run.accepted:
        parts.append(f"{run.accepted} of them drafted")
    if interrupted:
        parts.append("interrupted" + (", the next turn reads the rest" if waiting else ""))
    elif run.finish_reason == "length":
        parts.append(f"ended by --max-tokens {settings.max_tokens}")
    return f"[{'; '.join(parts)}]"


if __name__ == "__main__":
    sys.exit(main())
