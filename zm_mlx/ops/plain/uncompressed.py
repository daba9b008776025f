"""Attention while all rows are raw tokens of the recent store: mlx's own, which needs no compensation."""

import mlx.core as mx

from ...state.rows import Dense, after, products
from ...state.state import Call, State
from .attention import block_length, capped


def attend(call: Call, state: State) -> mx.array:
    """Causal attention over the filled recent rows, the last L the queries' own; none is a code.

    Returns:
        [B, H * G, L, Dv] in the dtype of the queries.
    """
    return attend_rows(call, state.newest.cut(0, state.filled))


def attend_rows(call: Call, rows: Dense) -> mx.array:
    """``attend`` over rows [B, H, n], the last L the queries' own."""
    queries, length, filled = call.queries, call.length, rows.shape[2]
    # On the CPU mlx materialises the logits, and with a cap so do we.
    whole = mx.default_device() == mx.gpu and call.cap is None
    step = length if whole else block_length(queries, filled)
    outputs: list[mx.array] = []
    for begin in range(0, length, step):
        # One block after the other, or the logits of all exist at once.
        block = after(queries[:, :, begin : begin + step], *outputs[-1:])
        seen = filled - length + begin + block.shape[2]
        keys, values = (x[:, :, :seen] for x in rows)
        if call.cap is not None:
            outputs.append(_with_cap(call._replace(queries=block), keys, values))
            continue
        mask = "causal" if block.shape[2] > 1 else None
        outputs.append(
            mx.fast.scaled_dot_product_attention(block, keys, values, scale=call.scale, mask=mask, sinks=call.sinks)
        )
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _with_cap(call: Call, keys: mx.array, values: mx.array) -> mx.array:
    """The same with a soft cap, which mlx's own does not have; no model has sinks, too."""
    queries, length, rows = call.queries, call.length, keys.shape[2]
    split = mx.unflatten(queries.astype(mx.float32) * call.scale, 1, (keys.shape[1], -1))
    logits = capped(products(split, keys[:, :, None]), call.cap)
    visible = mx.arange(rows) <= mx.arange(rows - length, rows)[:, None]
    p = mx.softmax(mx.where(visible, logits, -mx.inf), axis=-1)
    return (p @ values[:, :, None].astype(mx.float32)).flatten(1, 2).astype(queries.dtype)
