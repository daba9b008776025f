"""Attaches the cache to any mlx-lm model.

mlx-lm's models call one function, ``scaled_dot_product_attention`` of ``mlx_lm.models.base``, with
their cache as an argument. It is replaced by one that looks at the cache: a ``ZeroMergeCache``, or a
batch of them, attends itself, every other cache gets mlx-lm's own function, untouched. Modules that compute
their attention without that function, or transform what their cache holds, get theirs from ``replacing``.
"""

import importlib
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache

from ..errors import UnsupportedModelError
from .batch import ZeroMergeBatch
from .cache import ZeroMergeCache
from .causal import require_causal
from .latent import Latent
from .model_caches import members, zero_merge
from .replacing import replace_attention
from .sharing import Later, Owner

mlx_lm_generate: Any = importlib.import_module("mlx_lm.generate")  # the package's name of it is the function

NAME = "scaled_dot_product_attention"
BOUNDED = (mlx_lm_cache.RotatingKVCache, mlx_lm_cache.ChunkedKVCache, mlx_lm_cache.ArraysCache)

_original: Callable[..., mx.array] = base.scaled_dot_product_attention
_original_quantize: Callable[..., None] = mlx_lm_generate.maybe_quantize_kv_cache
_original_merge: Callable[..., list[Any]] = mlx_lm_generate._merge_caches


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's ``scaled_dot_product_attention``, except for a ``ZeroMergeCache`` and a batch of them."""
    if isinstance(cache, ZeroMergeCache | ZeroMergeBatch):
        require_causal(mask, queries.shape[2])
        return cache.attend(queries, keys, values, scale, sinks)
    if isinstance(cache, Latent | Owner | Later):
        return cache.attend(queries, keys, values, scale, mask)
    return _original(queries, keys, values, cache, scale, mask, sinks)


def quantize(prompt_cache: list[Any], quantized_kv_start: int, kv_group_size: int, kv_bits: int | None) -> None:
    """mlx-lm's ``maybe_quantize_kv_cache``, which generation calls after each of its calls of the model.

    Raises:
        ValueError: ``kv_bits`` is given with a ``ZeroMergeCache``. mlx-lm would ignore it until
            ``quantized_kv_start``, and inside of a ``CacheList`` for ever.
    """
    if kv_bits is not None and zero_merge(prompt_cache):
        raise ValueError(
            f"kv_bits={kv_bits} (--kv-bits) of mlx-lm does not work with a ZeroMerge cache: leave it out, and make "
            f"the caches with zm_mlx.make_prompt_cache(model, kv_bits={kv_bits})"
        )
    _original_quantize(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)


def merge(caches: list[list[Any]]) -> list[Any]:
    """mlx-lm's ``_merge_caches``, which makes the caches of a batch from those of its sequences.

    Raises:
        ValueError: sequences differ in which of their caches are ZeroMerge caches. mlx-lm would make full ones of all.
    """
    kinds = [[isinstance(c, ZeroMergeCache) for c in members(own)] for own in caches]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            "a batch takes ZeroMerge caches for all of its sequences or for none: "
            "make them all with zm_mlx.make_prompt_cache(model, ...)"
        )
    return _original_merge(caches)


def register() -> None:
    """Hook every mlx-lm model module, loaded or yet to come; let mlx-lm's loader find the cache classes."""
    base.scaled_dot_product_attention = attention
    mlx_lm_generate.maybe_quantize_kv_cache = quantize
    mlx_lm_generate._merge_caches = merge
    mlx_lm_cache.ZeroMergeCache = ZeroMergeCache
    mlx_lm_cache.ZeroMergeBatch = ZeroMergeBatch
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
    replace_attention(model)


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
