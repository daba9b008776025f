"""One decode step of attention as Metal kernels (metal/attend.metal, metal/attend_join.metal)."""

import mlx.core as mx

from ..decode import Step
from ..layout import Layout
from ..policy import Policy
from ..stores import Kept, Recent
from ._common import SIMD, TILE, kernel

THREADS = 8 * SIMD
CHUNK = 512  # rows whose scores one threadgroup of the second launch computes
LOGITS = 4096  # floats of threadgroup memory
MANY = 32  # threadgroups that keep a GPU busy enough; where there are fewer, rows are split
WANTED = 128  # threadgroups, where rows are split
COMMON = ("kept_score", "recent_score", "sinks", "starts", "counts", "settings")
INPUTS = ("queries", "kept_keys", "kept_values", "kept_weight", "kept_spread", "recent_keys", "recent_values", *COMMON)
JOIN_INPUTS = ("partial", "logits", "partial_sums", *COMMON)
OUTPUTS = ("out", "kept_out", "recent_out")


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
    step = bind(kept, left=left, layout=layout, policy=policy, scale=scale, sinks=sinks)
    return step(queries, kept.score, recent, live)


def bind(kept: Kept, *, left: int, layout: Layout, policy: Policy, scale: float, sinks: mx.array | None = None) -> Step:
    """``attend`` until the next compaction, as ``decode.bind``: what stays the same is bound once."""
    heads, stored = layout.heads, layout.starts[-1]
    some = stored > 0
    settings = mx.array([scale, policy.alpha, policy.kappa, policy.decay], mx.float32)
    starts = mx.array(layout.starts, mx.int32)
    of_sinks = settings if sinks is None else sinks.astype(mx.float32)
    spread = kept.spread if layout.residual else settings
    most = max(group.rows for group in layout.groups)

    def step(queries: mx.array, kept_score: mx.array, recent: Recent, live: int) -> tuple[mx.array, mx.array, mx.array]:
        batch, query_heads, _, dim = queries.shape
        rows, value_dim = recent.keys.shape[2], recent.values.shape[-1]
        groups, capacity = query_heads // heads, most + rows
        tiles, tile = tiles_of(groups)
        splits, split_rows = splits_of(batch * heads * tiles, tile, capacity)
        split = splits * tiles > 1
        counts = mx.array([left, live, heads, stored, rows, capacity, splits], mx.int32)
        # Arrays without elements cannot be inputs; the kernels do not look at what stands in for them.
        keys, values, weight = kept[:3] if some else (*recent[:2], recent.score)
        score = kept_score if some else recent.score
        common = [score, recent.score, of_sinks, starts, counts, settings]
        template = [("G", groups), ("DV", value_dim), ("SINKS", sinks is not None)]
        whole = [(batch, query_heads, 1, value_dim), score.shape, recent.score.shape]
        many = (batch, heads, groups)
        out, *scores = kernel("attend", INPUTS, OUTPUTS)(
            inputs=[queries, keys, values, weight, spread, *recent[:2], *common],
            output_shapes=[(*many, splits, value_dim), (*many, capacity), (*many, splits, 2)] if split else whole,
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
            out, *scores = kernel("attend_join", JOIN_INPUTS, OUTPUTS)(
                inputs=[out, *scores, *common],
                output_shapes=whole,
                output_dtypes=[queries.dtype, mx.float32, mx.float32],
                grid=(THREADS * (groups + -(-capacity // CHUNK)), 1, batch * heads),
                threadgroup=(THREADS, 1, 1),
                template=[*template, ("O", queries.dtype), ("CHUNK", CHUNK)],
            )
        return out, scores[0] if some else kept_score, scores[1]

    return step


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
