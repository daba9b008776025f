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

Arguments = dict[str, Any]  # of a method, by name
_OURS = "_attention_of_zm_mlx"


def replace_attention(model: nn.Module) -> None:
    """Replace it in the classes of a model's modules, once; with other caches they do what they did."""
    for module in model.modules():
        cls = type(module)
        if is_latent(module):
            _replace(cls, "__call__", _latent)
        home, _, name = cls.__module__.rpartition(".")
        if home != "mlx_lm.models":
            continue
        for (file, owner, method), attention in BY_METHOD.items():
            if (file, owner) == (name, cls.__name__):
                _replace(cls, method, _own(attention))


def _latent(original: Callable[..., Any], given: Arguments) -> Any:
    return original(**{**given, "mask": None, "cache": Latent(given["cache"])})


def _own(attention: Attention) -> Callable[[Callable[..., Any], Arguments], Any]:
    def call(original: Callable[..., Any], given: Arguments) -> Any:
        layer, x, *_ = given.values()
        return attention(layer, x, given["cache"])

    return call


def _replace(cls: type, method: str, ours: Callable[[Callable[..., Any], Arguments], Any]) -> None:
    owner = next(c for c in cls.__mro__ if method in vars(c))
    original = vars(owner)[method]
    if hasattr(original, _OURS):
        return
    names = list(inspect.signature(original).parameters)
    mask = next(name for name in names if name in ("mask", "attention_mask"))

    def call(*arguments: Any, **named: Any) -> Any:
        given = {**dict(zip(names, arguments, strict=False)), **named}
        if not isinstance(given.get("cache"), ZeroMergeCache | ZeroMergeBatch):
            return original(*arguments, **named)
        require_causal(given.get(mask), given[names[1]].shape[1])
        return ours(original, given)

    setattr(call, _OURS, True)
    setattr(owner, method, call)
