"""``python -m zm_mlx.generate``: mlx-lm's generation in a KV cache of fixed size.

The flags of ``mlx_lm.generate`` keep their names and meaning; those of this package come on top.
"""

import argparse
import json
import sys
from typing import Any

import mlx.core as mx

from . import caches, flags, prompts
from .caches import ROTATING_KEEP, CacheSet, Wish
from .engine import Engine, Settings, mlx_lm_generate, random_state
from .errors import UserError
from .flags import DEFAULT_MODEL
from .interrupts import INTERRUPTED
from .loading import Source, load_model, load_vocabulary, saved_source
from .model_caches import zero_merge
from .plan import context_of
from .report import Run, comparison, plan_lines, run_lines
from .saved import read
from .terminal import guarded, prefill_bar, say, warn

__all__ = ["DEFAULT_MODEL", "INTERRUPTED", "ROTATING_KEEP", "main", "mlx_lm_generate", "setup_arg_parser"]

DEFAULT_PROMPT = "hello"


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's own parser and this package's flags."""
    parser = flags.adopt(mlx_lm_generate.setup_arg_parser(), "zm_mlx.generate")
    parser.description = "Generate text in a KV cache of fixed size (ZeroMerge); mlx_lm.generate's flags and more"
    own = parser.add_argument_group("zm_mlx", f"Without --model, the package's small model is used: {DEFAULT_MODEL}")
    flags.add_prompt_file(own)
    flags.add_budget(own, "what the request needs and memory allows")
    own.add_argument(
        "--cache",
        choices=["zeromerge", "full", "rotating"],
        default="zeromerge",
        help="The KV cache: this package's (default), mlx-lm's full one, or its rotating one with the same rows",
    )
    own.add_argument("--compare", action="store_true", help="Run the prompt with the full cache too and compare")
    own.add_argument("--json", action="store_true", help="Print the closing statistics as JSON on the last line")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded("zm_mlx.generate", lambda: _generate(argv))


def _generate(argv: list[str] | None) -> int:
    args = setup_arg_parser().parse_args(argv)
    flags.check(args)
    _check(args)
    settings = Settings(args.max_tokens, args.prefill_step_size, flags.sampling(args))
    chat = prompts.Chat(
        args.system_prompt,
        args.prefill_response,
        flags.template_options(args.chat_template_config),
        args.ignore_chat_template,
    )
    text = _prompt(args.prompt, args.prompt_file)
    held, metadata = _saved(args.prompt_cache_file)
    source = _source(args, metadata)

    if settings.sampling.seed is not None:  # before the model, as in mlx-lm: it draws its first weights
        mx.random.seed(settings.sampling.seed)
    vocabulary = load_vocabulary(source)
    flags.check_vocabulary(settings.sampling, vocabulary.size)
    for token in args.extra_eos_token:
        vocabulary.add_eos(token)
    tokenizer = vocabulary.tokenizer
    if args.use_default_chat_template and not tokenizer.has_chat_template:
        raise UserError("--use-default-chat-template: this model's tokenizer has no chat template")
    tokens = (prompts.encode_rest if held else prompts.encode)(tokenizer, text, chat)
    engine = Engine(load_model(source), tokenizer)
    _warn_of_context(context_of(engine.model), held + len(tokens), args.max_tokens)

    wish = Wish(args.kv_budget, args.prefill)
    if args.prompt_cache_file is not None:
        made = caches.continued(engine.model, args.prompt_cache_file, wish, len(tokens))
    else:
        made = caches.fresh(engine.model, args.cache, wish, len(tokens), args.max_tokens)
    if args.verbose and made.plan is not None and args.cache == "zeromerge":
        say("\n".join(plan_lines(made.plan)))

    runs = []
    state = random_state()
    if args.compare:
        _heading("full cache", args.verbose)
        runs.append(_run(engine, tokens, caches.full(engine.model, made.plan), settings, args.verbose))
        _heading("zeromerge", args.verbose)
    if not runs or runs[-1].finish_reason != "interrupted":
        mx.random.seed(state)  # both runs draw the same numbers
        runs.append(_run(engine, tokens, made, settings, args.verbose))
    last = runs[-1]
    if args.verbose:
        say("=" * 10)
        say("\n".join(run_lines(last)))
        if len(runs) == 2:
            say("\n".join(comparison(runs[0], last, tokenizer.decode)))
    if args.json:
        say(json.dumps(_document(source.name, runs, made, args.compare)))
    return INTERRUPTED if last.finish_reason == "interrupted" else 0


def _run(engine: Engine, tokens: list[int], made: CacheSet, settings: Settings, verbose: bool) -> Run:
    """Generate once, streaming the text; Ctrl-C ends it with what there is."""
    mx.reset_peak_memory()
    if verbose:
        say("=" * 10)
    run = Run(made.kind, len(tokens))
    bar = prefill_bar(len(tokens), verbose)

    def progress(done: int, total: int) -> None:
        run.prefilled(done, total)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    try:
        for response in engine.generate(tokens, made.every, settings, progress):
            run.add(response)
            if verbose:
                say(response.text, end="")
    except KeyboardInterrupt:
        run.finish_reason = "interrupted"
    finally:
        bar.close()
    say("" if verbose else run.text)
    run.close(made)
    return run


def _check(args: argparse.Namespace) -> None:
    """Flags that do not go together."""
    saved = args.prompt_cache_file is not None
    if args.compare and (args.cache != "zeromerge" or saved):
        raise UserError("--compare sets the full cache beside --cache zeromerge, without --prompt-cache-file")
    if saved and args.cache != "zeromerge":
        raise UserError(f"--prompt-cache-file continues a ZeroMerge cache, so --cache {args.cache} does not go with it")
    if saved and args.system_prompt is not None:
        raise UserError(
            "--system-prompt does not go with --prompt-cache-file: the saved prompt holds already what comes before"
        )


def _prompt(text: str | None, file: str | None) -> str:
    if text is None and file is None:
        return DEFAULT_PROMPT
    return prompts.read(None if text is None else text.replace("\\n", "\n").replace("\\t", "\t"), file)


def _saved(file: str | None) -> tuple[int, dict[str, Any]]:
    """Tokens in a saved prompt, and its metadata."""
    if file is None:
        return 0, {}
    try:
        found, metadata = read(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--prompt-cache-file: {error}") from error
    return max((int(c.offset) for c in zero_merge(found)), default=0), metadata


def _source(args: argparse.Namespace, metadata: dict[str, Any]) -> Source:
    file = args.prompt_cache_file
    saved, config = saved_source(metadata, file or "")
    if args.model is not None and saved not in (None, args.model):
        raise UserError(
            f"--model {args.model} differs from the model that --prompt-cache-file {file} was saved with ({saved})"
        )
    asked = "--model" if args.model is not None or saved is None else f"--prompt-cache-file {file} was made with"
    name = args.model or saved or DEFAULT_MODEL
    return Source(name, asked, args.adapter_path, args.trust_remote_code, config)


def _warn_of_context(context: int | None, prompt: int, max_tokens: int) -> None:
    if context is None:
        return
    trained = f"the {context} that the model was trained on"
    if prompt > context:
        warn(f"{prompt} tokens are more than {trained}; the text may suffer, with any cache")
    elif max_tokens < 0 or prompt + max_tokens > context:
        new = "any number of new tokens" if max_tokens < 0 else f"{max_tokens} new tokens"
        warn(
            f"{prompt} tokens and {new} are more than {trained}: "
            f"from new token {context - prompt + 1} on the text may suffer, with any cache"
        )


def _document(model: str, runs: list[Run], made: CacheSet, compare: bool) -> dict[str, Any]:
    document = {"model": model, **runs[-1].as_dict()}
    if made.plan is not None and made.kind == "zeromerge":
        document["budget"] = {
            "rows": [list(a.rows) for a in made.plan.layouts],
            "bytes": made.plan.nbytes,
            "reason": made.plan.budget_reason,
        }
        document["prefill"] = {"mode": made.plan.prefill, "reason": made.plan.prefill_reason}
    if compare:
        document["full"] = runs[0].as_dict()
    return document


def _heading(title: str, verbose: bool) -> None:
    say(f"--- {title}" if verbose else f"{title}:")


if __name__ == "__main__":
    sys.exit(main())
