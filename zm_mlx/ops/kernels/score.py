"""Importance from the queries of a chunk or of the end of a prompt, as Metal kernels (method.md 7)."""

import mlx.core as mx

from ...policies.policy import Policy
from ...state.layout import Layout
from ...state.mixed import numbers_of
from ...state.state import Call, Scores, State
from ._common import SIMD, kernel, present
from ._flash import flash

ROW_SIMDGROUPS = 8  # simdgroups of 8 rows in a threadgroup
INPUTS = (
    "queries", "kept_keys", "kept_weight", "kept_score", "residual_spread", "recent_keys", "recent_score",
    "log_sum_exp", "starts", "departed", "filled", "scale", "alpha", "kappa", "decay", "fade", "cap",
)  # fmt: skip


def queries_of_a_tile(dim: int, itemsize: int) -> int:
    """Queries in threadgroup memory at a time."""
    return 32 if 32 * dim * itemsize <= 16 * 1024 else 16


def score(call: Call, state: State, layout: Layout, policy: Policy, log_sum_exp: mx.array | None = None) -> Scores:
    """``attention.score``: λ^L score + decayed column sums of the probabilities (method.md 3).

    Args:
        log_sum_exp: of the queries' logits and sinks, [B, H * G, L] float32, if it is known.
    """
    if log_sum_exp is None:
        log_sum_exp = flash(call, state, layout, policy, with_output=False)[1]
    queries, kept, scores = call.queries, state.kept, state.scores
    batch, _, length, dim = queries.shape
    tiles = max(-(-g.rows // 8) for g in layout.groups) + -(-state.recent_rows // 8)
    threads = ROW_SIMDGROUPS * SIMD
    on_kept, on_recent = kernel("score", INPUTS, ("new_kept_score", "new_recent_score"))(
        inputs=[
            queries,
            present(numbers_of(kept.rows).keys),
            present(kept.weight),
            present(scores.kept),
            present(state.residuals.spread),
            numbers_of(state.recent).keys,
            scores.recent,
            log_sum_exp,
            mx.array(layout.starts, mx.int32),
            *(state.departed, state.filled, float(call.scale)),
            *(float(policy.alpha), float(policy.kappa), float(policy.decay), float(policy.decay**length)),
            float(call.cap or 0),
        ],
        template=[
            ("T", queries.dtype),
            ("D", dim),
            ("R", layout.residual),
            ("BQ", queries_of_a_tile(dim, queries.dtype.size)),
            ("SG", ROW_SIMDGROUPS),
            ("CAPPED", call.cap is not None),
        ],
        grid=(-(-tiles // ROW_SIMDGROUPS) * threads, layout.heads, batch),
        threadgroup=(threads, 1, 1),
        output_shapes=[present(scores.kept).shape, scores.recent.shape],
        output_dtypes=[mx.float32, mx.float32],
    )
    return Scores(on_kept if scores.kept.size else scores.kept, on_recent)
