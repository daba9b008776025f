"""Attention of the queries of a prompt as Metal kernels (method.md 7)."""

import mlx.core as mx

from ...policies.policy import Policy
from ...state.layout import Layout
from ...state.state import Call, Scores, State
from ._flash import flash
from .score import score


def attend_chunk(call: Call, state: State, layout: Layout, policy: Policy) -> tuple[mx.array, Scores]:
    """``attention.attend`` for L queries at once, of any L (method.md 2, 3).

    Returns:
        output [B, H * G, L, Dv] in the dtype of the queries; the new scores (0 past the filled rows
        of the recent store).
    """
    out, log_sum_exp = flash(call, state, layout, policy)
    return out, score(call, state, layout, policy, log_sum_exp)
