"""``attention.attend`` for rows of 16 bits on a CPU: a token's bits do not depend on its neighbours in a call.

A BLAS adds in an order that depends on the shapes of a product, and a difference in the last bit of
float32 is one in the last bit of 16 once in some thousand roundings: enough to change a token. So
each query has products of its own, of shapes that stay the same from call to call.
"""

import mlx.core as mx

from ...policies.policy import Policy
from ...state.layout import Group, Layout
from ...state.rows import after
from ...state.state import Call, Scores, State, joined, rectangle
from .attention import Part, block_length, capped, compensated, softmax


def attend(call: Call, state: State, layout: Layout, policy: Policy) -> tuple[mx.array, Scores]:
    """As ``attention.attend``, up to the order of sums."""
    outputs, kept_scores, recent_scores = zip(
        *(_group(group, call, state, layout, policy) for group in layout.groups), strict=True
    )
    out = mx.concatenate(list(outputs), axis=1).astype(call.queries.dtype)
    return out, Scores(joined(kept_scores), mx.concatenate(list(recent_scores), axis=1))


def _group(
    group: Group, call: Call, state: State, layout: Layout, policy: Policy
) -> tuple[mx.array, mx.array, mx.array]:
    """A group's output [B, h * G, L, Dv] in float32, and the new scores of its rows."""
    part = Part.of(group, call, state, layout.heads)
    queries = part.queries.swapaxes(2, 3)  # [B, h, L, G, D]
    kept, recent = (rows.map(lambda x: x[:, :, None]) for rows in (part.kept.rows, part.recent))
    log_mass = policy.log_mass(part.kept.weight)[:, :, None, None]
    spread = part.spread[:, :, None, None]
    if state.departed <= group.rows:
        spread = spread[..., :0]
    kept_scores = rectangle(state.scores.kept, group)
    recent_scores = state.scores.recent[:, group.first_head : group.stop_head]
    positions = mx.arange(state.recent_rows)
    outputs: list[mx.array] = []
    step = block_length(part.queries, group.rows + state.recent_rows)
    for begin in range(0, call.length, step):
        end = min(begin + step, call.length)
        q = after(queries[:, :, begin:end], *outputs[-1:]).astype(mx.float32) * call.scale
        newest = mx.arange(state.filled - call.length + begin, state.filled - call.length + end)[:, None, None]
        logits = [mx.where(positions <= newest, capped(recent.dots(q), call.cap), -mx.inf)]
        if group.rows:
            logits[:0] = compensated(capped(kept.dots(q), call.cap), log_mass, spread, q, policy)
        # The sinks of a head stand before the queries.
        sinks = None if part.sinks is None else part.sinks[:, None]
        p = softmax(logits, sinks)
        p_kept, p_recent = p[..., : group.rows], p[..., group.rows :]
        out = recent.weigh(p_recent)
        outputs.append(kept.weigh(p_kept, out) if group.rows else out)
        for i in range(end - begin):
            kept_scores = policy.decay * kept_scores + p_kept[:, :, i].sum(axis=2)
            recent_scores = policy.decay * recent_scores + p_recent[:, :, i].sum(axis=2)
    whole = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
    return whole.swapaxes(2, 3).flatten(1, 2), kept_scores, recent_scores
