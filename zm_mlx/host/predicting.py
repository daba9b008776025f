"""What reading prompts takes at its peak, before it is done."""

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..ops.plain.attention import LOGIT_BYTES
from ..phases import PIECE
from ..state.layout import LayerShape, Layout
from .measuring import measure
from .plan import Plan

EXPERTS = 8  # of a layer of experts that a token goes through, at most
LIVE = 3  # times what all products of a layer give, that live at the same time
LOGITS = 6  # arrays of the size of attention's logits that live at the same time
STORES = 6  # times a layer's rows live at the same time


@dataclass(frozen=True)
class Load:
    """What is to be judged.

    Args:
        prompt_tokens: of the longest prompt.
        step: tokens of a prompt in one call of the model, at most.
        sequences: held at the same time, prompts under way included.
        prompts: read together, in the same calls of the model.
        held: bytes of these sequences' caches that exist already.
        seen: tokens that the caches have seen already.

    Raises:
        ValueError: a number is not positive, or there are more prompts than sequences.
    """

    prompt_tokens: int
    step: int
    sequences: int = 1
    prompts: int = 1
    held: int = 0
    seen: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("step", 1), ("sequences", 1), ("prompts", 1), ("held", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if self.prompts > self.sequences:
            raise ValueError(f"{self.prompts} prompts at a time are more than {self.sequences} sequences")

    @property
    def whole_step(self) -> int:
        """Tokens of a prompt in the longest call of the model."""
        return min(self.step, self.prompt_tokens)


@dataclass(frozen=True)
class Prediction:
    """Bytes: what MLX held when this was said, what caches will take on top, and what reading prompts takes besides.

    ``measured`` says that the last was measured with the model; otherwise it is no more than that.
    """

    active: int
    caches: int
    reading: int
    measured: bool

    @property
    def new(self) -> int:
        """Bytes at the peak that are not held yet."""
        return self.caches + self.reading

    @property
    def peak(self) -> int:
        return self.active + self.new


def predict(model: nn.Module, plan: Plan, load: Load) -> Prediction:
    """The peak, measured with a few layers of the model. Within 10 % (``tests/test_guard.py``).

    Call it in the thread that uses the model, whose streams are no other's. It resets MLX's peak statistics, takes
    the memory of a few layers for a moment, and a share of the time that the prompt will take.
    """
    mx.eval(model.parameters())  # what a change of dtype left to be computed
    found = caches_alone(plan, load)
    together = load.prompts if plan.prefill == "streaming" else 1
    tokens, step = together * load.prompt_tokens, together * load.whole_step
    reading = measure(model, plan, tokens, step, load.seen)
    others = (load.prompts - 1) * plan.prompt_bytes if together > 1 else (load.prompts - 1) * reading
    return replace(found, reading=reading + others, measured=True)


def bound(model: nn.Module, plan: Plan, load: Load) -> Prediction:
    """No less than the peak, with neither time nor memory taken.

    The terms are those of what a layer computes: all of its products of all tokens of a call, in float32; the logits
    of a block of attention; and its rows, which it writes anew when a piece begins and when it compacts.
    """
    twice = plan.policy.score == "reread"  # the second time a piece in one call
    call = max(load.whole_step, min(PIECE, load.prompt_tokens)) if twice else load.whole_step
    products = LIVE * 4 * load.prompts * call * _widest(model)
    heads, whole = max(s.query_heads for s in plan.shapes), plan.prefill == "exact"
    block = call if whole else min(call, max(a.staging for a in plan.layouts))
    if plan.policy.replays or twice:  # a piece, however short calls are
        block = max(block, min(PIECE, load.prompt_tokens))
    rows = load.prompt_tokens if whole else max(n for a in plan.layouts for n in a.rows) + PIECE
    logits = LOGITS * min(4 * heads * block * rows, LOGIT_BYTES)
    wide = any(s.itemsize < 4 for s in plan.shapes)
    if wide and mx.default_device() == mx.cpu:  # each query has a copy of all rows (half.py)
        block = max(1, min(block, LOGIT_BYTES // (4 * heads * rows)))
        logits += 4 * block * rows * max(s.heads * (s.head_dim + s.value_dim) for s in plan.shapes)
    stores = max(_rewritten(a, s, load) for a, s in zip(plan.layouts, plan.shapes, strict=True))
    stores += plan.prompt_bytes // len(plan.layouts)
    reading = products + logits + STORES * (1 + wide) * stores + load.prompts * plan.prompt_bytes
    return replace(caches_alone(plan, load), reading=reading)


def caches_alone(plan: Plan, load: Load) -> Prediction:
    """No more than the peak: what is stored, as if nothing was computed."""
    caches = load.sequences * (plan.nbytes + plan.other_bytes) - load.held
    more = plan.full_bytes(load.prompt_tokens) - plan.nbytes if plan.prefill == "exact" else 0
    return Prediction(mx.get_active_memory(), max(0, caches), load.prompts * max(0, more), False)


def _rewritten(layout: Layout, shape: LayerShape, load: Load) -> int:
    """Bytes of a layer's rows that a compaction makes anew: of the recent ones alone, while no token has to leave."""
    if load.seen + load.prompt_tokens > layout.proximity:
        return layout.nbytes(shape)
    return layout.recent * shape.token_bytes


def _widest(model: nn.Module) -> int:
    """Numbers that all products of one layer give for a token: of the layer with the most, or of the whole model."""
    found: dict[str, int] = defaultdict(int)
    for name, module in model.named_modules():
        weight: Any = module.get("weight")
        if isinstance(weight, mx.array) and weight.ndim >= 2:
            layer = re.search(r"(?:^|\.)(\d+)\.", name)
            found[layer[1] if layer else ""] += weight.shape[-2] * (EXPERTS if weight.ndim > 2 else 1)
    return max((n for layer, n in found.items() if layer), default=found[""])
