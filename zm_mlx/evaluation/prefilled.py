"""A prompt that a model has read once, from which the caches of all contenders are made.

Where the prompt is compressed at its end, as by an exact prefill, every method sees the keys, values
and queries of one and the same reading, so the model need not run again for each of them.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache

from ..host.cache import ZeroMergeCache
from ..host.caches import ROTATING_KEEP
from ..host.hook import replace_caches
from ..host.model_caches import members
from ..host.probe import probe
from ..ops.choose import Operations, mode
from ..ops.plain import uncompressed
from ..phases import ExactPrompt
from ..policies import Policy
from ..state.layout import LayerShape, Layout
from ..state.rows import Dense
from ..state.state import Call, State, to_storage
from .caches import Contender, Quantization, full, rotating, rows_of, window_rows

STEP = 512  # tokens of a call of the model: bounds the memory of its logits


class Layer(NamedTuple):
    """What a full-attention layer computed of a prompt of T tokens, in the model's order of heads.

    rows [1, H, T, D] and [1, H, T, Dv]; call: queries [1, H * G, T, D] as rotated, their scale and sinks.
    """

    rows: Dense
    call: Call

    def last(self, count: int | None) -> Call:
        """The last ``count`` queries; all for ``None``."""
        return self.call if count is None else self.call.at(max(0, self.call.length - count), self.call.length)


class Recorder(ZeroMergeCache):
    """Holds a prompt of known length whole, with its queries; a ``ZeroMergeCache`` to the attention hook only."""

    def __init__(self, shape: LayerShape, length: int) -> None:
        super().__init__(Policy().layout(Policy().smallest, shape.heads))
        self.length = length
        self.calls: list[Call] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        new = Dense(keys, values)
        self.layer = (self.layer or State.empty(self.layout, new, self.length)).appended(new)
        return keys, values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if self.layer is None:
            raise ValueError("attention before the first update")
        self.calls.append(Call(queries, scale, sinks))
        return uncompressed.attend(self.calls[-1], self.layer)

    def arrays(self) -> list[mx.array]:
        return [*(self.layer.recent if self.layer else []), *(c.queries for c in self.calls)]

    def recorded(self) -> Layer:
        """All that was computed.

        Raises:
            ValueError: nothing was.
        """
        if self.layer is None:
            raise ValueError("the model did not use this cache")
        queries = mx.concatenate([c.queries for c in self.calls], axis=2)
        return Layer(self.layer.recent, self.calls[-1]._replace(queries=queries))


class Prompted:
    """A prompt read once with full caches; ``caches`` makes those of a contender from it.

    Args:
        model: any model that this package serves.
        tokens: the prompt without its last token. That one is fed first when generation begins, as in mlx-lm, so
            that every logit comes from the compressed cache.

    Attributes:
        layers: what each full-attention layer computed.
        shapes: what a token takes in each of them.

    Raises:
        ValueError: no tokens.
        UnsupportedModelError: the model cannot be served.
    """

    def __init__(self, model: nn.Module, tokens: Sequence[int] | mx.array) -> None:
        self.model = model
        self.tokens = as_array(tokens)
        if not self.tokens.size:
            raise ValueError("a prompt needs at least one token besides its last one")
        self.shapes = probe(model)
        recorders = [Recorder(shape, len(self)) for shape in self.shapes]
        self._own = make_prompt_cache(model)  # sliding-window and recurrent layers read the prompt with these
        caches = replace_caches(self._own, recorders.__getitem__)
        for begin in range(0, len(self), STEP):
            model(self.tokens[None, begin : begin + STEP], cache=caches)
            _evaluate(caches)
        self.layers = [r.recorded() for r in recorders]
        mx.eval([x.call.queries for x in self.layers])

    def __len__(self) -> int:
        return int(self.tokens.size)

    def caches(self, contender: Contender) -> list[Any]:
        """Caches that have seen the prompt, one for each layer of the model; new ones at each call.

        Raises:
            ValueError: the budget is too small for this contender.
        """
        make = self._streaming(contender) if contender.streaming else self._exact(contender)
        if not contender.streaming:
            return replace_caches(fork(self._own), make)
        caches = replace_caches(make_prompt_cache(self.model), make)
        for begin in range(0, len(self), STEP):
            self.model(self.tokens[None, begin : begin + STEP], cache=caches)
            _evaluate(caches)
        return caches

    def _exact(self, contender: Contender) -> Callable[[int], Any]:
        """The i-th full-attention layer's cache, compressed from the recorded prompt."""
        room = contender.room(self.shapes, len(self))
        if contender.method == "full":
            return lambda i: full(self.layers[i].rows)
        if contender.method == "rotating":
            rows = window_rows(self.shapes, room)
            return lambda i: rotating(self.layers[i].rows, rows)
        if contender.method == "quantized":
            numbers = Quantization.within(self.shapes, contender.budget)
            return lambda i: numbers.of(self.layers[i].rows)
        layouts = self._layouts(contender)
        return lambda i: compressed(self.layers[i], layouts[i], contender.settings or Policy())

    def _streaming(self, contender: Contender) -> Callable[[int], Any]:
        """The i-th full-attention layer's cache, empty."""
        room = contender.room(self.shapes, len(self))
        if contender.method == "full":
            return lambda _: None
        if contender.method == "rotating":
            rows = window_rows(self.shapes, room)
            return lambda _: RotatingKVCache(rows, keep=ROTATING_KEEP)
        if contender.method == "quantized":
            numbers = Quantization.within(self.shapes, contender.budget)
            return lambda _: QuantizedKVCache(numbers.group, numbers.bits)
        layouts = self._layouts(contender)
        return lambda i: ZeroMergeCache(layouts[i], policy=contender.settings)

    def _layouts(self, contender: Contender) -> list[Layout]:
        policy = contender.settings or Policy()
        rows = rows_of(policy, self.shapes, contender.room(self.shapes, len(self)))
        return [policy.layout(rows, s.heads) for s in self.shapes]


def compressed(layer: Layer, layout: Layout, policy: Policy) -> ZeroMergeCache:
    """The cache that an exact prefill of this prompt leaves."""
    cache = ZeroMergeCache(layout, policy=policy)
    rows = layer.rows.map(lambda x: to_storage(x, layout, 1))
    state = State.empty(layout, rows, layer.call.length).appended(rows)
    call = layer.last(policy.window)
    call = Call(
        to_storage(call.queries, layout, 1),
        call.scale,
        None if call.sinks is None else to_storage(call.sinks, layout, 0),
    )
    operations = Operations(layout, policy, mode())
    state = state._replace(scores=operations.score(call, state))
    cache.layer = ExactPrompt(layer.call.length).finish(state, operations)
    mx.eval(cache.layer.arrays())
    return cache


def fork(caches: list[Any]) -> list[Any]:
    """Caches that go on from here independently; rows are shared until one of both is written."""
    return copy.deepcopy(caches)


def continue_(model: nn.Module, caches: list[Any], tokens: Sequence[int] | mx.array) -> mx.array:
    """Logits [n, V] float32 after each of n tokens, which the caches take.

    Tokens go in one block (of no more than ``STEP``), which gives the same as one after the other for all
    caches but mlx-lm's rotating one with first tokens: in longer calls it masks these.
    """
    tokens = as_array(tokens)[None]
    one_by_one = any(isinstance(c, RotatingKVCache) and c.keep for c in members(caches))
    step = 1 if one_by_one else STEP
    logits: list[mx.array] = []
    for begin in range(0, tokens.shape[1], step):
        logits.append(model(tokens[:, begin : begin + step], cache=caches)[0].astype(mx.float32))
        mx.eval(logits[-1])
        _evaluate(caches)
    return mx.concatenate(logits, axis=0)


def as_array(tokens: Sequence[int] | mx.array) -> mx.array:
    """Tokens [n]."""
    return tokens.reshape(-1) if isinstance(tokens, mx.array) else mx.array(list(tokens))


def _evaluate(caches: list[Any]) -> None:
    mx.eval([c.arrays() if isinstance(c, Recorder) else c.state for c in members(caches)])
