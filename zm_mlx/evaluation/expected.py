"""The distribution of queries that expected attention is computed with (Devoto et al. 2025, arXiv 2510.00636)."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..policies.expected_attention import Queries
from .recording import Layer

FUTURE = 512  # positions to come over which the rotation is averaged
SINKS = 4  # first queries, which are left out: outliers

Rotation = Callable[..., mx.array]  # rotate(x [..., n, D], offset=position of the first)


def rotations(model: Any, caches: Sequence[Any]) -> list[Rotation]:
    """The rotation of each full-attention layer of a model that has these caches.

    Raises:
        ValueError: a layer has no module called rope, or the caches are not one for each layer.
    """
    if len(model.layers) != len(caches):
        raise ValueError("expected attention is for models with one cache for each layer")
    return [_rotation(layer) for layer, cache in zip(model.layers, caches, strict=True) if type(cache) is KVCache]


def distribution(layer: Layer, rotate: Rotation) -> Queries:
    """Mean and covariance of the prompt's queries, unrotated, then rotated as on average in what is to come.

    Raises:
        ValueError: the rotation cannot be undone by a negative offset (so with scaled ones).
    """
    queries, scale, *_ = layer.call
    plain = unrotated(queries.astype(mx.float32), rotate)
    if not mx.allclose(rotate(plain), queries.astype(mx.float32), rtol=1e-2, atol=1e-2):
        raise ValueError("expected attention cannot undo this model's rotation of queries")
    heads, dim = layer.rows.shape[1], queries.shape[3]
    counted = plain[0, :, min(SINKS, plain.shape[2] - 1) :]
    mean = counted.mean(axis=1)  # [H * G, D]
    centred = counted - mean[:, None]
    covariance = centred.swapaxes(1, 2) @ centred / counted.shape[1]
    turn = average_rotation(rotate, dim, queries.shape[2])
    mean, covariance = scale * (mean @ turn), scale**2 * (turn.T @ covariance @ turn)
    found = Queries(mean.reshape(heads, -1, dim), covariance.reshape(heads, -1, dim, dim))
    mx.eval(found)
    return found


def unrotated(queries: mx.array, rotate: Rotation) -> mx.array:
    """Queries [1, Hq, T, D] at positions 0 … T - 1 before their rotation, which turns position p by p angles."""
    length = queries.shape[2]
    return rotate(queries[:, :, ::-1], offset=1 - length)[:, :, ::-1]


def average_rotation(rotate: Rotation, dim: int, begin: int) -> mx.array:
    """The mean over positions ``begin`` … of the matrix [D, D] that x @ matrix rotates x with."""
    basis = mx.broadcast_to(mx.eye(dim)[None, :, None], (1, dim, FUTURE, dim))
    return rotate(basis, offset=begin)[0].mean(axis=1)


def _rotation(layer: nn.Module) -> Rotation:
    found = [m["rope"] for m in layer.modules() if isinstance(m.get("rope"), nn.Module)]
    if len(found) != 1:
        raise ValueError("expected attention needs layers with one module called rope")
    rotate: Rotation = found[0]
    return rotate
