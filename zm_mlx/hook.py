"""Attaches the cache to any mlx-lm model, and finds out which models it cannot serve.

mlx-lm's models call one function, ``scaled_dot_product_attention`` of ``mlx_lm.models.base``, with
their cache as an argument. It is replaced by one that looks at the cache: a ``ZeroMergeCache``
attends itself, every other cache gets mlx-lm's own function, untouched.
"""

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache

from .budget import LayerShape
from .cache import UnsupportedModelError, ZeroMergeCache

NAME = "scaled_dot_product_attention"
PROBE_CALLS = (3, 1)  # tokens
PROBE_ROWS = 64

_original = base.scaled_dot_product_attention


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
        return cache.attend(queries, keys, values, scale, mask, sinks)
    return _original(queries, keys, values, cache, scale, mask, sinks)


def register() -> None:
    """Hook every mlx-lm model module, loaded or yet to come; let mlx-lm's loader find the cache class."""
    base.scaled_dot_product_attention = attention
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

    Sliding-window, recurrent and other caches stay; members of a ``CacheList`` are replaced too.
    """
    count = 0

    def replace(cache: Any) -> Any:
        nonlocal count
        if type(cache) is mlx_lm_cache.CacheList:
            return mlx_lm_cache.CacheList(*(replace(c) for c in cache.caches))
        if type(cache) is not mlx_lm_cache.KVCache:
            return cache
        count += 1
        return make(count - 1) or cache

    return [replace(c) for c in caches]


def probe(model: nn.Module) -> list[LayerShape]:
    """Attach the hook and run a model on throw-away caches of 3 tokens, then 1 (nothing is evaluated).

    Returns:
        For each layer that will hold a ``ZeroMergeCache``, what a token takes in it.

    Raises:
        UnsupportedModelError: naming the model and the reason. Every full-attention layer must call
            the hooked attention exactly once per update, with the cache's own keys and values and
            with no mask but the causal one.
    """
    attach(model)
    probes: list[_Probe] = []

    def make(_: int) -> ZeroMergeCache:
        probes.append(_Probe())
        return probes[-1]

    try:
        caches = replace_caches(mlx_lm_cache.make_prompt_cache(model), make)
        if not probes:
            raise UnsupportedModelError("it has no full-attention KV cache to compress")
        for call, tokens in enumerate(PROBE_CALLS, 1):
            model(mx.zeros((1, tokens), mx.int32), cache=caches)
            for i, p in enumerate(probes):
                p.check(i, call)
    except Exception as error:  # a foreign model may fail in any way on a foreign cache
        reason = str(error) if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {error}"
        raise UnsupportedModelError(f"zm_mlx cannot serve {name_of(model)}: {reason}") from error
    return [p.shape for p in probes]


def name_of(model: nn.Module) -> str:
    """The model's type as in its configuration."""
    for holder in (model, getattr(model, "args", None)):
        if name := getattr(holder, "model_type", None):
            return str(name)
    return type(model).__module__.rpartition(".")[2]


class _Probe(ZeroMergeCache):
    """A cache that notes how a model uses it."""

    def __init__(self) -> None:
        super().__init__(PROBE_ROWS)
        self.updates = self.attended = 0
        self.windows: list[Any] = []

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        mask = super().make_mask(length, return_array, window_size)
        if window_size is not None:
            self.windows.append(mask)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.updates += 1
        self.shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype.size)
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
        if any(mask is w for w in self.windows):
            raise UnsupportedModelError("a sliding window is masked over a plain KV cache")
        if isinstance(mask, mx.array) and not _is_causal(mask, keys.shape[2]):
            raise UnsupportedModelError("its attention has a mask of its own")
        return super().attend(queries, keys, values, scale, mask, sinks)

    def check(self, layer: int, calls: int) -> None:
        if self.updates != calls or self.attended != calls:
            raise UnsupportedModelError(
                f"layer {layer} called the hooked attention {self.attended} times for {self.updates} updates "
                f"of its cache in {calls} calls of the model"
            )


def _is_causal(mask: mx.array, length: int) -> bool:
    """Whether an array mask over ``length`` new tokens means "causal" and nothing else."""
    if mask.shape[-1] != length:
        return False
    visible = mask if mask.dtype == mx.bool_ else mask == 0
    hidden = ~mask if mask.dtype == mx.bool_ else mask < -1e3
    causal = mx.tri(length).astype(mx.bool_)
    return bool(mx.all((visible == causal) & (hidden == ~causal)).item())
