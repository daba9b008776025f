"""Compaction: ``compress.compact`` as Metal kernels (design 2.4, 4).

Three launches, since a kernel cannot wait for all rows of a head and cannot write into arrays that
exist, while heads of one layer may be in different phases of their life:

1. ``compact_select``, a threadgroup per head, reads the scores only and writes, as one number a
   row, where each row of the new kept store comes from, and the list of victims;
2. ``merge`` (see merge.py), left out while no head merges, writes the new residual rows;
3. ``compact``, a simdgroup per row, copies what the numbers name into the new kept store.

Keys and values of survivors thus move once, and those of victims are read once.
"""

import mlx.core as mx

from .. import compress
from ..layout import Group, Layout
from ..policy import Policy
from ..stores import Kept, Recent
from ._common import kernel
from .merge import MAX_RESIDUAL, merged

MAX_REACH = 2048  # rows on either side of a row over which scores can be pooled
SELECT = ("score", "recent_score", "starts", "counts")
GATHER = (
    *("keys", "values", "weight", "score", "position", "recent_keys", "recent_values", "recent_score"),
    *("merged_keys", "merged_values", "merged_weight", "merged_score", "source", "left"),
)


def compact(kept: Kept, recent: Recent, *, left: int, leaving: int, layout: Layout, policy: Policy) -> Kept:
    """``compress.compact``; what the kernels are not written for (see the constants) takes it, too."""
    if layout.starts[-1] == 0:
        return kept
    pools = [_pool(g, layout, left, leaving) for g in layout.groups]
    reach = min(policy.pool // 2, max(pools) - 1)
    if reach > MAX_REACH or layout.residual > MAX_RESIDUAL:
        return compress.compact(kept, recent, left=left, leaving=leaving, layout=layout, policy=policy)
    batch, heads, _, dim = recent.keys.shape
    value_dim, residual, rows = recent.values.shape[3], layout.residual, layout.starts[-1]
    starts = mx.array(layout.starts, mx.int32)
    merging = residual > 0 and any(pools)
    most = max(n - g.context for n, g in zip(pools, layout.groups, strict=True) if n) if merging else 1
    threads = 1024 if max(pools) > 1024 else 256
    source, victims, todo = kernel("compact_select", SELECT, ("source", "victims", "todo"))(
        inputs=[kept.score, recent.score, starts, mx.array([left, leaving, max(0, reach), most], mx.int32)],
        template=[("R", residual), ("THREADS", threads)],
        grid=(heads * threads, batch, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[kept.score.shape, (batch, heads, most), (batch, heads, 2)],
        output_dtypes=[mx.int32] * 3,
    )
    if merging:
        kept_sums = new = merged(kept, *recent, starts, victims, todo, residual)
        of_merged = [new.keys, new.values, new.weight, new.score]
    else:  # no row says that it comes from there
        kept_sums, of_merged = kept, [*recent, recent.score]
    outputs = kernel("compact", GATHER, tuple(f"new_{x}" for x in GATHER[:5]))(
        inputs=[*kept.rows, *recent, *of_merged, source, mx.array([left], mx.int32)],
        template=[("T", recent.keys.dtype), ("D", dim), ("DV", value_dim), ("R", residual)],
        grid=(32, rows, batch),
        threadgroup=(32, min(8, rows), 1),
        output_shapes=[x.shape for x in kept.rows],
        output_dtypes=[x.dtype for x in kept.rows],
    )
    return kept_sums.with_rows(outputs)


def _pool(group: Group, layout: Layout, left: int, leaving: int) -> int:
    """Rows among which each head of the group selects; 0 while all its tokens fit."""
    if left + leaving <= group.rows:
        return 0
    return leaving + (left if left <= group.rows else group.rows - layout.residual)
