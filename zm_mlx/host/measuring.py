"""What reading a prompt takes beside the caches, measured with the first layers of the real model.

All layers of a model are alike as far as memory goes, and one is computed after the other: a few of them show what
each takes while it works. So a model is given the caches of its first layers alone, and the end of a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..budget import total_bytes
from ..phases import PIECE
from ..state.layout import LayerShape, Layout
from ..state.rows import Dense
from ..state.state import State
from .model_caches import zero_merge
from .part import alone
from .plan import Plan
from .prefill import prefill

LAYERS = 3  # with full attention: what is computed runs ahead into the next ones


def measure(model: nn.Module, plan: Plan, tokens: int, step: int, seen: int = 0) -> int:
    """Bytes at the peak of reading a prompt, over those of its caches once it was read.

    Takes the memory of a few layers' caches and of their work for a moment, and ``reset_peak_memory``.

    Args:
        tokens: of the prompt, at least 1.
        step: tokens of a call of the model, at most.
        seen: tokens that a streaming cache has seen before them.
    """
    plan = replace(plan, prompt_length=tokens if plan.prefill == "exact" else None)
    end = End.of(plan, tokens, step, seen)
    caches = plan.caches(model)
    few = caches[: _first(caches)]
    with alone(model):
        try:
            peak = _peak(model, plan, few, end)
        except Exception:  # a model that does not take the caches of some layers may fail in any way
            peak = None
        if peak is None:
            caches = plan.caches(model)
            peak = _peak(model, plan, caches, end)
    del caches, few
    mx.clear_cache()
    mx.reset_peak_memory()
    return max(0, (peak or 0) - plan.nbytes)


def _first(caches: Sequence[Any]) -> int:
    """How many caches hold ``LAYERS`` of ours."""
    found = (i for i in range(1, len(caches) + 1) if len(zero_merge(caches[:i])) >= LAYERS)
    return next(found, len(caches))


@dataclass(frozen=True)
class End:
    """The part of a prompt that shows what all of it takes.

    Args:
        before: tokens that caches have seen before it.
        tokens: of it.
        step: tokens of a call of the model.
    """

    before: int
    tokens: int
    step: int

    @classmethod
    def of(cls, plan: Plan, tokens: int, step: int, seen: int) -> "End":
        """Whole calls in which a piece is filled, the last, shorter call, and the one-token call that ends a prompt.

        One more whole call where a prompt is held: the others find the queries that it leaves. In a streaming cache
        the whole calls come once before the first tokens are merged or evicted, for attention takes another way
        then, and once afterwards.
        """
        calls = max(1, -(-PIECE // step)) if plan.policy.replays else 1
        whole, last = divmod(tokens - 1, step)
        if plan.prefill == "exact":
            before = tokens - 1 - last - min(calls + 1, whole) * step
            before -= before % PIECE
            return cls(before, tokens - before, step)
        rest = min(2 * calls, whole) * step + last + 1
        before = min(seen + tokens - rest, max(0, plan.capacity - calls * step))
        return cls(before - before % PIECE, rest, step)


def _peak(model: nn.Module, plan: Plan, caches: list[Any], end: End) -> int | None:
    """The most that all layers hold and one works with; ``None`` where these layers did not take the tokens."""
    own = zero_merge(caches)
    share = total_bytes(plan.layouts[: len(own)], plan.shapes[: len(own)]) / plan.nbytes
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    if end.before:
        for cache, layout, shape in zip(own, plan.layouts, plan.shapes, strict=False):
            cache.layer = _after(end.before, layout, shape, plan.prompt_length)
    mx.eval([c.state for c in caches])
    held = mx.get_active_memory() - before
    peaks: list[float] = []

    def note(done: int = 0, _: int = 0) -> None:
        """What a call took: the layers that it is not at hold what they held before it or hold after it."""
        nonlocal held
        most, now = mx.get_peak_memory() - before, mx.get_active_memory() - before
        if done:
            peaks.append(most + max(held, now) * (1 / share - 1))
        held = now
        mx.reset_peak_memory()

    numbers = mx.arange(end.tokens) % 2  # any tokens do
    mx.eval(numbers)
    note()
    if end.tokens > 1:
        prefill(model, numbers[:-1], caches, step=end.step, progress=note)
    model(numbers[None, -1:], cache=caches)
    mx.eval([c.state for c in caches])
    note(end.tokens)
    return round(max(peaks)) if all(c.offset == end.before + end.tokens for c in own) else None


def _after(seen: int, layout: Layout, shape: LayerShape, prompt: int | None) -> State:
    """A layer's state after so many tokens, at most its capacity unless the whole ``prompt`` is held; zeros."""
    like = Dense.zeros((1, shape.heads, 0), shape.head_dim, shape.value_dim, _dtype(shape))
    if prompt is not None:
        return State.empty(layout, like, max(layout.open, prompt))._replace(filled=seen)
    since = (seen - layout.capacity) % layout.staging
    filled = min(seen, layout.proximity + since)
    empty = State.empty(layout, like, layout.recent)
    places = mx.concatenate([mx.arange(group.rows) for group in layout.groups for _ in range(group.heads)])
    taken = (places < seen - filled)[None]
    kept = empty.kept._replace(weight=taken.astype(mx.float32), position=mx.where(taken, places[None], -1))
    after = empty._replace(kept=kept, departed=seen - filled, filled=filled, since_compaction=since)
    return after.closing().without_leaving(layout, 0)


def _dtype(shape: LayerShape) -> mx.Dtype:
    dtype: mx.Dtype = getattr(mx, shape.dtype.rpartition(".")[2])
    return dtype
