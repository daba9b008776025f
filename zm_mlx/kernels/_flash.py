"""The launch of ``metal/attend_chunk.metal``, which both ``attend_chunk`` and ``score`` need."""

from typing import Any

import mlx.core as mx

from ..layout import Layout
from ..policy import Policy
from ..stores import Kept, Recent
from ._common import MAX_THREADGROUP_BYTES, SIMD, kernel

QUERY_SIMDGROUPS = 4  # simdgroups of 8 queries in a threadgroup
THREADGROUPS = 128  # with fewer than this, rows are split
ROWS_OF_A_SPLIT = 256  # at least
INPUTS = (
    "queries", "kept_keys", "kept_values", "weight", "spread", "recent_keys", "recent_values", "sinks",
    "starts", "counts", "sizes", "settings",
)  # fmt: skip


def rows_of_a_tile(width: int, itemsize: int) -> int:
    """Rows of ``width`` elements that are in threadgroup memory at a time: 8, 16 or 32, in half of it."""
    fit = MAX_THREADGROUP_BYTES // 2 // (width * itemsize)
    return 32 if fit >= 32 else 16 if fit >= 16 else 8


def splits(threadgroups: int, rows: int) -> int:
    """Parts into which the rows are split, so that even a single KV head fills a GPU."""
    return max(1, min(-(-THREADGROUPS // threadgroups), rows // ROWS_OF_A_SPLIT))


def present(x: mx.array) -> mx.array:
    """x, or something in its place that has an address and is never read."""
    return x if x.size else mx.zeros((8,), x.dtype)


def sizes(queries: mx.array, kept: Kept, recent: Recent, layout: Layout) -> mx.array:
    """Whole numbers that stay the same from call to call, as both kernels get them."""
    group = queries.shape[1] // layout.heads
    stores = (kept.keys.shape[1], recent.keys.shape[2], kept.spread.shape[2])
    return mx.array([group, layout.heads, *stores], mx.int32)


def flash(
    queries: mx.array,
    kept: Kept,
    recent: Recent,
    *,
    left: int,
    live: int,
    layout: Layout,
    policy: Policy,
    scale: float,
    sinks: mx.array | None,
    values: bool = True,
) -> tuple[mx.array, mx.array]:
    """Compensated attention (design 2.2) and its log-sum-exp.

    Args:
        values: whether the output is wanted; without it, it is something to ignore.

    Returns:
        output [B, H * G, L, Dv] in the dtype of the queries, log-sum-exp [B, H * G, L] float32.
    """
    batch, query_heads, length, dim = queries.shape
    value_dim = recent.values.shape[-1] if values else 8
    total = query_heads // layout.heads * length
    tiles = -(-total // (8 * QUERY_SIMDGROUPS))
    most = max(g.rows for g in layout.groups) + recent.keys.shape[2]
    parts = splits(batch * layout.heads * tiles, most)
    out_type = queries.dtype if parts == 1 else mx.float32
    width = dim + value_dim if values else dim
    template: list[tuple[str, Any]] = [
        ("T", queries.dtype),
        ("OT", out_type),
        ("D", dim),
        ("DV", value_dim),
        ("BK", rows_of_a_tile(width, queries.dtype.size)),
        ("SG", QUERY_SIMDGROUPS),
        ("SINKS", sinks is not None),
        ("VALUES", values),
    ]
    shape = (parts, batch, query_heads, length)
    out, log_sum_exp = kernel("attend_chunk", INPUTS, ("out", "log_sum_exp"))(
        inputs=[
            queries,
            present(kept.keys),
            present(kept.values),
            present(kept.weight),
            present(kept.spread),
            recent.keys,
            recent.values,
            mx.zeros((1,)) if sinks is None else sinks.astype(mx.float32),
            mx.array(layout.starts, mx.int32),
            mx.array([left, live, length, parts], mx.int32),
            sizes(queries, kept, recent, layout),
            mx.array([scale, policy.alpha, policy.kappa], mx.float32),
        ],
        template=template,
        grid=(tiles * parts * QUERY_SIMDGROUPS * SIMD, layout.heads, batch),
        threadgroup=(QUERY_SIMDGROUPS * SIMD, 1, 1),
        output_shapes=[(*shape, value_dim) if values else (1,), shape],
        output_dtypes=[out_type, mx.float32],
    )
    if parts == 1:
        return out[0], log_sum_exp[0]
    whole = mx.logsumexp(log_sum_exp, axis=0)
    if values:
        share = mx.exp(log_sum_exp - whole)[..., None]
        out = (share * out).sum(axis=0).astype(queries.dtype)
    return out, whole
