"""mlx-lm's speculative decoding for ZeroMerge caches: prompts are read as prompts, and drafts need no model.

``register`` puts ``speculative_generate_step`` in place of mlx-lm's, which ``mlx_lm.stream_generate`` calls.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import Sampler

from .lookup import PromptLookup, Step, lookup_steps
from .model_caches import zero_merge
from .prefill import STEP, Progress
from .rollback import reading

mlx_lm_generate: Any = importlib.import_module("mlx_lm.generate")  # the package's name of it is the function

_original: Callable[..., Iterator[Step]] = mlx_lm_generate.speculative_generate_step

Reader = tuple[Any, list[Any]]  # a model and its caches


def speculative_generate_step(
    prompt: mx.array,
    model: Any,
    draft_model: Any,
    stream: Any = mlx_lm_generate.generation_stream,
    *,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = STEP,
    **more: Any,
) -> Iterator[Step]:
    """mlx-lm's function of this name, which also takes a ``PromptLookup`` for a draft model.

    mlx-lm would give the last tokens of a prompt to the model in calls as short as those that verify drafts, and
    caches in a scope of ``rollback`` cannot tell them apart. So the prompt is read here, in the calls in which
    ``generate_step`` would read it, and mlx-lm goes on with its last token.

    Raises:
        ValueError: the draft model's ZeroMerge caches are in no such scope: mlx-lm looks at the model's alone. Or a
            setting does not go with a ``PromptLookup``.
    """
    if isinstance(draft_model, PromptLookup):
        caches = make_prompt_cache(model) if prompt_cache is None else prompt_cache
        draft_model.extend(_numbers(prompt))
        with mx.stream(stream):
            fill([(model, caches)], prompt[:-1], prefill_step_size)
            yield from _counted(lookup_steps(prompt, model, draft_model, caches, **_of_lookup(**more)), caches)
        return
    own = zero_merge(prompt_cache or [])
    if prompt_cache is not None and any(c.log is not None for c in own):
        if any(c.log is None for c in own):
            raise ValueError("the caches of model and draft model must be in one scope of zm_mlx.rollback, all of them")
        split = len(model.layers)
        with mx.stream(stream):
            fill([(draft_model, prompt_cache[split:]), (model, prompt_cache[:split])], prompt[:-1], prefill_step_size)
        prompt = prompt[-1:]
    elif _drafts_alone(prompt_cache or [], len(model.layers)):
        raise ValueError("the draft model's caches must be in a scope of zm_mlx.rollback")
    more |= {"prompt_cache": prompt_cache, "prefill_step_size": prefill_step_size}
    yield from _counted(_original(prompt, model, draft_model, stream, **more), prompt_cache or [])


def _drafts_alone(caches: list[Any], split: int) -> bool:
    """Whether the draft model's caches cannot give back and the model's can; else mlx-lm says what it refuses."""
    return bool(zero_merge(caches[split:])) and all(c.is_trimmable() for c in caches[:split])


def fill(readers: Sequence[Reader], tokens: mx.array, step: int, progress: Progress | None = None) -> None:
    """Advance the caches of several models by tokens [n], in the calls in which mlx-lm's ``generate_step`` would."""
    with reading([c for _, caches in readers for c in caches]):
        for begin in range(0, tokens.size, step):
            part = tokens[begin : begin + step]
            for model, caches in readers:
                model(part[None], cache=caches)
                mx.eval([c.state for c in caches])
            mx.clear_cache()
            if progress is not None:
                progress(begin + part.size, tokens.size)


def _counted(steps: Iterator[Step], caches: Sequence[Any]) -> Iterator[Step]:
    """Steps, of which the caches' scope knows how many were given: no more is accepted of what is drafted."""
    log = next((c.log for c in zero_merge(caches) if c.log is not None), None)
    if log is None:
        yield from steps
        return
    held = int(zero_merge(caches)[0].offset) - log.begun
    log.scope.most = held + 1  # the prompt's last token
    try:
        for step in steps:
            log.scope.most += 1
            yield step
        log.scope.most = None
    except GeneratorExit:
        steps.close()  # type: ignore[attr-defined]
        log.scope.most = None
        raise


def _of_lookup(
    num_draft_tokens: int = 2, max_tokens: int = 256, sampler: Sampler | None = None, **more: Any
) -> dict[str, Any]:
    """mlx-lm's settings as prompt lookup takes them, without those that say nothing."""
    for name in ("logits_processors", "kv_bits"):
        if more.get(name):
            raise ValueError(f"{name} does not go with prompt lookup")
    return {"num_draft_tokens": num_draft_tokens, "max_tokens": max_tokens, "sampler": sampler}


def _numbers(tokens: mx.array) -> list[int]:
    found: Any = tokens.tolist()
    return list(found)


def register() -> None:
    """Let mlx-lm's generation speculate with the caches of this package."""
    mlx_lm_generate.speculative_generate_step = speculative_generate_step
