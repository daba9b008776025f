"""Prefill attention as Metal kernels (design 4)."""

import mlx.core as mx

from ..layout import Layout
from ..policy import Policy
from ..stores import Kept, Recent
from ._flash import flash
from .score import score


def attend_chunk(
    queries: mx.array,
    kept: Kept,
    recent: Recent,
    *,
    left: int,
    live: int,
    layout: Layout,
    policy: Policy,
    scale: float,
    sinks: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """``compress.attend`` for L queries at once (design 2.2, 2.3), of any L.

    Returns:
        output [B, H * G, L, Dv] in the dtype of the queries; the new scores of the kept rows [B, K]
        and of the recent store [B, H, rows] (0 past the live ones), float32.
    """
    out, log_sum_exp = flash(
        queries, kept, recent, left=left, live=live, layout=layout, policy=policy, scale=scale, sinks=sinks
    )
    return out, *score(
        queries,
        kept,
        recent,
        left=left,
        live=live,
        layout=layout,
        policy=policy,
        scale=scale,
        tokens=queries.shape[2],
        log_sum_exp=log_sum_exp,
    )
