"""Which caches of a model are ours: the one place that looks into mlx-lm's containers of caches."""

from collections.abc import Iterable, Iterator
from typing import Any

from .cache import ZeroMergeCache


def members(caches: Iterable[Any]) -> Iterator[Any]:
    """All caches of a model, those inside of a ``CacheList`` one by one, in the order of its layers."""
    for cache in caches:
        inner = getattr(cache, "caches", None)
        if isinstance(inner, list | tuple):
            yield from members(inner)
        else:
            yield cache


def zero_merge(caches: Iterable[Any]) -> list[ZeroMergeCache]:
    """The ZeroMerge caches of a model, one for each of its full-attention layers."""
    return [c for c in members(caches) if isinstance(c, ZeroMergeCache)]
