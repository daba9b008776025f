"""Attaches the cache to any mlx-lm model, and finds out which models it cannot serve.

mlx-lm's models call one function, ``scaled_dot_product_attention`` of ``mlx_lm.models.base``, with
their cache as an argument. It is replaced by one that looks at the cache: a ``ZeroMergeCache``
attends itself, every other cache gets mlx-lm's own function, untouched.
"""

import importlib
import io
import re
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache

from .budget import LayerShape
from .cache import ZeroMergeCache
from .errors import UnsupportedModelError
from .model_caches import zero_merge

mlx_lm_generate: Any = importlib.import_module("mlx_lm.generate")  # the package's name of it is the function

NAME = "scaled_dot_product_attention"
PROBE_CALLS = (3, 1)  # tokens
PROBE_ROWS = 64
BOUNDED = (mlx_lm_cache.RotatingKVCache, mlx_lm_cache.ChunkedKVCache, mlx_lm_cache.ArraysCache)

_original: Callable[..., mx.array] = base.scaled_dot_product_attention
_original_quantize: Callable[..., None] = mlx_lm_generate.maybe_quantize_kv_cache


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's ``scaled_dot_product_attention``, except for a ``ZeroMergeCache``."""
    if isinstance(cache, ZeroMergeCache):
        _require_causal(mask, queries.shape[2])
        return cache.attend(queries, keys, values, scale, mask, sinks)
    return _original(queries, keys, values, cache, scale, mask, sinks)


def quantize(prompt_cache: list[Any], quantized_kv_start: int, kv_group_size: int, kv_bits: int | None) -> None:
    """mlx-lm's ``maybe_quantize_kv_cache``, which generation calls after each of its calls of the model.

    Raises:
        ValueError: ``kv_bits`` is given with a ``ZeroMergeCache``. mlx-lm would ignore it until
            ``quantized_kv_start``, and inside of a ``CacheList`` for ever.
    """
    if kv_bits is not None and zero_merge(prompt_cache):
        raise ValueError(
            f"kv_bits={kv_bits} (--kv-bits) does not work with a ZeroMerge cache: leave it out, or use the full cache"
        )
    _original_quantize(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)


def register() -> None:
    """Hook every mlx-lm model module, loaded or yet to come; let mlx-lm's loader find the cache class."""
    base.scaled_dot_product_attention = attention
    mlx_lm_generate.maybe_quantize_kv_cache = quantize
    mlx_lm_cache.ZeroMergeCache = ZeroMergeCache
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models."):
            _rebind(vars(module))


def attach(model: nn.Module) -> None:
    """Hook the modules that a model's classes come from, wherever they live."""
    for module in model.modules():
        for cls in type(module).__mro__:
            for member in vars(cls).values():
                if isinstance(member, FunctionType):
                    _rebind(member.__globals__)


def _rebind(names: dict[str, Any]) -> None:
    if names.get(NAME) is _original:
        names[NAME] = attention


def replace_caches(caches: list[Any], make: Callable[[int], ZeroMergeCache | None]) -> list[Any]:
    """A model's own caches with ``make(i)`` in place of its i-th plain ``KVCache`` (``None`` keeps it).

    Sliding-window, recurrent and other bounded caches stay; members of a ``CacheList`` are replaced too.

    Raises:
        UnsupportedModelError: a cache is of a type that may grow with every token.
    """
    count = 0

    def replace(cache: Any) -> Any:
        nonlocal count
        if type(cache) is mlx_lm_cache.CacheList:
            return mlx_lm_cache.CacheList(*(replace(c) for c in cache.caches))
        if type(cache) is not mlx_lm_cache.KVCache:
            if not isinstance(cache, BOUNDED):
                raise UnsupportedModelError(f"it has a {type(cache).__name__}, which may grow with every token")
            return cache
        count += 1
        return make(count - 1) or cache

    return [replace(c) for c in caches]


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
        caches = replace_caches(mlx_lm_cache.make_prompt_cache(model), make)
        if not probes:
            raise UnsupportedModelError("it has no full-attention KV cache to compress")
        for call, tokens in enumerate(PROBE_CALLS, 1):
            logits = model(mx.zeros((1, tokens), mx.int32), cache=caches)
            for p in probes:
                p.check(call)
            _check_uses(logits, probes)
    except Exception as error:  # a foreign model may fail in any way on a foreign cache
        raise UnsupportedModelError(f"zm_mlx cannot serve {name_of(model)}: {_reason(error)}") from error
    return [p.shape for p in probes]


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
        super().__init__(PROBE_ROWS)
        self.layer = layer
        self.updates = self.attended = 0
        self.stand_ins: list[mx.array] = []

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        # The narrowest window: a wider one could not be told from the causal mask in a short probe.
        mask = super().make_mask(length, return_array, None if window_size is None else 1)
        if isinstance(mask, mx.array):
            self.stand_ins.append(mask)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.updates += 1
        self.shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype.size, str(keys.dtype))
        keys, values = (mx.full(x.shape, mx.nan, x.dtype) for x in (keys, values))  # no mask made of NaN is causal
        self.stand_ins += [keys, values]
        return super().update_and_fetch(keys, values)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        self.attended += 1
        out = super().attend(queries, keys, values, scale, mask, sinks)
        return mx.zeros(out.shape, out.dtype)

    def check(self, calls: int) -> None:
        if self.updates != calls or self.attended != calls:
            raise UnsupportedModelError(
                f"full-attention layer {self.layer} called the hooked attention {self.attended} times "
                f"for {self.updates} updates of its cache in {calls} calls of the model"
            )


def _check_uses(logits: mx.array, probes: list[_Probe]) -> None:
    """Require that no stand-in of a probe reaches the logits.

    mlx shows its graph only as text, where ``"name" -> operation`` is a use of an array.
    """
    named = {f"layer_{p.layer}_{i}": x for p in probes for i, x in enumerate(p.stand_ins)}
    graph = io.StringIO()
    mx.export_to_dot(graph, logits, **named)
    if use := re.search(r'"layer_(\d+)_\d+" -> ', graph.getvalue()):
        raise UnsupportedModelError(
            f"the keys, values or mask of full-attention layer {use[1]} are used outside of its own attention"
        )


def _require_causal(mask: Any, length: int) -> None:
    """Require that a mask for ``length`` new tokens means "causal" and nothing else, which is what the cache does.

    Raises:
        UnsupportedModelError: it means something else.
    """
    if isinstance(mask, mx.array):
        causal = _is_causal(mask, length)
    else:
        causal = mask == "causal" or (mask is None and length == 1)
    if not causal:
        raise UnsupportedModelError(
            "its attention has another mask than the causal one (a sliding window, a bias on the scores, or none)"
        )


def _is_causal(mask: mx.array, length: int) -> bool:
    """Whether an array mask over ``length`` new tokens means "causal" and nothing else."""
    if mask.shape[-1] != length:
        return False
    if length == 1:  # a bias on a single key changes nothing, and decoding must not wait for its value
        return True
    visible = mask if mask.dtype == mx.bool_ else mask == 0
    hidden = ~mask if mask.dtype == mx.bool_ else mask < -1e3
    causal = mx.tri(length).astype(mx.bool_)
    return bool(mx.all((visible == causal) & (hidden == ~causal)).item())
