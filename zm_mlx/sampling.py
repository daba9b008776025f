"""How the next token is drawn, with values checked once against the ranges that mlx-lm's samplers really take."""

import sys
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import Sampler, make_sampler

LARGEST = 2**31 - 1  # MLX counts elements along an axis in 32 bits


@dataclass(frozen=True)
class Range:
    """The numbers a setting takes: integers or any, from ``low`` to ``high``, or one of ``also``."""

    words: str
    kind: type[int] | type[float]
    low: float
    high: float
    also: tuple[int, ...] = ()

    def check(self, value: Any) -> None:
        """Raise ``ValueError`` ("must be …, not …") unless the value is in range; NaN never is."""
        number = isinstance(value, int if self.kind is int else int | float) and not isinstance(value, bool)
        if not (number and (value in self.also or self.low <= value <= self.high)):
            raise ValueError(f"must be {self.words}, not {_shorten(value)}")

    def parse(self, text: str) -> int | float:
        """The number that a text stands for; ``ValueError`` as ``check`` raises it."""
        try:
            value = self.kind(text)
        except ValueError:
            raise ValueError(f"must be {self.words}, not {_shorten(text)!r}") from None
        self.check(value)
        return value


# Probabilities are powers of e in 16 or 32 bits: below these limits a temperature makes all of them infinite
# and a top-p none of them large enough, and mlx-lm's samplers draw any token.
RANGES: dict[str, Range] = {
    "temp": Range("0 (greedy) or a number from 0.001 up", float, 0.001, sys.float_info.max, (0,)),
    "top_p": Range("0 (off) or a number from 0.000001 to 1", float, 1e-6, 1, (0,)),
    "min_p": Range("a number from 0 (off) to 1", float, 0, 1),
    "min_tokens_to_keep": Range("an integer from 1 to the size of the vocabulary", int, 1, LARGEST),
    "top_k": Range("an integer from 0 (off) up, below the size of the vocabulary", int, 0, LARGEST),
    "xtc_probability": Range("a number from 0 (off) to 1", float, 0, 1),
    "xtc_threshold": Range("a number from 0 to 0.5", float, 0, 0.5),
    "seed": Range("an integer from 0 to 18446744073709551615", int, 0, 2**64 - 1),
}


@dataclass(frozen=True)
class Sampling:
    """The sampling of mlx-lm; greedy by default.

    Raises:
        ValueError: a value is out of range; the message names it and the range.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "seed" and value is None:
                continue
            try:
                RANGES[field.name].check(value)
            except ValueError as error:
                raise ValueError(f"{field.name} {error}") from None

    def check_vocabulary(self, size: int) -> None:
        """Raise ``ValueError`` where a vocabulary of ``size`` tokens is too small for a setting."""
        if self.top_k >= size:
            raise ValueError(
                f"top_k must be an integer from 0 (off) to {size - 1}, below the model's vocabulary, not {self.top_k}"
            )
        if self.min_tokens_to_keep > size:
            raise ValueError(
                f"min_tokens_to_keep must be an integer from 1 to {size}, the model's vocabulary, "
                f"not {self.min_tokens_to_keep}"
            )

    def sampler(self, tokenizer: Any) -> Sampler:
        """mlx-lm's sampler of these settings; line ends and ends of sequence stay out of XTC, as in mlx-lm."""
        return make_sampler(
            self.temp,
            self.top_p,
            self.min_p,
            self.min_tokens_to_keep,
            top_k=self.top_k,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
        )


def random_state() -> int:
    """The seed that brings MLX's random numbers back to where they are now."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    return int(high) << 32 | int(low)


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:30]}… ({len(text)} characters)"
