"""What of a model a process holds beside others, and what ranks that hold parts of one model agree on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..calibration.fingerprint import PART, lineage
from ..errors import UnsupportedModelError, UserError
from ..sampling import random_state
from ..state.layout import LayerShape, Layout
from . import ranks
from .probe import probe

Way = Literal["heads", "layers"]


@dataclass(frozen=True)
class Part:
    """One of ``count`` parts of a model.

    Args:
        lineage: of the whole model, by which its table is found.
        whole: the full-attention layers of the whole model, in their order; none where it cannot be served.
        first: the first of these that is here.
        heads: KV heads of each layer that is here.
    """

    rank: int
    count: int
    lineage: str
    whole: tuple[LayerShape, ...]
    first: int
    heads: tuple[int, ...]

    def of(self, layouts: Sequence[Layout]) -> tuple[Layout, ...]:
        """Of layouts of the whole model those that are here, with the heads that are here."""
        found = []
        for layout, heads in zip(layouts[self.first :], self.heads, strict=False):
            begin = 0 if heads == layout.heads else self.rank * heads
            found.append(replace(layout, context=layout.context[begin : begin + heads]))
        return tuple(found)


def part_of(model: nn.Module) -> Part | None:
    """The part that a model is; ``None`` for a whole one."""
    return getattr(model, PART, None)


def least(model: nn.Module, number: int | None) -> int | None:
    """The least of the numbers that the ranks of a model know; a whole model's number as it is."""
    if part_of(model) is None:
        return number
    return min((n for n in ranks.together(lambda: number) if n is not None), default=None)


def most(model: nn.Module, number: int) -> int:
    """The largest of the numbers of a model's ranks; a whole model's number as it is."""
    return number if part_of(model) is None else max(ranks.together(lambda: number))


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Let a model whose layers are split be called by one rank: it takes embeddings for what earlier layers give."""
    inner: Any = getattr(model, "model", None)
    if part_of(model) is None or not hasattr(inner, "pipeline_size"):
        yield
        return
    place = inner.pipeline_rank, inner.pipeline_size
    try:
        inner.pipeline_rank, inner.pipeline_size = 0, 1
        yield
    finally:
        inner.pipeline_rank, inner.pipeline_size = place


def split(model: nn.Module, name: str, way: Way) -> None:
    """Leave of a model what this rank is to hold, and evaluate it.

    Args:
        model: whole, its weights not yet evaluated, so that only what stays takes memory for long.
        name: how messages call it.
        way: the KV heads of all layers are shared out (mlx-lm's ``shard``), or the layers (its ``pipeline``).

    Raises:
        UserError: it cannot be split so, or not in so many parts.
    """
    _require(model, name, way)
    known, whole = lineage(model), _shapes(model)
    state = random_state()
    try:
        if way == "layers":
            model.model.pipeline(mx.distributed.init())
        else:
            model.shard(mx.distributed.init())
        here = _shapes(model) if whole else ()
        if whole and way == "heads":
            _require_heads(whole, here)
    except (ValueError, UnsupportedModelError) as error:
        raise UserError(_remedy(model, name, way, whole, error)) from error
    mx.random.seed(state)  # new layers have drawn weights of their own
    for _, weight in tree_flatten(model.parameters()):
        mx.eval(weight)  # one by one: a weight is read whole, of which a part stays
    heads = tuple(s.heads for s in here)
    held = ranks.together(lambda: list(heads))
    after = held[ranks.rank() + 1 :] if way == "layers" else []  # rank 0 has the last layers
    first = sum(len(layers) for layers in after)
    setattr(model, PART, Part(ranks.rank(), ranks.count(), known, whole, first, heads))


def _require(model: nn.Module, name: str, way: Way) -> None:
    """Raise ``UserError`` unless mlx-lm can split the model so."""
    if way == "layers" and not hasattr(getattr(model, "model", None), "pipeline"):
        raise UserError(f"--pipeline: mlx-lm cannot split the layers of {name}; leave it out, and heads are split")
    if way == "heads" and not hasattr(model, "shard"):
        more = " --pipeline splits its layers" if hasattr(getattr(model, "model", None), "pipeline") else ""
        raise UserError(f"{name}: mlx-lm cannot split the heads of this model;{more or ' start it without mlx.launch'}")


def _shapes(model: nn.Module) -> tuple[LayerShape, ...]:
    try:
        return tuple(probe(model))
    except UnsupportedModelError:  # with --cache full it can be served all the same
        return ()


def _require_heads(whole: Sequence[LayerShape], here: Sequence[LayerShape]) -> None:
    for a, b in zip(whole, here, strict=True):
        if (a.head_dim, a.value_dim) != (b.head_dim, b.value_dim) or b.heads not in (a.heads, a.heads / ranks.count()):
            raise ValueError("heads were cut through")


def _remedy(model: nn.Module, name: str, way: Way, whole: Sequence[LayerShape], error: Exception) -> str:
    count = ranks.count()
    heads = sorted({s.heads for s in whole})
    if way == "heads" and any(h % count for h in heads):
        works = [str(n) for n in range(2, min(heads) + 1) if not any(h % n for h in heads)]
        remedies = [f"mlx.launch -n {' or '.join(works)}"] if works else []
        if hasattr(getattr(model, "model", None), "pipeline"):
            remedies.append("--pipeline, which splits layers")
        help = " or ".join(remedies) or "start it without mlx.launch"
        return f"{name}: its {' and '.join(map(str, heads))} KV heads cannot be shared evenly by {count} ranks: {help}"
    return f"{name}: cannot be split in {count} parts ({type(error).__name__}: {error})"
