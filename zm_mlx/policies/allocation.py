"""How context rows are shared out among heads and layers."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..calibration.table import apportion
from ..state.layout import Layout


def adaptive(importance: Sequence[mx.array], total: int) -> list[tuple[int, ...]]:
    """How many of the ``total`` most important tokens of all heads are of each head (ties: the first).

    Args:
        importance: [H, n] float32 for each layer of the pool.
    """
    heads = [x.shape[0] for x in importance]
    flat = np.concatenate([np.array(x, np.float32).reshape(-1) for x in importance])
    owner = np.repeat(np.arange(sum(heads)), np.repeat([x.shape[1] for x in importance], heads))
    best = np.argsort(-np.nan_to_num(flat, nan=-np.inf), kind="stable")[:total]
    counts = np.bincount(owner[best], minlength=sum(heads)).tolist()
    ends = np.cumsum(heads).tolist()
    return [tuple(counts[end - h : end]) for h, end in zip(heads, ends, strict=True)]


def safeguarded(layout: Layout, importance: mx.array, safeguard: float) -> Layout:
    """A layer's context rows by its heads' parts of the most important tokens, a share of them alike (Ada-KV).

        M_h = (1 - α) · |{tokens of head h among the H · M most important}| + α · M

    Args:
        importance: [H, n] float32.
        safeguard: α.
    """
    total = sum(layout.context)
    if importance.size <= total:
        return layout
    (counts,) = adaptive([importance], total)
    uniform = safeguard * total / layout.heads
    return replace(layout, context=tuple(apportion(total, [(1 - safeguard) * n + uniform for n in counts])))


def pyramid(rows: int, layers: int, beta: float) -> list[int]:
    """Rows of each layer, falling linearly to rows / beta in the last one, ``rows`` on average."""
    fewest = rows / beta
    step = 2 * (rows - fewest) / max(1, layers - 1)
    upper = [round(2 * rows - fewest - i * step) for i in range(layers // 2)]
    middle = [rows] * (layers % 2)
    return upper + middle + [2 * rows - n for n in reversed(upper)]
