"""Attention of the models that do not call mlx-lm's function for it: each here as its module computes it.

Layers are mlx-lm's modules, x is [B, L, hidden].
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .batch import ZeroMergeBatch
from .cache import ZeroMergeCache

Ours = ZeroMergeCache | ZeroMergeBatch
Attention = Callable[[Any, mx.array, Ours], mx.array]


def gemma2(layer: Any, x: mx.array, cache: Ours) -> mx.array:
    """Scores have a soft cap."""
    queries, keys, values = (
        _heads(project(x), n)
        for project, n in (
            (layer.q_proj, layer.n_heads),
            (layer.k_proj, layer.n_kv_heads),
            (layer.v_proj, layer.n_kv_heads),
        )
    )
    queries, keys = _rotated(layer.rope, queries, keys, cache)
    rows = cache.update_and_fetch(keys, values)
    return _joined(cache.attend(queries, *rows, layer.scale, cap=layer.attn_logit_softcapping), layer.o_proj)


def olmo(block: Any, x: mx.array, cache: Ours) -> mx.array:
    """mlx-lm's own takes one token at a time: it adds the name of its mask, "causal", to the scores."""
    queries, keys, values = (_heads(part, block.n_heads) for part in mx.split(block.att_proj(x), 3, axis=-1))
    queries, keys = _rotated(block.rope, queries, keys, cache)
    rows = cache.update_and_fetch(keys, values)
    return _joined(cache.attend(queries, *rows, block.scale), block.attn_out)


def plamo(layer: Any, x: mx.array, cache: Ours) -> mx.array:
    """KV head j of H serves the query heads j, j + H, …, which are put next to each other here."""
    queries = _heads(layer.q_proj(x), layer.q_num_heads)
    keys, values = _heads(layer.k_proj(x), layer.k_num_heads), _heads(layer.v_proj(x), layer.v_num_heads)
    queries, keys = _rotated(layer.rotary_emb, queries, keys, cache)
    rows = cache.update_and_fetch(keys, values)
    queries = mx.unflatten(queries, 1, (-1, layer.k_num_heads)).swapaxes(1, 2).flatten(1, 2)
    out = cache.attend(queries, *rows, layer.scale)
    out = mx.unflatten(out, 1, (layer.k_num_heads, -1)).swapaxes(1, 2).flatten(1, 2)
    return _joined(out, layer.o_proj)


def plamo2(layer: Any, x: mx.array, cache: Ours) -> mx.array:
    """Queries and keys are normalised before they are rotated."""
    first = [layer.q_proj_dim, layer.q_proj_dim + layer.k_proj_dim]
    parts = mx.split(layer.qkv_proj(x), first, axis=-1)
    counts = (layer.q_num_heads, layer.k_num_heads, layer.v_num_heads)
    queries, keys, values = (_heads(part, n) for part, n in zip(parts, counts, strict=True))
    queries = mx.fast.rms_norm(queries, weight=None, eps=1e-6) * layer.q_weight[:, None]
    keys = mx.fast.rms_norm(keys, weight=None, eps=1e-6) * layer.k_weight[:, None]
    queries, keys = _rotated(layer.rope, queries, keys, cache)
    rows = cache.update_and_fetch(keys, values)
    return _joined(cache.attend(queries, *rows, layer.scale), layer.o_proj)


def stablelm(layer: Any, x: mx.array, cache: Ours) -> mx.array:
    """mlx-lm's own converts queries and keys to float32, in which this cache computes anyway."""
    batch, length, _ = x.shape
    queries = layer.q_proj(x).reshape(batch, length, layer.num_heads, -1)
    keys = layer.k_proj(x).reshape(batch, length, layer.num_key_value_heads, -1)
    if layer.qk_layernorm:
        queries, keys = layer.q_layernorm(queries), layer.k_layernorm(keys)
    queries, keys = _rotated(layer.rope, queries.swapaxes(1, 2), keys.swapaxes(1, 2), cache)
    rows = cache.update_and_fetch(keys, _heads(layer.v_proj(x), layer.num_key_value_heads))
    return _joined(cache.attend(queries, *rows, queries.shape[3] ** -0.5), layer.o_proj)


# By file of mlx_lm.models, class and method.
BY_METHOD: dict[tuple[str, str, str], Attention] = {
    ("gemma2", "Attention", "__call__"): gemma2,
    ("olmo", "TransformerBlock", "attend"): olmo,
    ("plamo", "Attention", "__call__"): plamo,
    ("plamo2", "Attention", "__call__"): plamo2,
    ("stablelm", "Attention", "__call__"): stablelm,
}


def _heads(x: mx.array, count: int) -> mx.array:
    """[B, L, H * D] → [B, H, L, D]."""
    return mx.unflatten(x, -1, (count, -1)).swapaxes(1, 2)


def _joined(x: mx.array, project: Any) -> mx.array:
    """[B, H, L, D] → [B, L, H * D] → [B, L, hidden]."""
    out: mx.array = project(x.swapaxes(1, 2).flatten(2, 3))
    return out


def _rotated(rope: Any, queries: mx.array, keys: mx.array, cache: Ours) -> tuple[mx.array, mx.array]:
    offset = cache.offset
    return rope(queries, offset=offset), rope(keys, offset=offset)
