"""The second reading of a piece of a prompt (method.md 5): attention that is stored nowhere, and what it shows.

The queries see the oldest tokens, the piece as it was read first, and, causally, the second reading itself.
"""

import mlx.core as mx

from ...policies.policy import Policy
from ...state.layout import Group, Layout
from ...state.mixed import Rows
from ...state.rows import Dense, after, products
from ...state.state import Call, Scores, State
from .attention import Part, block_length, probabilities, weigh
from .uncompressed import attend_rows

OLDEST = 4  # tokens of the context that every reading sees; attention needs its sinks (arXiv 2309.17453)
BLOCK = 128  # queries at a time, where logits of rows that they do not see are computed too
TINY = 1e-30  # less than this a piece gets only where all its probabilities are 0


def read_again(call: Call, new: Dense, state: State, layout: Layout, policy: Policy) -> tuple[mx.array, State]:
    """Attention of a second reading, and the state whose newest L recent rows, the piece, are worth what it shows.

        reading[j] = max over queries i and query heads g of softmax_j(scale q_i[g]·k[j]), j over the piece alone

    The maximum is KVzip's (arXiv 2505.23416), whose queries repeat the whole context.

    Args:
        call: queries of the second reading, [B, H * G, L, D].
        new: its keys and values, [B, H, L].

    Returns:
        output [B, H * G, L, Dv] in the dtype of the queries, and the state.
    """
    groups = [_group(group, call, new, state, layout, policy) for group in layout.groups]
    found = mx.concatenate([worth for _, worth in groups], axis=1)
    before, first = state.reading.recent, state.filled - call.length
    recent = mx.concatenate([before[:, :, :first], found, before[:, :, state.filled :]], axis=2)
    # The next layer needs the output alone, and the probabilities of all layers would wait for the readings.
    out = mx.depends(mx.concatenate([out for out, _ in groups], axis=1), recent)
    return out, state._replace(reading=Scores(state.reading.kept, recent))


def most_attention(queries: mx.array, keys: mx.array, scale: float) -> mx.array:
    """``reading`` of ``read_again``, for queries [B, h, G, L, D] and keys [B, h, n, D] → [B, h, n] float32."""
    queries = queries.flatten(2, 3)
    most = mx.zeros(keys.shape[:3])
    step = block_length(queries, keys.shape[2])
    for begin in range(0, queries.shape[2], step):
        # One block after the other, or the logits of all exist at once.
        block = after(queries[:, :, begin : begin + step], most).astype(mx.float32) * scale
        most = mx.maximum(most, mx.softmax(products(block, keys), axis=-1).max(axis=2))
    return most


def _group(
    group: Group, call: Call, new: Dense, state: State, layout: Layout, policy: Policy
) -> tuple[mx.array, mx.array]:
    """A group's output [B, h * G, L, Dv], and what its tokens of the piece are worth, [B, h, L]."""
    heads, length = slice(group.first_head, group.stop_head), call.length
    of_group = Part.of(group, call, state, layout.heads)
    oldest = oldest_rows(group, state, layout, length)
    piece = newest_rows(group, state, length)
    rows = Dense.joined([oldest, piece, new.map(lambda x: x[:, heads])], axis=2)
    part = of_group._replace(kept=of_group.kept.first(0), recent=rows)
    if mx.default_device() != mx.gpu or call.cap is not None:  # the others have no cap
        return _together(part, oldest.shape[2], call.scale, policy)
    mine = Call(part.queries.flatten(1, 2), call.scale, None if part.sinks is None else part.sinks.flatten())
    return attend_rows(mine, rows), most_attention(part.queries, piece.keys, call.scale)


def _together(part: Part, first: int, scale: float, policy: Policy) -> tuple[mx.array, mx.array]:
    """Output and reading from the same probabilities: on a CPU exponentials take the time. ``first``: of the piece."""
    length = part.queries.shape[3]
    outputs: list[mx.array] = []
    most = mx.zeros((*part.recent.shape[:2], length))
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        visible = part.filled(0, first + length + end)
        p = probabilities(after(part.queries[:, :, :, begin:end], most), 0, visible, scale, policy)
        outputs.append(weigh(p, visible))
        piece = p[..., first : first + length]
        share = mx.maximum(piece.sum(axis=-1, keepdims=True), TINY)
        most = mx.maximum(most, (piece / share).max(axis=(2, 3)))
    return mx.concatenate(outputs, axis=3).flatten(1, 2).astype(part.queries.dtype), most


def oldest_rows(group: Group, state: State, layout: Layout, piece: int) -> Dense:
    """A group's rows of the oldest tokens that it holds raw, without those of the piece."""
    begin = 0 if state.departed <= group.rows else layout.residual
    end = min(begin + OLDEST, state.departed, group.rows)
    count = min(OLDEST - (end - begin), state.filled - piece)  # of those that have not left the recent store
    recent = _numbers(state.recent.map(lambda x: x[:, group.first_head : group.stop_head]).cut(0, count))
    if begin == end:
        return recent
    kept = _numbers(state.kept.of(group, state.departed).rows.cut(begin, end))
    return Dense.joined([kept, recent] if count else [kept], axis=2)


def newest_rows(group: Group, state: State, count: int) -> Dense:
    """A group's newest rows, no more than came since the last compaction."""
    heads, closed = slice(group.first_head, group.stop_head), state.closed
    return state.newest.map(lambda x: x[:, heads, state.filled - closed - count : state.filled - closed])


def _numbers(rows: Rows) -> Dense:
    """A few rows as numbers of their dtype."""
    return rows if isinstance(rows, Dense) else rows.dense().map(lambda x: x.astype(rows.dtype))
