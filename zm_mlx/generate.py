"""``python -m zm_mlx.generate``: mlx-lm's generation in a KV cache of fixed size.

The flags of ``mlx_lm.generate`` keep their names and meaning; those of this package come on top.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load
from tqdm import tqdm

from .budget import Budget
from .cache import ZeroMergeCache
from .errors import UnsupportedModelError
from .hook import replace_caches
from .plan import Plan, context_of, plan_cache
from .report import Run, comparison, plan_lines, run_lines
from .saved import load_prompt_cache, read

mlx_lm_generate = importlib.import_module("mlx_lm.generate")  # the package's name of it is the function

DEFAULT_MODEL = str(Path(__file__).parent / "small_model")
DEFAULT_PROMPT = "hello"
DEFAULT_KV_BUDGET = "auto"
ROTATING_KEEP = 4  # first tokens that mlx-lm's rotating cache never overwrites, mlx-lm's own number
INTERRUPTED = 130  # exit code of a process that Ctrl-C ended

REFUSED = {
    "max_kv_size": "use --kv-budget, which holds for every model",
    "kv_bits": "a quantised KV cache is mlx_lm.generate's",
    "draft_model": "speculative decoding needs a cache that can be trimmed; use mlx_lm.generate",
    "image": "images are mlx_lm.generate's",
    "quantize_activations": "use mlx_lm.generate",
}


class UserError(Exception):
    """Something that the user can mend; the message is one line that says how."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's own parser and this package's flags."""
    parser: argparse.ArgumentParser = mlx_lm_generate.setup_arg_parser()
    parser.prog = "python -m zm_mlx.generate"
    parser.description = "Generate text in a KV cache of fixed size (ZeroMerge); mlx_lm.generate's flags and more"
    parser.error = _usage_error  # type: ignore[method-assign]
    parser.set_defaults(prompt=None)
    own = parser.add_argument_group("zm_mlx", f"Without --model, the package's small model is used: {DEFAULT_MODEL}")
    own.add_argument("--prompt-file", help="Text file with the prompt, as it is")
    own.add_argument(
        "--kv-budget",
        default=None,
        help="Size of the KV cache: a fraction of the prompt with a decimal point (0.2), rows per head (2048), "
        "bytes for the whole model (512MB, 1.5GB), or auto: what the request needs and memory allows (default)",
    )
    own.add_argument(
        "--prefill",
        choices=["auto", "exact", "streaming"],
        default="auto",
        help="exact holds the whole prompt and compresses it once, streaming never exceeds the budget; "
        "auto is exact where the prompt fits into memory (default)",
    )
    own.add_argument(
        "--cache",
        choices=["zeromerge", "full", "rotating"],
        default="zeromerge",
        help="The KV cache: this package's (default), mlx-lm's full one, or its rotating one with the same rows",
    )
    own.add_argument(
        "--compare",
        action="store_true",
        help="Run the prompt with the full cache too and compare",
    )
    own.add_argument("--json", action="store_true", help="Print the closing statistics as JSON on the last line")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        args = setup_arg_parser().parse_args(argv)
        _check(args)
        return _generate(args)
    except (UserError, UnsupportedModelError) as error:
        print(f"zm_mlx.generate: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zm_mlx.generate: interrupted before anything was generated", file=sys.stderr)
        return INTERRUPTED


def _generate(args: argparse.Namespace) -> int:
    text = _read_prompt(args)
    saved_metadata = _saved_metadata(args)
    model, tokenizer = _load(args, saved_metadata)
    prompt = _encode(args, tokenizer, text)
    caches, made = _caches(args, model, len(prompt))
    _warn_of_context(model, sum(c.offset for c in _own(caches)[:1]) + len(prompt))
    if args.verbose and made and args.cache == "zeromerge":
        print("\n".join(plan_lines(made)))

    runs = []
    if args.compare:
        _heading(args, "full cache")
        runs.append(_run(args, model, tokenizer, prompt, "full", make_prompt_cache(model), made))
        _heading(args, "zeromerge")
    if not runs or runs[-1].finish_reason != "interrupted":
        runs.append(_run(args, model, tokenizer, prompt, args.cache, caches, made))
    last = runs[-1]
    if args.verbose:
        print("=" * 10)
        print("\n".join(run_lines(last, made)))
        if len(runs) == 2:
            print("\n".join(comparison(runs[0], last, tokenizer.decode)))
    if args.json:
        print(json.dumps(_document(args, runs, made, prompt)))
    return INTERRUPTED if last.finish_reason == "interrupted" else 0


def _run(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    cache: str,
    caches: list[Any],
    made: Plan | None,
) -> Run:
    """Generate once, streaming the text; Ctrl-C ends it with what there is."""
    if args.seed is not None:
        mx.random.seed(args.seed)
    mx.reset_peak_memory()
    sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    if args.verbose:
        print("=" * 10)
    run = Run(cache, len(prompt))
    bar = tqdm(total=len(prompt), desc="Prefill", unit="token", leave=False, disable=not args.verbose)

    def progress(done: int, total: int) -> None:
        run.prefilled(done, total)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    responses = mlx_lm_generate.stream_generate(
        model,
        tokenizer,
        mx.array(prompt),
        max_tokens=args.max_tokens,
        sampler=sampler,
        prompt_cache=caches,
        prefill_step_size=args.prefill_step_size,
        prompt_progress_callback=progress,
    )
    try:
        for response in responses:
            run.tokens.append(response.token)
            run.text += response.text
            run.finish_reason = response.finish_reason
            if args.verbose:
                print(response.text, end="", flush=True)
    except KeyboardInterrupt:
        run.finish_reason = "interrupted"
    finally:
        bar.close()
    print("" if args.verbose else run.text)
    run.close(caches, made)
    return run


def _caches(args: argparse.Namespace, model: nn.Module, prompt_tokens: int) -> tuple[list[Any], Plan | None]:
    """The caches of the main run, and the plan they follow (none for a full cache of a model we cannot serve)."""
    if args.prompt_cache_file is not None:
        return _continued(args, model, prompt_tokens), None
    context = context_of(model)
    unlimited = max(0, (context or 0) - prompt_tokens)
    try:
        made = plan_cache(
            model,
            args.kv_budget or DEFAULT_KV_BUDGET,
            prompt_length=prompt_tokens,
            prefill=args.prefill,
            max_tokens=args.max_tokens if args.max_tokens > 0 else unlimited,
        )
    except UnsupportedModelError:
        if args.cache == "full" and not args.compare:
            return make_prompt_cache(model), None
        raise
    except ValueError as error:
        raise UserError(f"--kv-budget: {error}") from error
    if args.cache == "full":
        return make_prompt_cache(model), made
    if args.cache == "rotating":
        rows = [a.capacity for a in made.layouts]
        return replace_caches(make_prompt_cache(model), lambda i: RotatingKVCache(rows[i], keep=ROTATING_KEEP)), made
    return made.caches(model), made


def _continued(args: argparse.Namespace, model: nn.Module, prompt_tokens: int) -> list[Any]:
    """Saved caches, whose budget holds."""
    file = args.prompt_cache_file
    try:
        caches = load_prompt_cache(file, model)
    except (OSError, ValueError) as error:
        raise UserError(f"--prompt-cache-file: {error}") from error
    held = [c.table for c in _own(caches)]
    if args.kv_budget is not None and any(str(t) != args.kv_budget for t in held):
        rows = ", ".join(sorted({str(t) for t in held}))
        raise UserError(
            f"--kv-budget {args.kv_budget} differs from the budget that --prompt-cache-file {file} was saved with "
            f"({rows} rows per head): leave --kv-budget out"
        )
    if args.prefill == "exact":
        for cache in _own(caches):
            cache.begin_prompt(prompt_tokens)
    return caches


def _load(args: argparse.Namespace, saved: dict[str, str]) -> tuple[nn.Module, Any]:
    name = args.model or saved.get("model")
    if args.model and saved.get("model") not in (None, args.model):
        raise UserError(
            f"--model {args.model} differs from the model that --prompt-cache-file {args.prompt_cache_file} "
            f"was saved with ({saved['model']})"
        )
    name = name or DEFAULT_MODEL
    config = json.loads(saved.get("tokenizer_config", "{}"))
    config["trust_remote_code"] = args.trust_remote_code
    try:
        model, tokenizer = load(
            name, adapter_path=args.adapter_path, tokenizer_config=config, trust_remote_code=args.trust_remote_code
        )[:2]
    except Exception as error:  # the loader, the Hub's client and the network fail in many ways
        if Path(name).exists():
            raise UserError(f"--model {name}: cannot be loaded ({type(error).__name__}: {error})") from error
        raise UserError(
            f"--model {name}: not a local folder, and the Hugging Face Hub does not have it or cannot be reached; "
            f"check the name and the network ({type(error).__name__}: {error})"
        ) from error
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    return model, tokenizer


def _read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text, whichever flag brings it."""
    if args.prompt_file is not None:
        source = f"--prompt-file {args.prompt_file}"
        try:
            text = Path(args.prompt_file).read_bytes().decode("utf-8")
        except OSError as error:
            raise UserError(f"{source}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: not a text file in UTF-8 (byte {error.start} cannot be read)") from error
    elif args.prompt == "-":
        source = "--prompt -"
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: standard input is not text in UTF-8") from error
    else:
        source = "--prompt"
        text = DEFAULT_PROMPT if args.prompt is None else args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if "\0" in text:
        raise UserError(f"{source}: this is a binary file, not text")
    if not text.strip():
        raise UserError(f"{source}: the prompt is empty")
    return text


def _encode(args: argparse.Namespace, tokenizer: Any, prompt: str) -> list[int]:
    """Token ids, through the chat template where there is one, as mlx-lm does it."""
    use_template = not args.ignore_chat_template and tokenizer.has_chat_template
    if not use_template:
        for flag in ("system_prompt", "prefill_response"):
            if getattr(args, flag) is not None:
                raise UserError(
                    f"--{flag.replace('_', '-')} needs a chat template: this model has none, or it is ignored"
                )
        if args.use_default_chat_template and not tokenizer.has_chat_template:
            raise UserError("--use-default-chat-template: this model's tokenizer has no chat template")
        return list(tokenizer.encode(prompt))
    options = json.loads(args.chat_template_config) if args.chat_template_config else {}

    def render(content: str) -> str:
        messages = [{"role": "user", "content": content}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        if args.prefill_response is not None:
            messages.append({"role": "assistant", "content": args.prefill_response})
        continues = args.prefill_response is not None
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=continues,
                add_generation_prompt=not continues,
                **options,
            )
        )

    text = render(prompt)
    if args.prompt_cache_file is not None:  # the saved cache holds what comes before the query
        text = text[render("<query>").index("<query>") :]
    return list(tokenizer.encode(text, add_special_tokens=False))


def _check(args: argparse.Namespace) -> None:
    """Errors that need no model."""
    for name, remedy in REFUSED.items():
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} does not work here: {remedy}")
    if args.prompt is not None and args.prompt_file is not None:
        raise UserError("--prompt and --prompt-file: give one of them")
    if args.max_tokens < 1 and args.max_tokens != -1:
        raise UserError(f"--max-tokens must be 1 or more, or -1 for no limit, not {args.max_tokens}")
    if args.prefill_step_size < 1:
        raise UserError(f"--prefill-step-size must be 1 or more, not {args.prefill_step_size}")
    if args.temp < 0:
        raise UserError(f"--temp must be 0 or more, not {args.temp}")
    if args.kv_budget is not None:
        try:
            Budget.parse(args.kv_budget)
        except ValueError as error:
            raise UserError(f"--kv-budget: {error}") from error
    if args.compare and (args.cache != "zeromerge" or args.prompt_cache_file is not None):
        raise UserError("--compare sets the full cache beside --cache zeromerge, without --prompt-cache-file")
    if args.prompt_cache_file is not None and args.cache != "zeromerge":
        raise UserError(f"--prompt-cache-file continues a ZeroMerge cache, so --cache {args.cache} does not go with it")


def _saved_metadata(args: argparse.Namespace) -> dict[str, str]:
    if args.prompt_cache_file is None:
        return {}
    try:
        return read(args.prompt_cache_file)[1]
    except (OSError, ValueError) as error:
        raise UserError(f"--prompt-cache-file: {error}") from error


def _warn_of_context(model: nn.Module, tokens: int) -> None:
    context = context_of(model)
    if context is not None and tokens > context:
        print(
            f"warning: {tokens} tokens are more than the {context} that the model was trained on; "
            "the text may suffer, with any cache",
            file=sys.stderr,
        )


def _document(args: argparse.Namespace, runs: list[Run], made: Plan | None, prompt: list[int]) -> dict[str, Any]:
    document = {"model": args.model or DEFAULT_MODEL, **runs[-1].as_dict()}
    if made is not None and args.cache == "zeromerge":
        document["budget"] = {
            "rows": [list(a.rows) for a in made.layouts],
            "bytes": made.nbytes,
            "reason": made.budget_reason,
        }
        document["prefill"] = {"mode": made.prefill, "reason": made.prefill_reason}
    if args.compare:
        document["full"] = runs[0].as_dict()
    return document


def _own(caches: list[Any]) -> list[ZeroMergeCache]:
    return [c for c in caches if isinstance(c, ZeroMergeCache)]


def _heading(args: argparse.Namespace, title: str) -> None:
    print(f"--- {title}" if args.verbose else f"{title}:")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _usage_error(message: str) -> NoReturn:
    raise UserError(f"{message} (--help lists the flags)")


if __name__ == "__main__":
    sys.exit(main())
