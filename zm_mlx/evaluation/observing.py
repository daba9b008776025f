"""What each layer computed of tokens after a prompt with full caches, and the same given to other caches."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

from ..host.hook import attention, replace_caches
from ..host.model_caches import members
from ..state.rows import Dense
from ..state.state import Call
from .prefilled import Prompted, as_array, fork
from .recording import STEP, Layer, Recorder, evaluate


class Observed(NamedTuple):
    """One full-attention layer's n tokens: rows [1, H, n], queries [1, Hq, n, D] and output [1, Hq, n, Dv]."""

    rows: Dense
    call: Call
    output: mx.array


class Observer(Recorder):
    """A full cache behind a prompt that notes what attention is asked and what it answers."""

    def __init__(self, layer: Layer, room: int) -> None:
        super().__init__(layer.rows.shape[1], layer.rows.shape[2] + room)
        self.begin, self.outputs = layer.rows.shape[2], list[mx.array]()
        self.update_and_fetch(*layer.rows)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None = None,
        cap: float | None = None,
    ) -> mx.array:
        self.outputs.append(super().attend(queries, keys, values, scale, sinks, cap))
        return self.outputs[-1]

    def arrays(self) -> list[mx.array]:
        return [*super().arrays(), *self.outputs]

    def observed(self) -> Observed:
        layer = self.recorded()
        rows = layer.rows.map(lambda x: mx.contiguous(x[:, :, self.begin : self.begin + layer.call.length]))
        return Observed(rows, layer.call, mx.concatenate(self.outputs, axis=2))


def observe(prompted: Prompted, tokens: Sequence[int]) -> tuple[mx.array, list[Observed]]:
    """Logits [n, V] float32 of tokens after a prompt, and what each full-attention layer computed of them."""
    found = as_array(tokens)
    observers = [Observer(layer, found.size) for layer in prompted.layers]
    caches = replace_caches(fork(prompted.others), observers.__getitem__)
    logits: list[mx.array] = []
    for begin in range(0, found.size, STEP):
        logits.append(prompted.model(found[None, begin : begin + STEP], cache=caches)[0].astype(mx.float32))
        mx.eval(logits[-1])
        evaluate(caches)
    return mx.concatenate(logits, axis=0), [o.observed() for o in observers]


def replayed(prompted: Prompted, caches: list[Any], observed: Sequence[Observed]) -> Iterator[mx.array]:
    """The outputs [1, Hq, n, Dv] of caches of the prompt for what each full-attention layer was observed to compute."""
    pairs = zip(members(caches), members(prompted.others), strict=True)
    growing = [cache for cache, mine in pairs if type(mine) is KVCache]
    for cache, (rows, call, _) in zip(growing, observed, strict=True):
        # mlx-lm's rotating cache hides its first tokens from longer calls.
        step = 1 if isinstance(cache, RotatingKVCache) else call.length
        yield mx.concatenate(
            [_attend(cache, rows, call.at(i, i + step), i) for i in range(0, call.length, step)], axis=2
        )


def _attend(cache: Any, rows: Dense, call: Call, begin: int) -> mx.array:
    new = rows.map(lambda x: x[:, :, begin : begin + call.length])
    keys, values = cache.update_and_fetch(*new)
    mask = "causal" if call.length > 1 else None
    out = attention(call.queries, keys, values, cache, call.scale, mask, call.sinks)
    mx.eval(out)
    return out
