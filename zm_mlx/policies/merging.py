"""Residual merging: victims become part of a few rows that stand for many tokens (method.md 4)."""

import mlx.core as mx

from ..state.coded import Coded
from ..state.rows import Dense, products
from ..state.state import Merged, Residuals
from .selection import without_nan


def merge(merged: Merged, victims: Dense | Coded, scores: mx.array, fresh: bool) -> Merged:
    """Merge victims into the residual rows of one group (paper: residual merging).

    Each victim joins the residual row r* = argmax_r k·k_r (ties: the lowest; NaN counts as -inf), by the
    keys as they were before this call; sums and weights add, so the order of victims does not matter.
    While the residual rows are empty (``fresh``), the victims fill them instead, in position order,
    cut into contiguous groups of equal size (± 1).

    Args:
        victims: [B, h, v] in the order of positions.
        scores: of the victims, [B, h, v] float32; a residual row's is their maximum.
    """
    count, residual = scores.shape[-1], merged.weight.shape[-1]
    if fresh:
        target = mx.broadcast_to(mx.arange(count) * residual // max(count, 1), scores.shape)
    else:
        nearest = [
            mx.argmax(without_nan(products(victims.dense(t).keys, merged.rows.keys)), axis=-1) for t in victims.tiles()
        ]
        target = mx.concatenate(nearest, axis=-1)
    joins = target[..., None] == mx.arange(residual)  # [B, h, v, R]
    share = joins.astype(mx.float32)
    key_sum = value_sum = square_sum = mx.array(0.0)
    for t in victims.tiles():
        to_rows = share[:, :, t].swapaxes(-1, -2)
        k, v = victims.dense(t)
        key_sum, value_sum = key_sum + to_rows @ k, value_sum + to_rows @ v
        square_sum = square_sum + (to_rows @ (k * k).sum(axis=-1, keepdims=True))[..., 0]
    weight = share.sum(axis=2)
    best = mx.where(joins, scores[..., None], -mx.inf).max(axis=2)
    if not fresh:
        key_sum, value_sum = key_sum + merged.residuals.key_sum, value_sum + merged.residuals.value_sum
        square_sum, weight = square_sum + merged.residuals.square_sum, weight + merged.weight
        best = mx.maximum(best, merged.score)
    tokens = mx.maximum(weight, 1)[..., None]
    mean = key_sum / tokens
    return Merged(
        rows=Dense(mean.astype(victims.dtype), (value_sum / tokens).astype(victims.dtype)),
        weight=weight,
        score=mx.where(weight > 0, best, 0),
        residuals=Residuals(
            spread=mx.maximum(0, square_sum / tokens[..., 0] - (mean * mean).sum(axis=-1)) / victims.head_dim,
            key_sum=key_sum,
            value_sum=value_sum,
            square_sum=square_sum,
        ),
    )
