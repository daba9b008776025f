"""What a budget means: text or number → rows per head. Pure Python, knows no arrays and no model."""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from .layout import MAX_ROWS, Layout, smallest_rows
from .policy import Policy

FRACTION_FLOOR = 64  # rows; a fraction of a short prompt is not worth compressing below this
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MAX_TEXT = 64  # characters; Python refuses to read much longer numbers
FORMS = "'auto', a fraction of the prompt with a decimal point (0.2), rows per head (2048), or bytes (512MB, 1.5GB)"

Kind = Literal["auto", "fraction", "rows", "bytes"]


@dataclass(frozen=True)
class LayerShape:
    """What one full-attention layer stores for a token: KV heads, head dims, bytes an element, dtype's name."""

    heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    dtype: str = ""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in an uncompressed cache."""
        return self.heads * (self.head_dim + self.value_dim) * self.itemsize


@dataclass(frozen=True)
class Budget:
    """A parsed budget. ``str(budget)`` is what a user would write for it."""

    kind: Kind
    value: float = 0

    @classmethod
    def parse(cls, given: "str | int | float | Budget") -> "Budget":
        """Read a budget: with a decimal point a fraction in (0, 1.0], an integer rows, with a unit bytes, or auto.

        Raises:
            ValueError: none of these; the message names the forms.
        """
        if isinstance(given, Budget):
            return given
        if isinstance(given, float):
            return cls._fraction(float(given))
        text = str(given).strip()
        if len(text) > MAX_TEXT:
            raise ValueError(f"cannot read a budget of {text[:MAX_TEXT]!r}…: it is {FORMS}")
        if text.lower() == "auto":
            return cls("auto")
        if match := re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*((?:[KMG]i?)?B)", text, re.IGNORECASE):
            return cls._positive(text, "bytes", math.floor(Fraction(match[1]) * UNITS[match[2].upper()]))
        if re.fullmatch(r"[+-]?\d+", text):
            return cls._positive(text, "rows", int(text))
        if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE):
            return cls._fraction(float(text))
        raise ValueError(f"cannot read a budget of {text!r}: it is {FORMS}")

    @classmethod
    def _fraction(cls, value: float) -> "Budget":
        if not 0 < value <= 1:
            raise ValueError(f"a budget of {value} is not a fraction in (0, 1.0]; rows per head are an integer")
        return cls("fraction", value)

    @classmethod
    def _positive(cls, text: str, kind: Kind, value: int) -> "Budget":
        if value <= 0:
            raise ValueError(f"a budget of {text} holds nothing: it is {FORMS}, more than 0")
        return cls(kind, value)

    def __str__(self) -> str:
        if self.kind == "auto":
            return "auto"
        if self.kind == "fraction":
            return str(self.value)
        return f"{self.value:.0f}" + ("B" if self.kind == "bytes" else "")


@dataclass(frozen=True)
class Rows:
    """A resolved budget: N rows per head, and where the number comes from."""

    rows: int
    reason: str


def resolve(
    budget: Budget,
    shapes: Sequence[LayerShape],
    policy: Policy,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int = 0,
    model_context: int | None = None,
    free_bytes: int | None = None,
    other_bytes: int = 0,
) -> Rows:
    """Turn a budget into rows per head, the same in all layers (design: budgets buy rows).

    Args:
        shapes: one for each layer that holds a ZeroMerge cache.
        prompt_tokens: tokens the cache will have seen at the end of the prompt, where known.
        new_tokens: tokens to generate; only ``auto`` uses them.
        model_context: the model's trained context, where known; only ``auto`` uses it.
        free_bytes: memory for caches; only ``auto`` uses it.
        other_bytes: what the model's own caches (sliding window, recurrent) take out of a budget in bytes.

    Raises:
        ValueError: the budget is too small (the message says the smallest that works), or it is a
            fraction and the prompt's length is not known.
    """

    if budget.kind == "rows":
        rows = int(budget.value)
        layout(rows, shapes[0], policy)
        return Rows(rows, f"{rows} rows per head, as given")
    if budget.kind == "fraction":
        if prompt_tokens is None:
            raise ValueError(f"a budget of {budget} is a fraction of the prompt, so prompt_length must be given")
        rows = math.ceil(Fraction(str(budget.value)) * prompt_tokens)  # 0.07 of 10,000 is 700, not 701
        if rows < FRACTION_FLOOR:
            return Rows(FRACTION_FLOOR, f"{budget} of {prompt_tokens} tokens is {rows}; {FRACTION_FLOOR} is the least")
        return Rows(rows, f"{budget} of {prompt_tokens} tokens")
    if budget.kind == "bytes":
        least = smallest(policy)
        need = total_bytes(least, shapes, policy) + other_bytes
        if need > budget.value:
            raise ValueError(
                f"a budget of {budget.value:,.0f} bytes is too small for this model: "
                f"the smallest that works is {need:,} bytes"
            )
        return Rows(largest(shapes, policy, int(budget.value) - other_bytes), f"what {budget.value:,.0f} bytes hold")
    limits = {"the model's context": model_context}
    if prompt_tokens is not None:
        limits["prompt and new tokens"] = prompt_tokens + new_tokens
    if free_bytes is not None:
        limits["what memory allows"] = largest(shapes, policy, free_bytes - other_bytes)
    known = {reason: n for reason, n in limits.items() if n is not None}
    if not known:
        raise ValueError("a budget of auto needs prompt_length, a model with a known context, or a memory limit")
    reason = min(known, key=lambda r: known[r])
    return Rows(max(known[reason], smallest(policy)), f"auto: {reason}")


def layout(rows: int | Sequence[int], shape: LayerShape, policy: Policy) -> Layout:
    """The regions of one layer for N rows per head (one number, or one a head)."""
    return Layout.of(rows, shape.heads, residual=policy.residual, proximity=policy.proximity, staging=policy.staging)


def smallest(policy: Policy) -> int:
    """The fewest rows per head that work."""
    return smallest_rows(policy.residual, policy.staging)


def total_bytes(rows: int, shapes: Sequence[LayerShape], policy: Policy) -> int:
    """Bytes of the caches of all layers with N rows per head."""
    return sum(layout(rows, s, policy).nbytes(s.head_dim, s.value_dim, s.itemsize) for s in shapes)


def largest(shapes: Sequence[LayerShape], policy: Policy, room: int) -> int:
    """The most rows per head whose caches take ``room`` bytes in all, at least the fewest that work."""
    least, most = smallest(policy), MAX_ROWS // max(s.heads for s in shapes)
    rows = range(least, most + 1)
    return least + max(0, bisect_right(rows, room, key=lambda n: total_bytes(n, shapes, policy)) - 1)
