"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in the space of its latent rows.

A token has one latent vector c of R dims and one rotated key of r dims, which all heads share. mlx-lm caches these
two, multiplies c by each head's matrices where a call brings more than one token, and hands the rotated part of the
scores over as a mask. Here a row is one KV head's: its key is [rotated key, c], its value c.

What the module makes of its rows it shows by itself: it is given the unit vectors in their place. Its scores against
these are the queries' coordinates in the space of the rows, and its values the matrix that leads out of it.
"""

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .batch import ZeroMergeBatch
from .cache import ZeroMergeCache


def is_latent(module: nn.Module) -> bool:
    """Whether a module is mlx-lm's latent attention over all tokens, without an index that chooses some."""
    projections = [type(module.get(name)).__module__ for name in ("embed_q", "unembed_out")]
    return projections == ["mlx_lm.models.mla"] * 2 and "indexer" not in module


class Latent:
    """The cache of one call of a latent attention; the hooked attention calls ``attend``."""

    def __init__(self, cache: ZeroMergeCache | ZeroMergeBatch) -> None:
        self.cache = cache

    @property
    def offset(self) -> int | mx.array:
        """That of the cache behind."""
        return self.cache.offset

    def update_and_fetch(self, latent: mx.array, rotated: mx.array) -> tuple[mx.array, mx.array]:
        """Take new tokens' latent vectors [B, 1, L, R] and rotated keys [B, 1, L, r].

        Returns:
            Unit vectors in place of all rows, [1, 1, r + R, R] and [1, 1, r + R, r].
        """
        self.rows = self.cache.update_and_fetch(mx.concatenate([rotated, latent], axis=-1), latent)
        self.rotated_dim = rotated.shape[3]
        self.latent, rotated = _units(latent.shape[3], self.rotated_dim, latent.dtype)
        return self.latent, rotated

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, scores: Any) -> mx.array:
        """The module's attention of queries [B, Hq, L, d] over what it made of the unit vectors.

        Args:
            keys: [B, Hq, r + R, d]; or the latent unit vectors themselves, where queries are in latent space already.
            values: [B, Hq, r + R, Dv]; or the latent unit vectors themselves.
            scores: to be added to those of the keys, [B, Hq, L, r + R]; or none.

        Returns:
            [B, Hq, L, Dv], or [B, Hq, L, R].
        """
        queries, rotated = queries * scale, self.rotated_dim
        if keys is self.latent:
            queries = mx.concatenate([scores[..., :rotated], queries], axis=-1)
        else:
            queries = queries @ keys.swapaxes(-1, -2)
            queries = queries if scores is None else queries + scores
        out = self.cache.attend(queries, *self.rows, 1.0)
        return out if values is self.latent else out @ values[..., rotated:, :]


@lru_cache(maxsize=16)
def _units(latent: int, rotated: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    unit = mx.eye(rotated + latent, dtype=dtype)[None, None]
    parts = mx.contiguous(unit[..., rotated:]), mx.contiguous(unit[..., :rotated])
    mx.eval(parts)
    return parts
