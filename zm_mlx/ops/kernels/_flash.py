"""The launch of ``metal/attend_chunk.metal``, which both ``attend_chunk`` and ``score`` need."""

import mlx.core as mx

from ...policies.policy import Policy
from ...state.layout import Layout
from ...state.mixed import numbers_of
from ...state.state import Call, State
from ._common import MAX_THREADGROUP_BYTES, SIMD, kernel, present

QUERY_SIMDGROUPS = 4  # simdgroups of 8 queries in a threadgroup
THREADGROUPS = 128  # with fewer than this, rows are split
ROWS_OF_A_SPLIT = 256  # at least
INPUTS = (
    "queries", "kept_keys", "kept_values", "kept_weight", "residual_spread", "recent_keys", "recent_values",
    "sinks", "starts", "departed", "filled", "splits", "scale", "alpha", "kappa", "cap",
)  # fmt: skip


def rows_of_a_tile(width: int, itemsize: int) -> int:
    """Rows of ``width`` elements that are in threadgroup memory at a time: 8, 16 or 32, in half of it."""
    fit = MAX_THREADGROUP_BYTES // 2 // (width * itemsize)
    return 32 if fit >= 32 else 16 if fit >= 16 else 8


def splits_of(threadgroups: int, rows: int) -> int:
    """Parts into which the rows are split, so that even a single KV head fills a GPU."""
    return max(1, min(-(-THREADGROUPS // threadgroups), rows // ROWS_OF_A_SPLIT))


def flash(
    call: Call, state: State, layout: Layout, policy: Policy, with_output: bool = True
) -> tuple[mx.array, mx.array]:
    """Compensated attention (method.md 2) and its log-sum-exp.

    Returns:
        output [B, H * G, L, Dv] in the dtype of the queries (without ``with_output`` something to
        ignore), log-sum-exp [B, H * G, L] float32.
    """
    queries, kept, recent = call.queries, state.kept, numbers_of(state.recent)
    held = numbers_of(kept.rows)
    batch, query_heads, length, dim = queries.shape
    value_dim = recent.value_dim if with_output else 8
    tiles = -(-(query_heads // layout.heads * length) // (8 * QUERY_SIMDGROUPS))
    rows = max(g.rows for g in layout.groups) + state.recent_rows
    splits = splits_of(batch * layout.heads * tiles, rows)
    output_type = queries.dtype if splits == 1 else mx.float32
    shape = (splits, batch, query_heads, length)
    out, log_sum_exp = kernel("attend_chunk", INPUTS, ("output", "log_sum_exp"))(
        inputs=[
            queries,
            present(held.keys),
            present(held.values),
            present(kept.weight),
            present(state.residuals.spread),
            recent.keys,
            recent.values,
            mx.zeros((1,)) if call.sinks is None else call.sinks.astype(mx.float32),
            mx.array(layout.starts, mx.int32),
            *(state.departed, state.filled, splits),
            *(float(call.scale), float(policy.alpha), float(policy.kappa), float(call.cap or 0)),
        ],
        template=[
            ("T", queries.dtype),
            ("OT", output_type),
            ("D", dim),
            ("DV", value_dim),
            ("R", layout.residual),
            ("BK", rows_of_a_tile(dim + value_dim if with_output else dim, queries.dtype.size)),
            ("SG", QUERY_SIMDGROUPS),
            ("SINKS", call.sinks is not None),
            ("VALUES", with_output),
            ("CAPPED", call.cap is not None),
        ],
        grid=(tiles * splits * QUERY_SIMDGROUPS * SIMD, layout.heads, batch),
        threadgroup=(QUERY_SIMDGROUPS * SIMD, 1, 1),
        output_shapes=[(*shape, value_dim) if with_output else (1,), shape],
        output_dtypes=[output_type, mx.float32],
    )
    if splits == 1:
        return out[0], log_sum_exp[0]
    whole = mx.logsumexp(log_sum_exp, axis=0)
    if with_output:
        share = mx.exp(log_sum_exp - whole)[..., None]
        out = (share * out).sum(axis=0).astype(queries.dtype)
    return out, whole
