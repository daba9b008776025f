"""One decode step of attention as Metal kernels (metal/attend.metal, metal/attend_join.metal)."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from ...policies.policy import Policy
from ...state.layout import Layout
from ...state.mixed import Held, Mixed, numbers_of
from ...state.state import Bound, Call, Scores, State
from ._common import SIMD, TILE, addressable, kernel, present

THREADS = 8 * SIMD
CHUNK = 512  # rows whose scores one threadgroup of the second launch computes
LOGITS = 4096  # floats of threadgroup memory
BUSY = 32  # threadgroups that keep a GPU busy enough; where there are fewer, rows are split
WANTED = 128  # threadgroups, where rows are split
INPUTS = (
    *("queries", "kept_keys", "kept_values", "kept_weight", "residual_spread", "recent_keys", "recent_values"),
    *("kept_score", "recent_score", "sinks", "starts", "departed", "filled", "capacity"),
    *("scale", "alpha", "kappa", "decay", "cap"),
)
CODED_INPUTS = (
    *("queries", "kept_keys", "kept_key_scales", "kept_key_biases"),
    *("kept_values", "kept_value_scales", "kept_value_biases"),
    *("closed_keys", "closed_key_scales", "closed_key_biases"),
    *("closed_values", "closed_value_scales", "closed_value_biases"),
    *("residual_keys", "residual_values", "kept_weight", "residual_spread", "recent_keys", "recent_values"),
    *("kept_score", "recent_score", "sinks", "starts", "counts", "settings"),
)
JOIN_INPUTS = (
    *("partial_output", "logits", "partial_sums"),
    *("kept_score", "recent_score", "sinks", "starts", "departed", "filled", "decay"),
)
OUTPUTS = ("output", "new_kept_score", "new_recent_score")

Arguments = Callable[[mx.array, State, Sequence[mx.array]], list[mx.array]]


def attend(call: Call, state: State, layout: Layout, policy: Policy) -> tuple[mx.array, Scores]:
    """``attention.attend`` for one new token (method.md 2, 3).

    Args:
        call: queries [B, H * G, 1, D]; keys and values, D and Dv, as ``_common.serves`` says.

    Returns:
        output [B, H * G, 1, Dv] in the dtype of the queries; the new scores (0 past the filled rows
        of the recent store).
    """
    return bind(call, state, layout, policy).step(call.queries, state)


def bind(call: Call, state: State, layout: Layout, policy: Policy) -> Bound:
    """``attend`` until the next compaction, as ``decode.bind``: what stays the same is bound once."""
    batch, query_heads, _, dim = call.queries.shape
    heads, dtype, value_dim = layout.heads, call.queries.dtype, state.recent.value_dim
    groups, capacity = query_heads // heads, max(g.rows for g in layout.groups) + state.recent_rows
    tiles, tile = tiles_of(groups)
    width = 16 if layout.coding is None else layout.coding.bits
    splits, split_rows = splits_of(batch * heads * tiles, tile, capacity, width)
    split, has_kept = splits * tiles > 1, layout.starts[-1] > 0
    # Arrays without elements cannot be inputs; the kernels do not look at what stands in for them.
    sinks = mx.zeros((1,)) if call.sinks is None else call.sinks.astype(mx.float32)
    bound = [sinks, mx.array(layout.starts, mx.int32), mx.array(state.departed, mx.int32)]
    decay, coding = mx.array(policy.decay, mx.float32), layout.coding
    arguments = (_numbers if coding is None else _codes)(call, state, layout, policy, capacity)
    scores = [(state.scores.kept if has_kept else state.scores.recent).shape, state.scores.recent.shape]
    whole = [(batch, query_heads, 1, value_dim), *scores]
    many = (batch, heads, groups)
    partial = [(*many, splits, value_dim), (*many, capacity), (*many, splits, 2)]
    template = [("G", groups), ("DV", value_dim), ("SINKS", call.sinks is not None)]
    own = [("T", dtype), ("D", dim), ("R", layout.residual), ("GT", tile), ("ROWS", split_rows), ("SPLIT", split)]
    own.append(("CAPPED", call.cap is not None))
    if coding is not None:
        own += [("BITS", coding.bits), ("GS", coding.group)]
    first = kernel("attend", INPUTS if coding is None else CODED_INPUTS, OUTPUTS, coding is not None)
    second = kernel("attend_join", JOIN_INPUTS, OUTPUTS)

    def step(queries: mx.array, state: State) -> tuple[mx.array, Scores]:
        kept_score, recent_score = state.scores
        filled = mx.array(state.filled, mx.int32)
        common = [kept_score if has_kept else recent_score, recent_score, *bound, filled]
        out, on_kept, on_recent = first(
            inputs=arguments(queries, state, common),
            output_shapes=partial if split else whole,
            output_dtypes=[mx.float32 if split else dtype, mx.float32, mx.float32],
            grid=(THREADS * splits, tiles, batch * heads),
            threadgroup=(THREADS, 1, 1),
            template=[*template, ("O", mx.float32 if split else dtype), *own],
        )
        if split:
            out, on_kept, on_recent = second(
                inputs=[out, on_kept, on_recent, *common, decay],
                output_shapes=whole,
                output_dtypes=[dtype, mx.float32, mx.float32],
                grid=(THREADS * (groups + -(-capacity // CHUNK)), 1, batch * heads),
                threadgroup=(THREADS, 1, 1),
                template=[*template, ("O", dtype), ("CHUNK", CHUNK)],
            )
        return out, Scores(on_kept if has_kept else kept_score, on_recent)

    return Bound(step)


def _numbers(call: Call, state: State, layout: Layout, policy: Policy, capacity: int) -> Arguments:
    """The inputs of the first launch where all rows are numbers, of queries, a state and what both launches take."""
    held, recent = numbers_of(state.kept.rows), numbers_of(state.recent)
    has_kept = layout.starts[-1] > 0
    kept = [*held, state.kept.weight] if has_kept else [*recent, state.scores.recent]
    kept.append(state.residuals.spread if layout.residual else state.scores.recent)
    settings = [mx.array(x, mx.float32) for x in (call.scale, policy.alpha, policy.kappa, policy.decay, call.cap or 0)]
    size = mx.array(capacity, mx.int32)

    def arguments(queries: mx.array, state: State, common: Sequence[mx.array]) -> list[mx.array]:
        return [queries, *kept, *numbers_of(state.recent), *common, size, *settings]

    return arguments


def _codes(call: Call, state: State, layout: Layout, policy: Policy, capacity: int) -> Arguments:
    """The same where rows are codes."""
    held, recent = state.kept.rows, state.recent
    if not (isinstance(held, Held) and isinstance(recent, Mixed)):
        raise TypeError("rows are numbers, and this layout's are codes")
    arrays = [*held.coded.arrays(), *recent.coded.arrays(), *held.residual.arrays()]
    rows = [addressable(present(x)) if i % 3 or i > 11 else present(x) for i, x in enumerate(arrays)]
    masses = [present(state.kept.weight), present(state.residuals.spread)]
    settings = mx.array([call.scale, policy.alpha, policy.kappa, policy.decay, call.cap or 0], mx.float32)
    departed, closed = state.departed, state.closed

    def arguments(queries: mx.array, state: State, common: Sequence[mx.array]) -> list[mx.array]:
        kept_score, recent_score, sinks, starts, *_ = common
        counts = mx.array([departed, state.filled, capacity, closed], mx.int32)
        scores = [present(kept_score), recent_score, sinks, starts]
        return [queries, *rows, *masses, *state.newest, *scores, counts, settings]

    return arguments


def tiles_of(groups: int) -> tuple[int, int]:
    """Tiles that the query heads of a KV head make, and the most heads in one."""
    tiles = -(-groups // TILE)
    return tiles, -(-groups // tiles)


def splits_of(threadgroups: int, tile: int, capacity: int, width: int = 16) -> tuple[int, int]:
    """Splits of up to ``capacity`` rows, and the rows (a power of two) that one has room for.

    From shapes alone, so that a kernel is built once. A split has at least 256 rows, or 48 for each
    head of the tile where numbers have a ``width`` of 16 bits (its partial outputs then stay below a
    tenth of its rows' bytes), and at most those whose logits fit into threadgroup memory.
    """
    fit = min(1024, LOGITS // (1 << (tile - 1).bit_length()))
    wanted = 1 if threadgroups >= BUSY else WANTED // threadgroups
    splits = max(1, -(-capacity // fit), min(wanted, capacity // max(256, 48 * tile * 16 // width)))
    return splits, max(SIMD, 1 << (-(-capacity // splits) - 1).bit_length())
