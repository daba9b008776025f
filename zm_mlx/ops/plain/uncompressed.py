"""Attention while all rows are raw tokens of the recent store: mlx's own, which needs no compensation."""

import mlx.core as mx

from ...state.rows import Dense, after
from ...state.state import Call, State
from .attention import block_length


def attend(call: Call, state: State) -> mx.array:
    """Causal attention over the filled recent rows, the last L the queries' own.

    Returns:
        [B, H * G, L, Dv] in the dtype of the queries.
    """
    return attend_rows(call, state.recent.map(lambda x: x[:, :, : state.filled]))


def attend_rows(call: Call, rows: Dense) -> mx.array:
    """``attend`` over rows [B, H, n], the last L the queries' own."""
    queries, length, filled = call.queries, call.length, rows.shape[2]
    # On the CPU mlx materialises the logits.
    step = length if mx.default_device() == mx.gpu else block_length(queries, filled)
    outputs: list[mx.array] = []
    for begin in range(0, length, step):
        # One block after the other, or the logits of all exist at once.
        block = after(queries[:, :, begin : begin + step], *outputs[-1:])
        seen = filled - length + begin + block.shape[2]
        keys, values = (x[:, :, :seen] for x in rows)
        mask = "causal" if block.shape[2] > 1 else None
        outputs.append(
            mx.fast.scaled_dot_product_attention(block, keys, values, scale=call.scale, mask=mask, sinks=call.sinks)
        )
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
