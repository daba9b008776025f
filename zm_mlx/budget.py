"""What a budget means: text, number or table → the layouts of all layers. Knows no arrays and no model."""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from .policies import Policy
from .state.layout import MAX_ROWS, LayerShape, Layout

FRACTION_FLOOR = 64  # rows; a fraction of a short prompt is not worth compressing below this
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MAX_TEXT = 64  # characters; Python refuses to read much longer numbers
FORMS = "'auto', a fraction of the prompt with a decimal point (0.2), rows per head (2048), or bytes (512MB, 1.5GB)"

Kind = Literal["auto", "fraction", "rows", "bytes", "table"]
Table = tuple[tuple[int, ...], ...]  # rows of each KV head, layer by layer


@dataclass(frozen=True)
class Budget:
    """A parsed budget. ``str(budget)`` is what a user would write for it."""

    kind: Kind
    value: float = 0
    table: Table = ()

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
    def of_heads(cls, head_rows: Sequence[Sequence[int]]) -> "Budget":
        """A budget that says the rows of each KV head of each layer.

        Raises:
            ValueError: this is no table.
        """
        try:
            return cls("table", table=tuple(tuple(layer) for layer in head_rows))
        except TypeError as error:
            raise ValueError(
                f"head_rows needs for each layer a table with the rows of each KV head, not {head_rows!r}"
            ) from error

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
        if self.kind == "table":
            return str([list(layer) for layer in self.table])
        return f"{self.value:.0f}" + ("B" if self.kind == "bytes" else "")


@dataclass(frozen=True)
class Request:
    """What a budget may depend on.

    Args:
        prompt_tokens: tokens the cache will have seen at the end of the prompt, where known.
        new_tokens: tokens to generate.
        model_context: the model's trained context, where known.
        free_bytes: memory for caches, where known.
        other_bytes: what the model's own caches (sliding window, recurrent) take out of bytes.
    """

    prompt_tokens: int | None = None
    new_tokens: int = 0
    model_context: int | None = None
    free_bytes: int | None = None
    other_bytes: int = 0


@dataclass(frozen=True)
class Resolved:
    """A layout for each layer, where its numbers come from, and rows per head on average; ``None`` of a table."""

    layouts: tuple[Layout, ...]
    reason: str
    rows: int | None = None


def resolve(budget: Budget, shapes: Sequence[LayerShape], policy: Policy, request: Request) -> Resolved:
    """Turn a budget into rows (method.md 6).

    Args:
        shapes: one for each layer that holds a ZeroMerge cache.

    Raises:
        ValueError: the budget is too small (the message says the smallest that works), a table does
            not fit the layers, or a fraction's prompt is not known.
    """
    if budget.kind == "table":
        if len(budget.table) != len(shapes):
            raise ValueError(f"head_rows needs {len(shapes)} tables, one for each layer, not {len(budget.table)}")
        layouts = (policy.layout(rows, s.heads) for rows, s in zip(budget.table, shapes, strict=True))
        return Resolved(tuple(layouts), "rows per head, as given")
    rows, reason = _rows(budget, shapes, policy, request)
    return Resolved(_uniform(rows, shapes, policy), reason, rows)


def total_bytes(layouts: Sequence[Layout], shapes: Sequence[LayerShape]) -> int:
    """Bytes of the caches of all layers."""
    return sum(a.nbytes(s) for a, s in zip(layouts, shapes, strict=True))


def largest(shapes: Sequence[LayerShape], policy: Policy, room: int) -> int:
    """The most rows per head whose caches take ``room`` bytes in all, at least the fewest that work."""
    rows = range(policy.smallest, MAX_ROWS // max(s.heads for s in shapes) + 1)
    fit = bisect_right(rows, room, key=lambda n: total_bytes(_uniform(n, shapes, policy), shapes))
    return policy.smallest + max(0, fit - 1)


def _rows(budget: Budget, shapes: Sequence[LayerShape], policy: Policy, request: Request) -> tuple[int, str]:
    """Rows per head, the same in all layers, and the reason."""
    if budget.kind == "rows":
        return int(budget.value), f"{budget.value:.0f} rows per head, as given"
    if budget.kind == "fraction":
        tokens = request.prompt_tokens
        if tokens is None:
            raise ValueError(f"a budget of {budget} is a fraction of the prompt, so prompt_length must be given")
        rows = math.ceil(Fraction(str(budget.value)) * tokens)  # 0.07 of 10,000 is 700, not 701
        if rows < FRACTION_FLOOR:
            return FRACTION_FLOOR, f"{budget} of {tokens} tokens is {rows}; {FRACTION_FLOOR} is the least"
        return rows, f"{budget} of {tokens} tokens"
    if budget.kind == "bytes":
        need = total_bytes(_uniform(policy.smallest, shapes, policy), shapes) + request.other_bytes
        if need > budget.value:
            raise ValueError(
                f"a budget of {budget.value:,.0f} bytes is too small for this model: "
                f"the smallest that works is {need:,} bytes"
            )
        rows = largest(shapes, policy, int(budget.value) - request.other_bytes)
        return rows, f"what {budget.value:,.0f} bytes hold"
    limits = {"the model's context": request.model_context}
    if request.prompt_tokens is not None:
        limits["prompt and new tokens"] = request.prompt_tokens + request.new_tokens
    if request.free_bytes is not None:
        limits["what memory allows"] = largest(shapes, policy, request.free_bytes - request.other_bytes)
    known = {reason: n for reason, n in limits.items() if n is not None}
    if not known:
        raise ValueError("a budget of auto needs prompt_length, a model with a known context, or a memory limit")
    reason = min(known, key=lambda r: known[r])
    return max(known[reason], policy.smallest), f"auto: {reason}"


def _uniform(rows: int, shapes: Sequence[LayerShape], policy: Policy) -> tuple[Layout, ...]:
    return policy.layouts(rows, [s.heads for s in shapes])
