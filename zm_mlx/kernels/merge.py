"""Residual merging: ``compress.merge`` as a Metal kernel (design 2.4, 4).

One launch, ``merge``: a threadgroup per head finds each victim's residual row and adds it up, in
the order of the victims. Rows are not split over threadgroups: the sums of a split would have to be
written and read again, which costs a fifth of the traffic of a decode-time compaction.
"""

from typing import Any

import mlx.core as mx

from ..stores import Kept
from ._common import kernel

MAX_RESIDUAL = 64  # the sums of more rows do not fit into registers
INPUTS = (
    *("keys", "values", "weight", "score", "spread", "key_sum", "value_sum", "square_sum"),
    *("recent_keys", "recent_values", "recent_score", "starts", "victims", "todo"),
)
OUTPUTS = ("keys", "values", "weight", "score", "spread", "key_sum", "value_sum", "square_sum")


def merge(
    kept: Kept, keys: mx.array, values: mx.array, importance: mx.array, victims: mx.array, residual: int, fresh: bool
) -> Kept:
    """``compress.merge``; the arguments and the result have the same shapes."""
    batch, heads, n, _ = keys.shape
    rows = kept.keys.shape[2]
    stored = heads * rows
    # Victims first, in order, as rows of the recent store (see common.h); what follows them is not read.
    at = mx.arange(n, dtype=mx.int32)
    order = mx.sort(mx.where(victims, at, at + n), axis=-1) % n
    source = 2 * stored + mx.arange(heads, dtype=mx.int32)[:, None] * n + order
    count = victims.astype(mx.int32).sum(axis=-1)
    todo = mx.stack([count, mx.full(count.shape, 1 if fresh else 2, mx.int32)], axis=-1)
    flat = kept.with_rows([x.reshape(batch, stored, *x.shape[3:]) for x in kept.rows])
    starts = mx.arange(0, stored + 1, rows, dtype=mx.int32)
    return merged(flat, keys, values, importance, starts, source, todo, residual)


def merged(
    kept: Kept,
    keys: mx.array,
    values: mx.array,
    importance: mx.array,
    starts: mx.array,
    victims: mx.array,
    todo: mx.array,
    residual: int,
) -> Kept:
    """The residual rows after a merge, as ``compress.merge`` returns them, of all heads.

    Args:
        kept: the kept store, rows [B, K, …].
        keys, values, importance: the recent store or a pool, [B, H, n, …].
        starts: first kept row of each head, [H + 1] int32.
        victims: where the victims lie (see common.h), in the order of positions, [B, H, any] int32.
        todo: [B, H, 2] int32: how many victims a head has, and its phase: 0 keeps its sums (the
            rows returned mean nothing), 1 fills empty residual rows, 2 merges.
    """
    batch, heads, _, dim = keys.shape
    value_dim = values.shape[3]
    rows = (batch, heads, residual)
    of_rows: list[tuple[tuple[int, ...], Any]] = [((*rows, dim), keys.dtype), ((*rows, value_dim), keys.dtype)]
    of_rows += [(rows, mx.float32)] * 3 + [((*rows, d), mx.float32) for d in (dim, value_dim)] + [(rows, mx.float32)]
    old = [kept.keys, kept.values, kept.weight, kept.score, *kept[5:]]
    launch = kernel("merge", INPUTS, tuple(f"new_{x}" for x in OUTPUTS))
    new = launch(
        inputs=[*old, keys, values, importance, starts, victims, todo],
        template=[("T", keys.dtype), ("D", dim), ("DV", value_dim), ("R", residual)],
        grid=(heads * 512, batch, 1),
        threadgroup=(512, 1, 1),
        output_shapes=[shape for shape, _ in of_rows],
        output_dtypes=[dtype for _, dtype in of_rows],
    )
    return Kept(*[*new[:4], mx.full(rows, -1, mx.int32), *new[4:]])
