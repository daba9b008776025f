"""Finds out whether a model can be served: a probe of the model itself, not a list of names."""

import io
import re
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedModelError
from ..ops.choose import Operations
from ..policies import Policy
from ..state.layout import LayerShape
from .cache import ZeroMergeCache
from .hook import attach, replace_caches
from .latent import is_latent
from .own_caches import own_caches

CALLS = (3, 1)  # tokens
ROWS = 64


def probe(model: nn.Module) -> list[LayerShape]:
    """Attach the hook and run a model on throw-away caches of 3 tokens, then 1 (only masks are evaluated).

    Returns:
        For each layer that will hold a ``ZeroMergeCache``, what a token takes in it.

    Raises:
        UnsupportedModelError: naming the model and the reason. Every full-attention layer must call
            the hooked attention exactly once per update, with the cache's own keys and values, with
            no mask but the causal one, and use them nowhere else.
    """
    attach(model)
    probes: list[_Probe] = []

    def make(i: int) -> ZeroMergeCache:
        probes.append(_Probe(i))
        return probes[-1]

    try:
        if any("indexer" in module for module in model.modules()):
            raise UnsupportedModelError("its layers choose among all keys by an index of their own (sparse attention)")
        caches = replace_caches(own_caches(model), make)
        if not probes:
            raise UnsupportedModelError("it has no full-attention KV cache to compress")
        for call, tokens in enumerate(CALLS, 1):
            logits = model(mx.zeros((1, tokens), mx.int32), cache=caches)
            for p in probes:
                p.check(call)
            _check_uses(logits, probes)
    except Exception as error:  # a foreign model may fail in any way on a foreign cache
        raise UnsupportedModelError(f"zm_mlx cannot serve {name_of(model)}: {_reason(error)}") from error
    latent = any(is_latent(module) for module in model.modules())  # mlx-lm's cache has no values beside the keys
    return [replace(p.token, own_dims=p.token.head_dim) if latent else p.token for p in probes]


def _reason(error: Exception) -> str:
    if isinstance(error, UnsupportedModelError):
        return str(error)
    if isinstance(error, AttributeError) and isinstance(error.obj, _Probe):
        return f"it reads {error.name!r} of its KV caches, which a compressed cache does not have"
    return f"{type(error).__name__}: {error}"


def name_of(model: nn.Module) -> str:
    """The model's type as in its configuration."""
    for holder in (model, getattr(model, "args", None)):
        if name := getattr(holder, "model_type", None):
            return str(name)
    return type(model).__module__.rpartition(".")[2]


class _Probe(ZeroMergeCache):
    """A cache that notes how a model uses it.

    The keys, values and masks that it hands out are stand-ins, and its attention returns zeros, so
    that a path in the graph from a stand-in to the logits means a use that a compressed cache cannot
    serve (layers that share keys and values, attention beside the hooked one).
    """

    def __init__(self, layer: int) -> None:
        super().__init__(Policy().layout(ROWS, 1))
        self.index = layer
        self.updates = self.attended = 0
        self.stand_ins: list[mx.array] = []

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        # The narrowest window: a wider one could not be told from the causal mask in a short probe.
        mask = super().make_mask(length, return_array, None if window_size is None else 1)
        if isinstance(mask, mx.array):
            self.stand_ins.append(mask)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if not self.updates:  # the number of heads is known now
            heads = keys.shape[1]
            self.token = LayerShape(heads, keys.shape[3], values.shape[3], keys.dtype.size, str(keys.dtype))
            self._start(Operations(self.policy.layout(ROWS, heads), self.policy, "ops"))
        self.updates += 1
        keys, values = (mx.full(x.shape, mx.nan, x.dtype) for x in (keys, values))  # no mask made of NaN is causal
        self.stand_ins += [keys, values]
        return super().update_and_fetch(keys, values)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None = None,
        cap: float | None = None,
    ) -> mx.array:
        self.attended += 1
        self.token = replace(self.token, query_heads=queries.shape[1])
        out = super().attend(queries, keys, values, scale, sinks, cap)
        return mx.zeros(out.shape, out.dtype)

    def attend_again(self, queries: mx.array, scale: float) -> mx.array:
        out = super().attend_again(queries, scale)
        return mx.zeros(out.shape, out.dtype)

    def check(self, calls: int) -> None:
        if self.updates != calls or self.attended != calls:
            raise UnsupportedModelError(
                f"full-attention layer {self.index} called the hooked attention {self.attended} times "
                f"for {self.updates} updates of its cache in {calls} calls of the model"
            )


def _check_uses(logits: mx.array, probes: list[_Probe]) -> None:
    """Require that no stand-in of a probe reaches the logits.

    mlx shows its graph only as text, where ``"name" -> operation`` is a use of an array.
    """
    named = {f"layer_{p.index}_{i}": x for p in probes for i, x in enumerate(p.stand_ins)}
    graph = io.StringIO()
    mx.export_to_dot(graph, logits, **named)
    if use := re.search(r'"layer_(\d+)_\d+" -> ', graph.getvalue()):
        raise UnsupportedModelError(
            f"the keys, values or mask of full-attention layer {use[1]} are used outside of its own attention"
        )
