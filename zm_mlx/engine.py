"""Generation with a model, without flags: what all commands call."""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .drafting import Draft
from .host.lookup import PromptLookup
from .host.model_caches import members, zero_merge
from .host.part import part_of
from .host.prefill import STEP, Progress, prefill
from .host.ranks import drawn_by_first
from .host.rollback import rollback
from .host.speculating import fill
from .sampling import LARGEST, Range, Sampling

mlx_lm_generate = importlib.import_module("mlx_lm.generate")  # the package's name of it is the function

LIMITS: dict[str, Range] = {
    "max_tokens": Range("an integer from 1 up, or -1 for no limit", int, 1, LARGEST, (-1,)),
    "prefill_step_size": Range("an integer from 1 up", int, 1, LARGEST),
    "num_draft_tokens": Range("an integer from 1 to 64", int, 1, 64),
}


@dataclass(frozen=True)
class Settings:
    """What one generation is asked for; ``max_tokens=-1`` has no limit.

    Raises:
        ValueError: a value is out of range; the message names it and the range.
    """

    max_tokens: int = 100
    prefill_step_size: int = STEP
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "prefill_step_size"):
            try:
                LIMITS[name].check(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None


class Engine:
    """A model, its tokenizer, and the name it was asked for by."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name

    def generate(
        self,
        tokens: list[int],
        caches: list[Any],
        settings: Settings,
        progress: Progress | None = None,
        draft: Draft | None = None,
    ) -> Iterator[Any]:
        """mlx-lm's responses to a prompt, one a token; ``caches`` (one a layer) are advanced in place.

        With a draft, its caches too; greedy tokens stay what they are without it.

        The seed is not set here: mlx-lm's command sets it before it loads the model, which draws from it too.
        """
        if draft is not None:
            return self._speculate(tokens, caches, settings, progress, draft)
        if len(tokens) > 1 and _read_twice(caches):
            return self._after_reading(tokens, caches, settings, progress)
        return self._stream(tokens, caches, settings, progress)

    def _after_reading(
        self, tokens: list[int], caches: list[Any], settings: Settings, progress: Progress | None
    ) -> Iterator[Any]:
        """``generate`` for caches whose prompt this package reads, all but the last token."""
        total = len(tokens)
        report = progress or (lambda done, total: None)
        with mlx_lm_generate.wired_limit(self.model):
            step = settings.prefill_step_size
            prefill(self.model, tokens[:-1], caches, step=step, progress=lambda done, _: report(done, total))
        yield from self._stream(tokens[-1:], caches, settings, lambda done, last: report(total - last + done, total))

    def _speculate(
        self, tokens: list[int], caches: list[Any], settings: Settings, progress: Progress | None, draft: Draft
    ) -> Iterator[Any]:
        """``generate`` with a draft: both read the prompt but for its last token, then the caches can give back.

        A draft model that has read nothing yet reads first what is known of the tokens before the prompt. Where nothing
        is, it begins with the prompt: its proposals are worse, and the tokens the same.

        At the end, or where whoever listens has heard enough, they hold all that was given, as without a draft.
        """
        total, step = len(tokens), settings.prefill_step_size
        report = progress or (lambda done, total: None)
        readers = [(draft.model, draft.every)] if draft.model is not None else []
        if readers and not _seen(draft.every):
            fill(readers, mx.array(list(draft.before)), step)
        begun = [(model, own, _seen(own)) for model, own in [*readers, (self.model, caches)]]
        prompt = mx.array(tokens[:-1])
        with mlx_lm_generate.wired_limit(self.model):
            if total > 1 and _read_twice(caches):
                prefill(self.model, prompt, caches, step=step, progress=lambda done, _: report(done, total))
                fill(readers, prompt, step)
            else:
                fill([*readers, (self.model, caches)], prompt, step, lambda done, _: report(done, total))
        every, known = [*caches, *draft.every], list(tokens)
        with rollback(every, draft.count):
            responses = mlx_lm_generate.stream_generate(
                self.model,
                self.tokenizer,
                mx.array(tokens[-1:]),
                max_tokens=LARGEST if settings.max_tokens < 0 else settings.max_tokens,  # mlx-lm drafts up to a limit
                draft_model=PromptLookup([*draft.before, *tokens[:-1]]) if draft.model is None else draft.model,
                num_draft_tokens=draft.count,
                sampler=self._sampler(settings),
                prompt_cache=every,
            )
            # What was not accepted is taken back within the scope, also where nobody wants to hear more.
            with contextlib.suppress(GeneratorExit), contextlib.closing(responses):
                for response in responses:
                    known.append(response.token)
                    if len(known) == total + 1:
                        report(total, total)
                    yield response
        if len(known) > total:
            for model, own, start in begun:
                fill([(model, own)], mx.array(known[_seen(own) - start :]), 1)

    def _stream(
        self, tokens: list[int], caches: list[Any], settings: Settings, progress: Progress | None
    ) -> Iterator[Any]:
        responses: Iterator[Any] = mlx_lm_generate.stream_generate(
            self.model,
            self.tokenizer,
            mx.array(tokens),
            max_tokens=settings.max_tokens,
            sampler=self._sampler(settings),
            prompt_cache=caches,
            prefill_step_size=settings.prefill_step_size,
            prompt_progress_callback=progress,
        )
        return responses

    def _sampler(self, settings: Settings) -> Any:
        sampler = settings.sampling.sampler(self.tokenizer)
        return sampler if part_of(self.model) is None else drawn_by_first(sampler)

    def prefill(self, tokens: list[int], caches: list[Any], progress: Progress | None = None, step: int = STEP) -> None:
        """Advance ``caches`` by a prompt, ``step`` tokens in a call of the model, and generate nothing."""
        if _read_twice(caches):
            prefill(self.model, tokens, caches, step=step, progress=progress)
            return
        for _ in mlx_lm_generate.generate_step(
            mx.array(tokens),
            self.model,
            max_tokens=0,
            prompt_cache=caches,
            prefill_step_size=step,
            prompt_progress_callback=progress,
        ):
            pass


def _seen(caches: list[Any]) -> int:
    """Tokens that caches which can give back have taken."""
    return int(next(members(caches)).offset)


def _read_twice(caches: list[Any]) -> bool:
    return any(c.policy.score == "reread" for c in zero_merge(caches))
