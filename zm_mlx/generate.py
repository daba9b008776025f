"""``python -m zm_mlx.generate``: mlx-lm's generation in a KV cache of fixed size.

The flags of ``mlx_lm.generate`` keep their names and meaning; those of this package come on top.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from . import drafting, flags, prompts
from .engine import Engine, Settings, mlx_lm_generate
from .errors import UserError
from .flags import DEFAULT_MODEL
from .host import caches, ranks
from .host.caches import ROTATING_KEEP, CacheSet, Taking, Wish
from .host.guard import settled
from .host.part import Way
from .host.plan import context_of
from .host.wired import leave_wired_limit
from .interrupts import INTERRUPTED
from .loading import WIDENED, folder_of, load_model, load_vocabulary, widen
from .policies import name_of
from .report import Run, comparison, differences, draft_lines, plan_lines, run_lines
from .sampling import random_state
from .saved_prompt import Saved
from .terminal import guarded, prefill_bar, say, warn

__all__ = ["DEFAULT_MODEL", "INTERRUPTED", "ROTATING_KEEP", "main", "mlx_lm_generate", "setup_arg_parser"]

DEFAULT_PROMPT = "hello"
SERVED = (*flags.DRAFTS, "pipeline")
COMPARED = ("full", "rotating")  # in this order: what the others are measured by comes first


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's own parser and this package's flags."""
    parser = flags.adopt(mlx_lm_generate.setup_arg_parser(), "zm_mlx.generate", SERVED)
    parser.description = "Generate text in a KV cache of fixed size (ZeroMerge); mlx_lm.generate's flags and more"
    own = parser.add_argument_group("zm_mlx", f"Without --model, the package's small model is used: {DEFAULT_MODEL}")
    flags.add_prompt_file(own)
    flags.add_budget(own, "what the request needs and memory allows")
    flags.add_head_rows(own)
    flags.add_policy(own)
    flags.add_bits(parser, own)
    flags.add_memory(own)
    flags.add_draft(parser, own)
    own.add_argument(
        "--pipeline",
        action="store_true",
        help="With mlx.launch: split the model's layers among the processes, not its heads",
    )
    own.add_argument(
        "--cache",
        choices=["zeromerge", "full", "rotating"],
        default="zeromerge",
        help="The KV cache: this package's (default), mlx-lm's full one, or its rotating one with the same rows",
    )
    own.add_argument(
        "--compare",
        nargs="*",
        choices=COMPARED,
        metavar="CACHE",
        help="Run the prompt with mlx-lm's caches too and compare: full (default), rotating (with as many rows per "
        "head), or both",
    )
    own.add_argument("--json", action="store_true", help="Print the closing statistics as JSON on the last line")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded("zm_mlx.generate", lambda: _generate(argv), several=True)


def _generate(argv: list[str] | None) -> int:
    args, asked = ranks.agreed(lambda: _asked(argv))
    settings = Settings(args.max_tokens, args.prefill_step_size, flags.sampling(args))
    engine, tokens, saved = ranks.agreed(lambda: _load(args, settings, asked))
    wide = engine.name == DEFAULT_MODEL and widen(engine.model, saved.itemsize)
    _warn_of_context(context_of(engine.model), saved.tokens + len(tokens), settings.max_tokens)
    cache_set, draft = ranks.agreed(lambda: _caches(args, settings, asked, engine, tokens, saved))
    if args.no_wired_limit:
        leave_wired_limit()
    if args.verbose and wide:
        say(WIDENED)
    if args.verbose and cache_set.plan is not None and cache_set.kind == "zeromerge":
        say("\n".join(plan_lines(cache_set.plan, cache_set.unmoved)))
    for complaint in cache_set.complaints:
        warn(complaint)
    if args.verbose and draft is not None:
        say("\n".join(draft_lines(draft)))
    if draft is not None:
        runs = [_run(engine, tokens, cache_set, settings, args.verbose, draft)]
    else:
        runs = _runs(engine, tokens, cache_set, settings, args.verbose, _beside(args.compare))
    if args.verbose:
        say("=" * 10)
        say("\n".join(run_lines(runs[-1])))
        if len(runs) > 1:
            say("\n".join(comparison(runs, engine.tokenizer.decode)))
    if args.json:
        say(json.dumps(_document(engine.name, runs, cache_set)))
    return INTERRUPTED if runs[-1].finish_reason == "interrupted" else 0


def _asked(argv: list[str] | None) -> tuple[argparse.Namespace, drafting.Asked]:
    """What the command line asks, checked as far as that goes without a model; and of a draft."""
    args = setup_arg_parser().parse_args(argv)
    flags.check(args, SERVED)
    asked = drafting.Asked(args.draft_model, args.prompt_lookup, args.num_draft_tokens, args.trust_remote_code)
    _check(args)
    if asked:
        _check_draft(args, asked)
    flags.check_several(args)
    return args, asked


def _caches(
    args: argparse.Namespace, settings: Settings, asked: drafting.Asked, engine: Engine, tokens: list[int], saved: Saved
) -> tuple[CacheSet, drafting.Draft | None]:
    """The caches, which will fit, and the draft."""
    one_by_one = args.prefill == "auto" and settings.prefill_step_size == 1  # which an exact prompt cannot come in
    head_rows = flags.head_rows(args.head_rows, folder_of(engine.name))
    taking: Taking = "streaming" if one_by_one else args.prefill
    wish = Wish(
        args.kv_budget,
        taking,
        head_rows,
        args.score,
        args.policy,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        room=args.cache != "zeromerge",
    )
    if args.prompt_cache_file is not None:
        cache_set = caches.continued(engine.model, args.prompt_cache_file, wish, len(tokens))
    else:
        cache_set = caches.fresh(engine.model, args.cache, wish, len(tokens), settings.max_tokens)
    draft = drafting.load(asked, cache_set, saved.said)
    beside = None if draft is None else draft.beside(settings.max_tokens)
    return settled(engine.model, cache_set, len(tokens), settings.prefill_step_size, args.force, beside), draft


def _load(args: argparse.Namespace, settings: Settings, asked: drafting.Asked) -> tuple[Engine, list[int], Saved]:
    """The model, the prompt's tokens and what a saved prompt says of itself; what is wrong shows before the weights.

    Args:
        args: checked.
        settings: their seed is set here, before the model, as in mlx-lm: a model draws its first weights.
        asked: a draft, of whose model the tokenizer is compared.
    """
    options = flags.template_options(args.chat_template_config)
    chat = prompts.Chat(args.system_prompt, args.prefill_response, options, args.ignore_chat_template)
    text = _prompt(args.prompt, args.prompt_file)
    saved = Saved.read(args.prompt_cache_file)
    source = saved.source(args.model, args.adapter_path, args.trust_remote_code)
    vocabulary = load_vocabulary(source)
    flags.check_vocabulary(settings.sampling, vocabulary.size)
    if asked.source is not None:
        drafting.require_same_tokens(asked.source, vocabulary, source.name)
    for token in args.extra_eos_token:
        vocabulary.add_eos(token)
    if args.use_default_chat_template and not vocabulary.tokenizer.has_chat_template:
        raise UserError("--use-default-chat-template: this model's tokenizer has no chat template")
    tokens = (prompts.encode_rest if saved.tokens else prompts.encode)(vocabulary.tokenizer, text, chat)
    if settings.sampling.seed is not None:
        mx.random.seed(settings.sampling.seed)
    way: Way | None = None if ranks.count() == 1 else "layers" if args.pipeline else "heads"
    return Engine(load_model(source, way), vocabulary.tokenizer, source.name), tokens, saved


def _beside(asked: list[str] | None) -> list[str]:
    """The caches that ``--compare`` names, or the full one where it names none."""
    return [] if asked is None else [name for name in COMPARED if name in (asked or ["full"])]


def _runs(
    engine: Engine, tokens: list[int], cache_set: CacheSet, settings: Settings, verbose: bool, beside: Sequence[str]
) -> list[Run]:
    """A run with each of the caches ``beside``, then one with ``cache_set``; all draw alike. An interrupt ends them."""
    state = random_state()
    runs: list[Run] = []
    for name in [*beside, cache_set.kind]:
        if beside:
            _heading(name, verbose)
            mx.random.seed(state)
        made = cache_set if name == cache_set.kind else caches.beside(engine.model, name, cache_set.plan)
        runs.append(_run(engine, tokens, made, settings, verbose))
        if runs[-1].finish_reason == "interrupted":
            break
    return runs


def _run(
    engine: Engine,
    tokens: list[int],
    cache_set: CacheSet,
    settings: Settings,
    verbose: bool,
    draft: drafting.Draft | None = None,
) -> Run:
    """Generate once, streaming the text; Ctrl-C ends it with what there is."""
    mx.reset_peak_memory()
    if verbose:
        say("=" * 10)
    run = Run(cache_set.kind, len(tokens), draft=None if draft is None else draft.name)
    bar = prefill_bar(len(tokens), verbose)

    def progress(done: int, total: int) -> None:
        run.prefilled(done, total)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    try:
        for response in engine.generate(tokens, cache_set.every, settings, progress, draft):
            run.add(response)
            if verbose:
                say(response.text, end="")
    except KeyboardInterrupt:
        run.finish_reason = "interrupted"
    finally:
        bar.close()
    say("" if verbose else run.text)
    run.close(cache_set)
    return run


def _check(args: argparse.Namespace) -> None:
    """Flags that do not go together."""
    saved = args.prompt_cache_file is not None
    if args.compare is not None and (args.cache != "zeromerge" or saved):
        raise UserError("--compare sets mlx-lm's caches beside --cache zeromerge, without --prompt-cache-file")
    if args.compare is not None and len(set(args.compare)) < len(args.compare):
        raise UserError(f"--compare {' '.join(args.compare)}: name each cache once")
    if saved and args.cache != "zeromerge":
        raise UserError(f"--prompt-cache-file continues a ZeroMerge cache, so --cache {args.cache} does not go with it")
    if args.prefill == "exact" and args.prefill_step_size == 1:
        raise UserError("--prefill exact needs a --prefill-step-size of 2 or more: calls of one token are decoding")
    if saved and args.head_rows is not None:
        raise UserError("--head-rows does not go with --prompt-cache-file: the saved prompt keeps its rows")
    for name in ("policy", "score", "kv_bits"):
        value = getattr(args, name)
        if value is not None and args.cache != "zeromerge":
            raise UserError(
                f"{flags.flag(name)} {value} is of --cache zeromerge, so --cache {args.cache} does not go with it"
            )
    if args.score == "reread" and args.prefill_step_size == 1:
        raise UserError("--score reread needs a --prefill-step-size of 2 or more: calls of one token are decoding")
    if saved and args.system_prompt is not None:
        raise UserError(
            "--system-prompt does not go with --prompt-cache-file: the saved prompt holds already what comes before"
        )


def _check_draft(args: argparse.Namespace, asked: drafting.Asked) -> None:
    """Flags that do not go with a draft."""
    if args.compare is not None:
        raise UserError(f"--compare does not go with {asked.flag}: caches are compared without a draft")
    if args.cache == "rotating":
        raise UserError(f"--cache rotating does not go with {asked.flag}: it cannot give rejected tokens back")


def _prompt(text: str | None, file: str | None) -> str:
    if text is None and file is None:
        return DEFAULT_PROMPT
    return prompts.read(None if text is None else text.replace("\\n", "\n").replace("\\t", "\t"), file)


def _warn_of_context(context: int | None, prompt: int, max_tokens: int) -> None:
    if context is None:
        return
    trained = f"the {context} that the model was trained on"
    if prompt > context:
        warn(f"{prompt} tokens are more than {trained}; the text may suffer, with any cache")
    elif max_tokens < 0 or prompt + max_tokens > context:
        new = "new ones without a limit can be" if max_tokens < 0 else f"{max_tokens} new ones are"
        warn(
            f"{prompt} tokens and {new} more than {trained}: "
            f"from new token {context - prompt + 1} on the text may suffer, with any cache"
        )


def _document(model: str, runs: list[Run], cache_set: CacheSet) -> dict[str, Any]:
    document = {"model": model, **runs[-1].as_dict()}
    if cache_set.plan is not None and cache_set.kind == "zeromerge":
        document["budget"] = {
            "rows": [list(a.rows) for a in cache_set.plan.layouts],
            "bytes": cache_set.plan.nbytes,
            "reason": cache_set.plan.budget_reason,
            "head_rows": cache_set.plan.heads_reason,
        }
        if cache_set.plan.on_ranks:
            document["budget"]["bytes_on_ranks"] = cache_set.plan.on_ranks
        document["policy"] = name_of(cache_set.plan.policy)
        document["score"] = cache_set.plan.policy.score
        document["prefill"] = {"mode": cache_set.plan.prefill, "reason": cache_set.plan.prefill_reason}
    if len(runs) > 1:
        document |= {run.cache: run.as_dict() for run in runs[:-1]}
        document["first_difference"] = {"from": runs[0].cache, **differences(runs)}
    return document


def _heading(name: str, verbose: bool) -> None:
    title = name if name == "zeromerge" else f"{name} cache"
    say(f"--- {title}" if verbose else f"{title}:")


if __name__ == "__main__":
    sys.exit(main())
