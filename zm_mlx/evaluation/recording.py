"""What the full-attention layers of a model computed of a prompt, recorded while it reads it once."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..host.cache import ZeroMergeCache
from ..host.hook import replace_caches
from ..host.model_caches import members
from ..ops.plain import uncompressed
from ..policies import Policy
from ..state.layout import LayerShape
from ..state.rows import Dense
from ..state.state import Call, State

STEP = 512  # tokens of a call of the model: bounds the memory of its logits


class Layer(NamedTuple):
    """What a full-attention layer computed of a prompt of T tokens, in the model's order of heads.

    rows [1, H, T, D] and [1, H, T, Dv]; call: queries [1, H * G, T, D] as rotated, their scale and sinks.
    """

    rows: Dense
    call: Call

    @property
    def length(self) -> int:
        """T."""
        return self.call.length

    def last(self, count: int | None) -> Call:
        """The last ``count`` queries; all for ``None``."""
        return self.call if count is None else self.call.at(max(0, self.length - count), self.length)


class Guest(ZeroMergeCache):
    """A cache of the evaluation's own, which the attention hook takes for a ``ZeroMergeCache``."""

    def __init__(self, heads: int) -> None:
        super().__init__(Policy().layout(Policy().smallest, heads))

    def arrays(self) -> list[mx.array]:
        """What to compute after a call of the model."""
        raise NotImplementedError


class Whole(Guest):
    """Holds all rows, ``length`` at most."""

    def __init__(self, heads: int, length: int) -> None:
        super().__init__(heads)
        self.length = length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        new = Dense(keys, values)
        self.layer = (self.layer or State.empty(self.layout, new, self.length)).appended(new)
        return keys, values

    def attend_again(self, queries: mx.array, scale: float) -> mx.array:
        return uncompressed.attend(Call(queries, scale), self.whole())

    def whole(self) -> State:
        """The state, all of whose rows are recent ones.

        Raises:
            ValueError: nothing was taken yet.
        """
        if self.layer is None:
            raise ValueError("the model did not use this cache")
        return self.layer

    def arrays(self) -> list[mx.array]:
        return self.whole().recent.arrays()


class Recorder(Whole):
    """A prompt of known length with its queries."""

    def __init__(self, heads: int, length: int) -> None:
        super().__init__(heads, length)
        self.calls: list[Call] = []

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None = None,
        cap: float | None = None,
    ) -> mx.array:
        self.calls.append(Call(queries, scale, sinks, cap))
        return uncompressed.attend(self.calls[-1], self.whole())

    def arrays(self) -> list[mx.array]:
        return [*super().arrays(), *(c.queries for c in self.calls)]

    def recorded(self) -> Layer:
        """All that was computed."""
        rows = self.whole().newest
        queries = mx.concatenate([c.queries for c in self.calls], axis=2)
        mx.eval(queries)
        return Layer(rows, self.calls[-1]._replace(queries=queries))


class Recording(NamedTuple):
    """The layers with full attention, and the model's caches, in which those of all other layers are filled."""

    layers: list[Layer]
    others: list[Any]


def record(
    model: nn.Module, tokens: mx.array, shapes: Sequence[LayerShape], before: Recording | None = None
) -> Recording:
    """Read tokens [T] with full caches, behind those ``before``; ``shapes`` as a probe of the model found them."""
    seen = 0 if before is None else before.layers[0].call.length
    recorders = [Recorder(s.heads, seen + tokens.size) for s in shapes]
    if before is None:
        own = make_prompt_cache(model)
    else:
        own = copy.deepcopy(before.others)
        for recorder, layer in zip(recorders, before.layers, strict=True):
            recorder.update_and_fetch(*layer.rows)
            recorder.calls.append(layer.call)
    read(model, replace_caches(own, recorders.__getitem__), tokens)
    return Recording([r.recorded() for r in recorders], own)


def read(model: nn.Module, caches: list[Any], tokens: mx.array) -> None:
    """Let caches take tokens [T], in calls of no more than ``STEP``."""
    for begin in range(0, tokens.size, STEP):
        model(tokens[None, begin : begin + STEP], cache=caches)
        evaluate(caches)


def evaluate(caches: list[Any]) -> None:
    """Compute what caches hold."""
    mx.eval([c.arrays() if isinstance(c, Guest) else c.state for c in members(caches)])
