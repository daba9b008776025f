"""Generation with a model, without flags: what all commands call."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .sampling import LARGEST, Range, Sampling

mlx_lm_generate = importlib.import_module("mlx_lm.generate")  # the package's name of it is the function

PREFILL_STEP = 2048  # mlx-lm's own number
LIMITS: dict[str, Range] = {
    "max_tokens": Range("an integer from 1 up, or -1 for no limit", int, 1, LARGEST, (-1,)),
    "prefill_step_size": Range("an integer from 1 up", int, 1, LARGEST),
}

Progress = Callable[[int, int], None]  # prompt tokens done, prompt tokens in all


@dataclass(frozen=True)
class Settings:
    """What one generation is asked for; ``max_tokens=-1`` has no limit.

    Raises:
        ValueError: a value is out of range; the message names it and the range.
    """

    max_tokens: int = 100
    prefill_step_size: int = PREFILL_STEP
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            try:
                limit.check(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None


class Engine:
    """A model, its tokenizer, and the name it was asked for by."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name

    def generate(
        self, tokens: list[int], caches: list[Any], settings: Settings, progress: Progress | None = None
    ) -> Iterator[Any]:
        """mlx-lm's responses to a prompt, one a token; ``caches`` (one a layer) are advanced in place.

        The seed is not set here: mlx-lm's command sets it before it loads the model, which draws from it too.
        """
        responses: Iterator[Any] = mlx_lm_generate.stream_generate(
            self.model,
            self.tokenizer,
            mx.array(tokens),
            max_tokens=settings.max_tokens,
            sampler=settings.sampling.sampler(self.tokenizer),
            prompt_cache=caches,
            prefill_step_size=settings.prefill_step_size,
            prompt_progress_callback=progress,
        )
        return responses

    def prefill(self, tokens: list[int], caches: list[Any], progress: Progress | None = None) -> None:
        """Advance ``caches`` by a prompt and generate nothing."""
        for _ in mlx_lm_generate.generate_step(
            mx.array(tokens), self.model, max_tokens=0, prompt_cache=caches, prompt_progress_callback=progress
        ):
            pass


def random_state() -> int:
    """The seed that brings MLX's random numbers back to where they are now."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    return int(high) << 32 | int(low)
