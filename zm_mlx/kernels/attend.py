"""One decode step of attention as Metal kernels (metal/attend.metal, metal/attend_join.metal)."""

import mlx.core as mx

from ..layout import Layout
from ..policy import Policy
from ..stores import Kept, Recent
from ._common import SIMD, TILE, kernel

THREADS = 8 * SIMD
CHUNK = 512  # rows whose scores one threadgroup of the second launch computes
LOGITS = 4096  # floats of threadgroup memory
MANY = 32  # threadgroups that keep a GPU busy enough; where there are fewer, rows are split
WANTED = 128  # threadgroups, where rows are split


def attend(
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
    """``compress.attend`` for one new token (design.md 2.2, 2.3, 4).

    Args:
        queries: [B, H * G, 1, D]; keys and values, D and Dv, as ``_common.serves`` says.

    Returns:
        output [B, H * G, 1, Dv] in the dtype of the queries; the new scores of the kept rows [B, K]
        and of the recent store [B, H, rows] (0 past the live ones), float32.
    """
    batch, query_heads, _, dim = queries.shape
    heads, rows, value_dim = layout.heads, recent.keys.shape[2], recent.values.shape[-1]
    groups = query_heads // heads
    tiles, tile = tiles_of(groups)
    capacity = max(group.rows for group in layout.groups) + rows
    splits, split_rows = splits_of(batch * heads * tiles, tile, capacity)
    split = splits * tiles > 1
    counts = mx.array([left, live, heads, layout.starts[-1], rows, capacity, splits], mx.int32)
    settings = mx.array([scale, policy.alpha, policy.kappa, policy.decay], mx.float32)
    starts = mx.array(layout.starts, mx.int32)
    # Arrays without elements cannot be inputs; the kernels do not look at what stands in for them.
    some = layout.starts[-1] > 0
    keys, values, weight, score = kept[:4] if some else (*recent[:2], recent.score, recent.score)
    stores = {
        "kept_keys": keys,
        "kept_values": values,
        "kept_weight": weight,
        "kept_spread": kept.spread if layout.residual else settings,
        "recent_keys": recent.keys,
        "recent_values": recent.values,
    }
    common = {
        "kept_score": score,
        "recent_score": recent.score,
        "sinks": settings if sinks is None else sinks.astype(mx.float32),
        "starts": starts,
        "counts": counts,
        "settings": settings,
    }
    template = [("G", groups), ("DV", value_dim), ("SINKS", sinks is not None)]
    scores_of = [score.shape, recent.score.shape]
    many = (batch, heads, groups)
    first = {"queries": queries, **stores, **common}
    outputs = ("out", "kept_out", "recent_out")
    out, *scores = kernel("attend", tuple(first), outputs)(
        inputs=list(first.values()),
        output_shapes=[(*many, splits, value_dim), (*many, capacity), (*many, splits, 2)]
        if split
        else [(batch, query_heads, 1, value_dim), *scores_of],
        output_dtypes=[mx.float32 if split else queries.dtype, mx.float32, mx.float32],
        grid=(THREADS * splits, tiles, batch * heads),
        threadgroup=(THREADS, 1, 1),
        template=[
            *template,
            ("T", keys.dtype),
            ("O", mx.float32 if split else queries.dtype),
            ("D", dim),
            ("R", layout.residual),
            ("GT", tile),
            ("ROWS", split_rows),
            ("SPLIT", split),
        ],
    )
    if split:
        second = {"partial": out, "logits": scores[0], "partial_sums": scores[1], **common}
        out, *scores = kernel("attend_join", tuple(second), outputs)(
            inputs=list(second.values()),
            output_shapes=[(batch, query_heads, 1, value_dim), *scores_of],
            output_dtypes=[queries.dtype, mx.float32, mx.float32],
            grid=(THREADS * (groups + -(-capacity // CHUNK)), 1, batch * heads),
            threadgroup=(THREADS, 1, 1),
            template=[*template, ("O", queries.dtype), ("CHUNK", CHUNK)],
        )
    return out, scores[0] if some else kept.score, scores[1]


def tiles_of(groups: int) -> tuple[int, int]:
    """Tiles that the query heads of a KV head make, and the most heads in one."""
    tiles = -(-groups // TILE)
    return tiles, -(-groups // tiles)


def splits_of(threadgroups: int, tile: int, capacity: int) -> tuple[int, int]:
    """Splits of up to ``capacity`` rows, and the rows (a power of two) that one has room for.

    From shapes alone, so that a kernel is built once. A split has at least 256 rows, or 48 for each
    head of the tile (its partial outputs then stay below a tenth of its rows' bytes), and at most
    those whose logits fit into threadgroup memory.
    """
    fit = min(1024, LOGITS // (1 << (tile - 1).bit_length()))
    wanted = 1 if threadgroups >= MANY else WANTED // threadgroups
    splits = max(1, -(-capacity // fit), min(wanted, capacity // max(256, 48 * tile)))
    return splits, max(SIMD, 1 << (-(-capacity // splits) - 1).bit_length())
