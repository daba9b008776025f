"""Importance from the queries of a chunk or of the end of a prompt, as Metal kernels (design 4)."""

import mlx.core as mx

from ..layout import Layout
from ..policy import Policy
from ..stores import Kept, Recent
from ._common import SIMD, kernel
from ._flash import flash, present, sizes

ROW_SIMDGROUPS = 8  # simdgroups of 8 rows in a threadgroup
INPUTS = (
    "queries", "kept_keys", "weight", "kept_score", "spread", "recent_keys", "recent_score", "log_sum_exp",
    "starts", "counts", "sizes", "settings",
)  # fmt: skip


def queries_of_a_tile(dim: int, itemsize: int) -> int:
    """Queries in threadgroup memory at a time."""
    return 32 if 32 * dim * itemsize <= 16 * 1024 else 16


def score(
    queries: mx.array,
    kept: Kept,
    recent: Recent,
    *,
    tokens: int,
    left: int,
    live: int,
    layout: Layout,
    policy: Policy,
    scale: float,
    sinks: mx.array | None = None,
    log_sum_exp: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """``compress.score``: λ^tokens score + decayed column sums of the probabilities (design 2.3).

    Args:
        log_sum_exp: of the queries' logits and sinks, [B, H * G, L] float32, if it is known.

    Returns:
        The new scores of the kept rows [B, K] and of the recent store [B, H, rows], float32.
    """
    if log_sum_exp is None:
        log_sum_exp = flash(
            queries,
            kept,
            recent,
            left=left,
            live=live,
            layout=layout,
            policy=policy,
            scale=scale,
            sinks=sinks,
            values=False,
        )[1]
    batch, dim, rows = queries.shape[0], queries.shape[-1], recent.score.shape[2]
    tiles = max(-(-g.rows // 8) for g in layout.groups) + -(-rows // 8)
    threads = ROW_SIMDGROUPS * SIMD
    settings = [scale, policy.alpha, policy.kappa, policy.decay, policy.decay**tokens]
    on_kept, on_recent = kernel("score", INPUTS, ("new_kept_score", "new_recent_score"))(
        inputs=[
            queries,
            present(kept.keys),
            present(kept.weight),
            present(kept.score),
            present(kept.spread),
            recent.keys,
            recent.score,
            log_sum_exp,
            mx.array(layout.starts, mx.int32),
            mx.array([left, live, queries.shape[2]], mx.int32),
            sizes(queries, kept, recent, layout),
            mx.array(settings, mx.float32),
        ],
        template=[
            ("T", queries.dtype),
            ("D", dim),
            ("BQ", queries_of_a_tile(dim, queries.dtype.size)),
            ("SG", ROW_SIMDGROUPS),
        ],
        grid=(-(-tiles // ROW_SIMDGROUPS) * threads, layout.heads, batch),
        threadgroup=(threads, 1, 1),
        output_shapes=[present(kept.score).shape, recent.score.shape],
        output_dtypes=[mx.float32, mx.float32],
    )
    return on_kept if kept.score.size else kept.score, on_recent
