"""How context rows are shared out among heads and layers."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np


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


def pyramid(rows: int, layers: int, beta: float) -> list[int]:
    """Rows of each layer, falling linearly to rows / beta in the last one, ``rows`` on average."""
    fewest = rows / beta
    step = 2 * (rows - fewest) / max(1, layers - 1)
    upper = [round(2 * rows - fewest - i * step) for i in range(layers // 2)]
    middle = [rows] * (layers % 2)
    return upper + middle + [2 * rows - n for n in reversed(upper)]
