"""The second reading of a piece of a prompt (method.md 5): attention that is stored nowhere, and what it shows."""

import mlx.core as mx

from ...state.layout import Group, Layout
from ...state.rows import Dense, after, products
from ...state.state import Call, Scores, State
from .attention import block_length
from .uncompressed import attend_rows

OLDEST = 4  # tokens of the context that every reading sees; attention needs its sinks (arXiv 2309.17453)


def attend(call: Call, new: Dense, state: State, layout: Layout) -> mx.array:
    """Attention over the oldest tokens, the piece as it was read first, and, causally, the second reading itself.

    Args:
        call: queries of the second reading, [B, H * G, L, D].
        new: its keys and values, [B, H, L].
        state: its newest L recent rows are the piece.

    Returns:
        [B, H * G, L, Dv] in the dtype of the queries.
    """
    outputs = [_group(group, call, new, state, layout) for group in layout.groups]
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)


def read(call: Call, state: State) -> State:
    """The state with the piece's tokens, its newest L recent rows, worth what the second reading shows."""
    first, filled = state.filled - call.length, state.filled
    found = most_attention(call, state.recent.keys[:, :, first:filled])
    before = state.reading.recent
    recent = mx.concatenate([before[:, :, :first], found, before[:, :, filled:]], axis=2)
    return state._replace(reading=Scores(state.reading.kept, recent))


def most_attention(call: Call, keys: mx.array) -> mx.array:
    """The most attention that each token of a piece gets, had the queries nothing else to attend to.

        reading[j] = max over queries i and query heads g of softmax_j(scale q_i[g]·k[j])

    The maximum is KVzip's (arXiv 2505.23416), whose queries repeat the whole context.

    Args:
        keys: [B, H, n, D].

    Returns:
        [B, H, n] float32.
    """
    batch, heads, n, dim = keys.shape
    queries = call.queries.reshape(batch, heads, -1, dim)
    most = mx.zeros((batch, heads, n))
    step = block_length(queries, n)
    for begin in range(0, queries.shape[2], step):
        # One block after the other, or the logits of all exist at once.
        block = after(queries[:, :, begin : begin + step], most).astype(mx.float32) * call.scale
        most = mx.maximum(most, mx.softmax(products(block, keys), axis=-1).max(axis=2))
    return most


def _group(group: Group, call: Call, new: Dense, state: State, layout: Layout) -> mx.array:
    heads, each = slice(group.first_head, group.stop_head), call.queries.shape[1] // layout.heads
    mine = slice(each * group.first_head, each * group.stop_head)
    piece = state.recent.map(lambda x: x[:, heads, state.filled - call.length : state.filled])
    rows = Dense.joined([_oldest(group, state, layout, call.length), piece, new.map(lambda x: x[:, heads])], axis=2)
    # Causal attention hides from a query the rows after it, counted from the end: of the reading itself, none else.
    return attend_rows(Call(call.queries[:, mine], call.scale, None if call.sinks is None else call.sinks[mine]), rows)


def _oldest(group: Group, state: State, layout: Layout, piece: int) -> Dense:
    """A group's rows of the oldest tokens that it holds raw, without those of the piece."""
    if not state.departed:
        count = min(OLDEST, state.filled - piece)
        return state.recent.map(lambda x: x[:, group.first_head : group.stop_head, :count])
    begin = 0 if state.departed <= group.rows else layout.residual
    end = min(begin + OLDEST, state.departed, group.rows)
    return state.kept.of(group).rows.map(lambda x: x[:, :, begin:end])
