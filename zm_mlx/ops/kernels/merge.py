"""Residual merging, ``merging.merge``, as a Metal kernel (method.md 4, 7).

One launch, ``merge``: a threadgroup per head finds each victim's residual row and adds it up, in
the order of the victims. Rows are not split over threadgroups: the sums of a split would have to be
written and read again, which costs a fifth of the traffic of a decode-time compaction.
"""

from typing import NamedTuple

import mlx.core as mx

from ...state.layout import Layout
from ...state.rows import Dense
from ...state.state import Merged, Residuals, State
from ._common import kernel

MAX_RESIDUAL = 64  # the sums of more rows do not fit into registers
THREADS = 512
INPUTS = (
    *("kept_keys", "kept_values", "kept_weight", "kept_score"),
    *("residual_spread", "key_sum", "value_sum", "square_sum"),
    *("recent_keys", "recent_values", "recent_score", "starts", "victims", "victim_count", "phase"),
)
OUTPUTS = (
    *("merged_keys", "merged_values", "merged_weight", "merged_score"),
    *("new_spread", "new_key_sum", "new_value_sum", "new_square_sum"),
)


class Victims(NamedTuple):
    """Which rows of each head are to be merged, and how.

    source [B, H, any] int32: where the victims lie (see common.h), in the order of positions, as
    many as total [B, H] int32 says; phase [B, H] int32: 0 keeps a head's sums (its merged rows mean
    nothing), 1 fills empty residual rows, 2 merges.
    """

    source: mx.array
    total: mx.array
    phase: mx.array


def merge(state: State, layout: Layout, victims: Victims) -> Merged:
    """The residual rows of all heads after a merge, as ``merging.merge`` returns them."""
    kept, recent = state.kept, state.recent
    batch, heads, dim, value_dim = *recent.shape[:2], recent.head_dim, recent.value_dim
    rows, dtype = (batch, heads, layout.residual), recent.dtype
    keys, values, weight, score, *sums = kernel("merge", INPUTS, OUTPUTS)(
        inputs=[
            *(*kept.rows, kept.weight, state.scores.kept),
            *state.residuals,
            *(*recent, state.scores.recent, mx.array(layout.starts, mx.int32), *victims),
        ],
        template=[("T", dtype), ("D", dim), ("DV", value_dim), ("R", layout.residual)],
        grid=(heads * THREADS, batch, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(*rows, dim), (*rows, value_dim), rows, rows, *(x.shape for x in state.residuals)],
        output_dtypes=[dtype, dtype, *[mx.float32] * 6],
    )
    return Merged(Dense(keys, values), weight, score, Residuals(*sums))
