"""What moves a layer's rotated queries by a number of positions, found in the model itself."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..policies import Policy
from ..state.layout import LayerShape
from .cache import ZeroMergeCache
from .hook import attach, replace_caches
from .model_caches import members
from .own_caches import own_caches
from .part import alone

TOKENS = 3
CLOSE = 0.03  # of a query's length; 16-bit models round more than the rotation is wrong by


def turns(model: nn.Module, shapes: list[LayerShape] | tuple[LayerShape, ...], by: int) -> list[mx.array | None]:
    """For each full-attention layer the matrix [D, D] with which q @ matrix is q, rotated, ``by`` positions later.

    ``None`` for layers whose rotation is not found: a layer has one module called ``rope`` that turns each position
    by the same angles, and the model's own queries at both positions agree with it (so models that rotate in
    another way, or elsewhere, are told apart by what they do).
    """
    caches = own_caches(model)
    layers = getattr(model, "layers", [])
    if len(layers) < len(caches):
        return [None] * len(shapes)
    # Layers without a cache use an earlier one's, and come last.
    own = [x for x, cache in zip(layers, caches, strict=False) if any(type(c) is KVCache for c in members([cache]))]
    if len(own) != len(shapes):
        return [None] * len(shapes)
    found: list[mx.array | None] = []
    for layer, shape in zip(own, shapes, strict=True):
        matrix = _matrix(layer, shape.head_dim, by)
        same = next((x for x in found if x is not None and matrix is not None and _equal(x, matrix)), matrix)
        found.append(same)  # one array for all layers that rotate alike
    if all(x is None for x in found):
        return found
    with alone(model):
        here, later = (_queries(model, shapes, offset) for offset in (0, by))
    return [x if _agrees(x, q, p) else None for x, q, p in zip(found, here, later, strict=True)]


def _matrix(layer: nn.Module, dim: int, by: int) -> mx.array | None:
    ropes = [m["rope"] for m in layer.modules() if isinstance(m.get("rope"), nn.Module)]
    if len(ropes) != 1:
        return None
    try:  # a basis for each: some rotations scale what they are given in place
        still, moved = (ropes[0](mx.eye(dim)[:, None, None], offset=n)[:, 0, 0].astype(mx.float32) for n in (0, by))
    except (TypeError, ValueError):  # a module of this name that is called in another way
        return None
    scale = mx.diag(still)
    if not mx.allclose(still, mx.diag(scale), atol=1e-5) or not mx.all(scale > 0):
        return None
    matrix = moved / scale  # some rotations scale what they rotate, and a rotated query is scaled already
    return matrix if mx.allclose(matrix @ matrix.T, mx.eye(dim), atol=1e-3) else None


def _equal(x: mx.array, y: mx.array) -> bool:
    return x.shape == y.shape and bool(mx.array_equal(x, y))


def _agrees(matrix: mx.array | None, here: mx.array, later: mx.array) -> bool:
    """Whether a layer moves its queries as its matrix does."""
    if matrix is None:
        return False
    error = mx.linalg.norm(here @ matrix - later, axis=-1)
    return bool(mx.all(error <= CLOSE * mx.linalg.norm(later, axis=-1) + 1e-6))


def _queries(model: nn.Module, shapes: list[LayerShape] | tuple[LayerShape, ...], offset: int) -> list[mx.array]:
    """Each layer's queries of some tokens at a position; attention gives nothing: they depend on nothing before."""
    attach(model)
    heard = [_Heard(shape.heads, offset) for shape in shapes]
    model(mx.arange(1, 1 + TOKENS)[None], cache=replace_caches(own_caches(model), lambda i: heard[i]))
    return [x.queries.astype(mx.float32) for x in heard]


class _Heard(ZeroMergeCache):
    """A cache at a position of choice that notes queries and gives nothing."""

    queries: mx.array

    def __init__(self, heads: int, begin: int) -> None:
        super().__init__(Policy().layout(64, heads), kernels="ops")
        self.begin = begin

    @property
    def offset(self) -> int:
        return self.begin

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *_: Any, **__: Any) -> mx.array:
        self.queries = queries
        return mx.zeros((*queries.shape[:3], values.shape[3]), queries.dtype)

    def attend_again(self, queries: mx.array, scale: float) -> mx.array:
        return mx.zeros_like(queries)
