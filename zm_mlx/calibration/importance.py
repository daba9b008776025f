"""What each token of a text is worth to each KV head: what a table of rows per head is counted from."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..evaluation.prefilled import Prompted
from ..evaluation.recording import Layer
from ..host.cache import ZeroMergeCache
from ..host.hook import replace_caches
from ..host.model_caches import zero_merge
from ..host.own_caches import own_caches
from ..host.prefill import prefill
from ..host.probe import probe
from ..ops.plain.attention import block_length
from ..policies import Policy
from ..state.rows import after

DISTANCE = 64  # tokens; attention from nearer says little about a token's use later

# Of a model and the tokens of a text: [H, T] float32 for each of its full-attention layers.
Importance = Callable[[nn.Module, Sequence[int]], list[mx.array]]


def long_range(model: nn.Module, tokens: Sequence[int]) -> list[mx.array]:
    """The most attention that each token gets from queries ``DISTANCE`` or more tokens later; 0 without any."""
    return [far_attention(layer) for layer in Prompted(model, tokens).layers]


def reread(model: nn.Module, tokens: Sequence[int]) -> list[mx.array]:
    """The most attention that each token gets when its piece of the text is read a second time (method.md 5)."""
    policy, length = Policy(score="reread"), len(tokens)
    layouts = policy.layouts(policy.smallest, [s.heads for s in probe(model)])

    def make(i: int) -> ZeroMergeCache:  # one token more than comes: the text is held whole
        return ZeroMergeCache(layouts[i], policy=policy, prefill="exact", prompt_length=length + 1)

    caches = replace_caches(own_caches(model), make)
    prefill(model, tokens, caches)
    return [c.layer.reading.recent[0, :, :length] for c in zero_merge(caches) if c.layer is not None]


def far_attention(layer: Layer, distance: int = DISTANCE) -> mx.array:
    """Maxima [H, T] float32 over the queries ``distance`` or more tokens later, of the softmax over all they see."""
    keys = layer.rows.keys[0].astype(mx.float32)
    heads, count, dim = keys.shape
    queries = layer.call.queries.reshape(heads, -1, count, dim)
    sinks = None if layer.call.sinks is None else layer.call.sinks.astype(mx.float32).reshape(heads, -1, 1, 1)
    best = mx.zeros((heads, count))
    step = block_length(queries, count)
    for begin in range(0, count, step):
        # One block after the other, or the logits of all exist at once.
        block = after(queries[:, :, begin : begin + step], best).astype(mx.float32) * layer.call.scale
        end = begin + block.shape[2]
        back = mx.arange(begin, end)[:, None] - mx.arange(end)
        logits = mx.where(back >= 0, block @ keys[:, None, :end].swapaxes(-1, -2), -mx.inf)
        if sinks is not None:
            logits = mx.concatenate([logits, mx.broadcast_to(sinks, (*logits.shape[:-1], 1))], axis=-1)
        given = mx.where(back >= distance, mx.softmax(logits, axis=-1)[..., :end], 0).max(axis=(1, 2))
        best = mx.concatenate([mx.maximum(best[:, :end], given), best[:, end:]], axis=1)
    mx.eval(best)
    return best
