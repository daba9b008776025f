"""From what tokens are worth to each head's share of the rows: the most important ones of all heads are counted."""

from collections.abc import Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..policies.allocation import adaptive
from ..policies.selection import pooled
from .importance import Importance
from .table import Shares

FRACTIONS = (0.025, 0.05, 0.1, 0.2, 0.4)  # of kept tokens
POOL = 13  # neighbouring tokens that are kept with an important one
PLACES = 4  # decimals

Points = tuple[tuple[float, Shares], ...]


def calibrated(model: nn.Module, texts: Iterable[Sequence[int]], importance: Importance) -> Points:
    """Each head's share of the rows at several fractions of kept tokens, averaged over texts.

    Args:
        texts: their tokens.

    Raises:
        ValueError: no text.
    """
    found = [counted([pooled(x, POOL) for x in importance(model, tokens)]) for tokens in texts]
    if not found:
        raise ValueError("a table needs a text")
    return tuple((f, _mean([shares[f] for shares in found])) for f in FRACTIONS)


def counted(importance: Sequence[mx.array]) -> dict[float, Shares]:
    """The shares in one text, at each fraction.

    Where a fraction f of T tokens is kept, the f · T · heads most important ones of one pool of all layers and
    heads are; a head's share is how many of them are its own, over the mean. (Ada-KV, arXiv 2407.11550, has such
    a pool for the heads of each layer.)

    Args:
        importance: [H, T] for each layer.
    """
    heads, tokens = sum(x.shape[0] for x in importance), sum(x.size for x in importance)
    found = {}
    for fraction in FRACTIONS:
        total = max(1, round(fraction * tokens))
        counts = adaptive(importance, total)
        found[fraction] = tuple(tuple(n * heads / total for n in layer) for layer in counts)
    return found


def _mean(texts: Sequence[Shares]) -> Shares:
    """The shares of several texts averaged, head by head."""
    layers = zip(*texts, strict=True)
    return tuple(tuple(np.mean(layer, axis=0).round(PLACES).tolist()) for layer in layers)
