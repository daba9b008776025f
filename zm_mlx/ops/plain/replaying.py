"""What a prompt's tokens are worth to the prompt's own queries, moved behind it (method.md 3).

A query at its own place sees only what came before it, and mostly its neighbours. Moved behind the piece of
the prompt that it comes from, it sees all of it from afar: also the token that came after its own, which is
what a head that copies looks for. So this shows, at the price of one more attention over a piece, much of what a
second reading by the model would (rereading.py).
"""

import mlx.core as mx

from ...state.layout import Group, Layout
from ...state.rows import after, products
from ...state.state import Call, Scores, State
from .attention import block_length, capped
from .rereading import newest_rows, oldest_rows


def replay(call: Call, state: State, layout: Layout, turn: mx.array) -> State:
    """The state with a piece's tokens, its newest L recent rows, worth what the piece's own queries show.

        reading[j] = max over queries i and query heads g of softmax_j(scale (q_i[g] turn)·k[j])

    where j goes over the oldest tokens that are held and the whole piece.

    Args:
        call: queries of the piece, [B, H * G, L, D].
        turn: what moves a rotated query behind the piece, [D, D] float32.
    """
    moved = call._replace(queries=call.queries.astype(mx.float32) @ turn)
    found = [_group(group, moved, state, layout) for group in layout.groups]
    new = found[0] if len(found) == 1 else mx.concatenate(found, axis=1)
    before, first = state.reading.recent, state.filled - call.length
    recent = mx.concatenate([before[:, :, :first], new, before[:, :, state.filled :]], axis=2)
    return state._replace(reading=Scores(state.reading.kept, recent))


def _group(group: Group, call: Call, state: State, layout: Layout) -> mx.array:
    """What a group's tokens of the piece are worth, [B, h, L]."""
    batch, query_heads, length, dim = call.queries.shape
    each = query_heads // layout.heads
    queries = call.queries[:, each * group.first_head : each * group.stop_head]
    queries = queries.reshape(batch, group.heads, each * length, dim)
    piece = newest_rows(group, state, length)
    keys = mx.concatenate([oldest_rows(group, state, layout, length).keys, piece.keys], axis=2)
    most = mx.full((batch, group.heads, length), -mx.inf)  # of logarithms: fewer exponentials, which cost most
    step = block_length(queries, keys.shape[2])
    for begin in range(0, each * length, step):
        # One block after the other, or the logits of all exist at once.
        block = after(queries[:, :, begin : begin + step], most) * call.scale
        logits = capped(products(block, keys), call.cap)
        shown = logits[..., -length:] - mx.logsumexp(logits, axis=-1, keepdims=True)
        most = mx.maximum(most, shown.max(axis=2))
    return mx.exp(most)
