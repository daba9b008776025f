"""Attention over rows that are all raw tokens: mlx's own, which needs no compensation."""

import mlx.core as mx

from .compress import block_length


def attend_raw(queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
    """Causal attention of queries [B, Hq, L, D] over keys [B, H, n, D] and values [B, H, n, Dv], the last L their own.

    Returns:
        [B, Hq, L, Dv] in the dtype of the queries.
    """
    length, live = queries.shape[2], keys.shape[2]
    # On the CPU mlx materialises the logits.
    step = length if mx.default_device() == mx.gpu else block_length(queries, live)
    outputs: list[mx.array] = []
    for begin in range(0, length, step):
        block = queries[:, :, begin : begin + step]
        if outputs:  # one block after the other, or the logits of all exist at once
            block = mx.depends(block, outputs[-1:])
        rows = live - length + begin + block.shape[2]
        mask = "causal" if block.shape[2] > 1 else None
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                block, keys[:, :, :rows], values[:, :, :rows], scale=scale, mask=mask, sinks=sinks
            )
        )
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
