"""Layers that attend to an earlier layer's keys and values (Gemma 3n, Gemma 4): what its queries saw is seen again.

The attention of later layers counts for nothing in what a cache keeps: it comes after the compaction.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedModelError
from ..ops.remembering import Remembering
from ..state.rows import after
from .batch import ZeroMergeBatch, padded
from .cache import ZeroMergeCache

SOURCES = ("previous_kvs", "layer_idx_to_cache_idx")  # of a model: for each layer that whose cache it uses
OWNER = "_later_layers"


def mark_owners(model: nn.Module) -> None:
    """Mark the attention of layers whose keys and values others use, by the number of these."""
    for module in model.modules():
        for source in SOURCES:
            used = Counter(by for layer, by in enumerate(module.get(source) or ()) if layer != by)
            for layer, count in used.items():
                setattr(module["layers"][layer].self_attn, OWNER, count)


class Owner:
    """The cache of one call of a layer whose keys and values are used by so many later ones."""

    def __init__(self, cache: ZeroMergeCache | ZeroMergeBatch, later: int) -> None:
        self.cache, self.later = cache, later

    @property
    def offset(self) -> int | mx.array:
        """That of the cache behind."""
        return self.cache.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As the cache behind."""
        return self.cache.update_and_fetch(keys, values)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any) -> mx.array:
        """As the cache behind, which remembers what the queries saw."""
        cache = self.cache
        for row in cache.rows if isinstance(cache, ZeroMergeBatch) else [cache]:
            if row.rereading:
                raise UnsupportedModelError("prompts of a model whose layers share keys and values are not read twice")
            row.operations = Remembering.of(row.operations, row.layer, self.later)
        return cache.attend(queries, keys, values, scale)


class Later:
    """The cache of one call of a layer that uses the keys and values of an earlier one."""

    def __init__(self, cache: ZeroMergeCache | ZeroMergeBatch) -> None:
        self.cache = cache

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Nothing is new."""
        return keys, values

    def keys_and_values(self) -> tuple[None, None]:
        """Stand-ins."""
        return None, None

    def attend(self, queries: mx.array, keys: Any, values: Any, scale: float, mask: Any) -> mx.array:
        """Attention of queries [B, Hq, L, D] over what the earlier layer's saw → [B, Hq, L, Dv]."""
        cache = self.cache
        if isinstance(cache, ZeroMergeCache):
            return cache.attend_again(queries, scale)
        outputs: list[mx.array] = []
        for i, (row, columns) in enumerate(zip(cache.rows, cache.attended, strict=True)):
            new = queries[i : i + 1, :, columns]
            out = row.attend_again(after(new, *outputs[-1:]), scale) if new.shape[2] else mx.zeros_like(new)
            outputs.append(padded(out, columns, queries.shape[2]))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=0)


class Lent(tuple[mx.array, mx.array]):
    """Keys and values of a layer, which say whose cache they are of."""

    cache: ZeroMergeCache | ZeroMergeBatch

    @classmethod
    def of(cls, rows: Iterable[mx.array], cache: ZeroMergeCache | ZeroMergeBatch) -> "Lent":
        made = cls(cast(Any, rows))
        made.cache = cache
        return made
