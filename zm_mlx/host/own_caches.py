"""The caches that a model has by itself, also once it was told to make ours.

``model.make_cache = lambda: zm_mlx.make_prompt_cache(model, 2048)`` is how all of mlx-lm (its server, its batches) gets
caches of this package. These are made in place of the model's own, which the same name would give.
"""

from threading import local
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..errors import UnsupportedModelError

_asked = local()  # by each thread: the model whose ``make_cache`` runs


class _MakesOurs(BaseException):
    """A model's ``make_cache`` asks for the model's own caches. No ``Exception``: nobody on the way may catch it."""


def own_caches(model: nn.Module) -> list[Any]:
    """mlx-lm's caches for a model, one a layer, whatever ``make_cache`` the model's object was given.

    Raises:
        UnsupportedModelError: the model's class, and not its object, was given one that makes this package's caches.
    """
    outer = getattr(_asked, "model", None)
    if outer is model:
        raise _MakesOurs
    _asked.model = model
    try:
        return make_prompt_cache(model)  # type: ignore[no-any-return]
    except _MakesOurs:
        return _of_class(model)
    finally:
        _asked.model = outer


def _of_class(model: nn.Module) -> list[Any]:
    factory = getattr(type(model), "make_cache", None)
    try:
        return [KVCache() for _ in model.layers] if factory is None else factory(model)
    except _MakesOurs:
        name = type(model).__name__
        raise UnsupportedModelError(
            f"the class {name} makes zm_mlx's caches, so its own are not known: give make_cache to the model, not to "
            "its class"
        ) from None
