"""Puts this package's attention in the place of a module's own, where its cache is one of ours."""

import inspect
from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from .batch import ZeroMergeBatch
from .cache import ZeroMergeCache
from .causal import require_causal
from .latent import Latent, is_latent
from .own_attention import BY_METHOD, Attention
from .sharing import OWNER, Later, Lent, Owner, mark_owners

Original = Callable[..., Any]
Arguments = dict[str, Any]  # by name
Replacement = Callable[[Original, Arguments], Any]
_OURS = "_attention_of_zm_mlx"


def replace_attention(model: nn.Module) -> None:
    """Replace it in the classes of a model's modules, once; with other caches they do what they did."""
    mark_owners(model)
    for module in model.modules():
        cls = type(module)
        if is_latent(module):
            _replace(cls, "__call__", _latent)
        for (file, name, method), ours in BY_CLASS.items():
            if (cls.__module__, cls.__name__) == (f"mlx_lm.models.{file}", name):
                _replace(cls, method, ours)


def _latent(original: Original, given: Arguments) -> Any:
    return original(**{**given, "mask": None, "cache": Latent(given["cache"])})


def _gemma3n(original: Original, given: Arguments) -> Any:
    layer, cache = given["self"], given["cache"]
    if layer.is_kv_shared_layer:
        return original(**{**given, "cache": Later(cache)})
    later = getattr(layer, OWNER, 0)
    return original(**{**given, "cache": Owner(cache, later)} if later else given)


def _gemma4(original: Original, given: Arguments) -> Any:
    lent = given.get("shared_kv")
    if isinstance(lent, Lent):
        return original(**{**given, "cache": Later(lent.cache)})
    cache, later = given["cache"], getattr(given["self"], OWNER, 0)
    if not later:
        return original(**given)
    out, rows, offset = original(**{**given, "cache": Owner(cache, later)})
    return out, Lent.of(rows, cache), offset


def _own(attention: Attention) -> Replacement:
    def call(original: Original, given: Arguments) -> Any:
        layer, x, *_ = given.values()
        return attention(layer, x, given["cache"])

    return call


# By file of mlx_lm.models, class and method.
BY_CLASS: dict[tuple[str, str, str], Replacement] = {
    ("gemma3n", "Gemma3nAttention", "__call__"): _gemma3n,
    ("gemma4_text", "Attention", "__call__"): _gemma4,
    **{key: _own(attention) for key, attention in BY_METHOD.items()},
}


def _replace(cls: type, method: str, ours: Replacement) -> None:
    owner = next(c for c in cls.__mro__ if method in vars(c))
    original = vars(owner)[method]
    if hasattr(original, _OURS):
        return
    names = list(inspect.signature(original).parameters)
    mask = next(name for name in names if name in ("mask", "attention_mask"))

    def call(*arguments: Any, **named: Any) -> Any:
        given = {**dict(zip(names, arguments, strict=False)), **named}
        if not isinstance(given.get("cache"), ZeroMergeCache | ZeroMergeBatch) and not isinstance(
            given.get("shared_kv"), Lent
        ):
            return original(*arguments, **named)
        require_causal(given.get(mask), given[names[1]].shape[1])
        return ours(original, given)

    setattr(call, _OURS, True)
    setattr(owner, method, call)
