"""ZeroMerge's attention in plain MLX operations (arXiv 2503.10714; method.md 2, 3).

This is what the kernels are compared with. Everything is batched over sequences and heads, computed
in float32 and rounded once at the end. B sequences, H KV heads in the layout's order of storage, G
query heads per KV head, next to each other. The last L filled rows of the recent store are the
queries' own.
"""

import math
from typing import NamedTuple

import mlx.core as mx

from ...policies.policy import Policy
from ...state.coded import Coded
from ...state.layout import Group, Layout
from ...state.mixed import Rows
from ...state.rows import Dense, after
from ...state.state import Call, KeptGroup, Scores, State

LOGIT_BYTES = 64 * 2**20  # queries go through in blocks whose logits stay below this


def attend(call: Call, state: State, layout: Layout, policy: Policy) -> tuple[mx.array, Scores]:
    """Compensated attention, and the importance that it gives to each row.

        logit[g, j] = scale q[g]·k[j] + α log weight[j] + min(κ, ½ scale² spread[j] ‖q[g]‖²)
        mass[j] = Σ_i λ^(L-1-i) Σ_g p_i[g, j]

    The first two terms are the paper's compensated attention; the third, second-order one accounts
    for the variance of the keys behind a merged row (``Policy.kappa = 0`` leaves it out).

    Returns:
        output [B, H * G, L, Dv] in the dtype of the queries; the new scores λ^L score + mass
        (0 past the filled rows of the recent store).
    """
    outputs, mass = _attend(call, state, layout, policy, True)
    return mx.concatenate(outputs, axis=1).astype(call.queries.dtype), _faded(state, mass, policy.decay**call.length)


def score(call: Call, state: State, layout: Layout, policy: Policy) -> Scores:
    """The new scores of ``attend`` without its output, from the last queries of a prompt."""
    return _faded(state, _attend(call, state, layout, policy, False)[1], policy.decay**call.length)


def compensated(
    dots: mx.array, log_mass: mx.array, spread: mx.array, queries: mx.array, policy: Policy
) -> list[mx.array]:
    """Logits of kept rows, cut behind those that are lifted; the compensated logit of ``attend``.

    Args:
        dots: of scaled queries with all rows, [..., n].
        log_mass: α log weight, [..., n].
        spread: of the residual rows, [..., R], which are the first ones.
        queries: scaled, [..., D].
    """
    return lifted(dots + log_mass, spread, queries, policy)


def lifted(logits: mx.array, spread: mx.array, queries: mx.array, policy: Policy) -> list[mx.array]:
    """Logits with the second-order term of ``attend`` on the first rows, cut behind these; as ``compensated``."""
    count = min(spread.shape[-1], logits.shape[-1])
    lift = policy.lift(spread[..., :count], queries) if count else None
    return [logits] if lift is None else [logits[..., :count] + lift, logits[..., count:]]


def capped(dots: mx.array, cap: float | None) -> mx.array:
    """Scores below the model's soft cap, where it has one (see ``Call``)."""
    return dots if cap is None else cap * mx.tanh(dots / cap)


def softmax(logits: list[mx.array], sinks: mx.array | None) -> mx.array:
    """Probabilities of all rows; sinks [h, G] take part of them and are no rows."""
    rows = sum(x.shape[-1] for x in logits)
    if sinks is not None:
        lead = logits[-1].shape[:-1]
        sink = sinks.astype(mx.float32).reshape(1, *sinks.shape, *[1] * (len(lead) - sinks.ndim))
        logits = [*logits, mx.broadcast_to(sink, (*lead, 1))]
    joined = logits[0] if len(logits) == 1 else mx.concatenate(logits, axis=-1)
    return mx.softmax(joined, axis=-1)[..., :rows]


def block_length(queries: mx.array, rows: int) -> int:
    """Queries (axis -2) whose float32 logits over ``rows`` rows stay below LOGIT_BYTES; at least 1."""
    *many, length, _ = queries.shape
    return min(length, max(1, LOGIT_BYTES // (4 * math.prod(many) * max(1, rows))))


class Part(NamedTuple):
    """One group's share of a call: queries [B, h, G, L, D], kept rows, spread [B, h, R], recent ones, sinks [h, G]."""

    queries: mx.array
    kept: KeptGroup
    spread: mx.array
    recent: Rows
    sinks: mx.array | None
    cap: float | None

    @classmethod
    def of(cls, group: Group, call: Call, state: State, heads: int) -> "Part":
        """All rows that the stores have room for."""
        batch, query_heads, length, dim = call.queries.shape
        mine = slice(group.first_head, group.stop_head)
        return cls(
            call.queries.reshape(batch, heads, query_heads // heads, length, dim)[:, mine],
            state.kept.of(group, state.departed),
            state.residuals.of(group).spread,
            state.recent.map(lambda x: x[:, mine]),
            None if call.sinks is None else call.sinks.reshape(heads, -1)[mine],
            call.cap,
        )

    def filled(self, departed: int, filled: int) -> "Part":
        """The filled rows alone."""
        kept = self.kept if departed >= self.kept.weight.shape[2] else self.kept.first(departed)
        return self._replace(kept=kept, recent=self.recent.cut(0, filled))


def _attend(
    call: Call, state: State, layout: Layout, policy: Policy, with_output: bool
) -> tuple[list[mx.array], Scores]:
    """Outputs of the groups, and the decayed mass of the kept rows [B, K] and of the filled recent rows."""
    outputs: list[mx.array] = []
    kept_mass: list[mx.array] = []
    recent_mass: list[mx.array] = []
    for group in layout.groups:
        part = Part.of(group, call, state, layout.heads).filled(state.departed, state.filled)
        out: list[mx.array] = []
        mass, old = mx.array(0.0), part.kept.weight.shape[2]
        step = block_length(part.queries, old + state.filled)
        for begin in range(0, call.length, step):
            end = min(begin + step, call.length)
            # One block after the other, or the logits of all exist at once.
            block = after(part.queries[:, :, :, begin:end], *outputs[-1:], *out[-1:], mass)
            p = probabilities(block, call.length - end, part, call.scale, policy)
            if with_output:
                out.append(weigh(p, part))
            age = mx.arange(call.length - 1 - begin, call.length - 1 - end, -1, dtype=mx.float32)
            mass = mass + _column_sums(p, mx.power(policy.decay, age))
        if with_output:
            outputs.append((out[0] if len(out) == 1 else mx.concatenate(out, axis=3)).flatten(1, 2))
        kept_mass.append(mx.pad(mass[..., :old], [(0, 0), (0, 0), (0, group.rows - old)]).flatten(1, 2))
        recent_mass.append(mass[..., old:])
    return outputs, Scores(mx.concatenate(kept_mass, axis=1), mx.concatenate(recent_mass, axis=1))


def probabilities(queries: mx.array, later: int, part: Part, scale: float, policy: Policy) -> mx.array:
    """Of queries [B, h, G, l, D] that ``later`` more tokens follow: [B, h, G, l, kept + filled]."""
    batch, heads, groups, length, _ = queries.shape
    filled, old = part.recent.shape[2], part.kept.weight.shape[2]
    q = queries.astype(mx.float32) * scale

    def dots(rows: Dense | Coded) -> mx.array:
        found = rows.dots(q.flatten(2, 3)).reshape(batch, heads, groups, length, rows.shape[2])
        return capped(found, part.cap)

    *logits, now = map(dots, part.recent.parts)  # what is closed came before all queries
    edge = sum(x.shape[-1] for x in logits)
    if length + later > 1:
        # All queries see what came before the first of them: no mask there, where parts are joined anyway.
        first = filled - later - length if old or edge else 0
        newest = mx.arange(filled - later - length, filled - later)[:, None]
        at = max(0, first - edge)
        logits += [now[..., :at], mx.where(mx.arange(edge + at, filled) <= newest, now[..., at:], -mx.inf)]
    else:
        logits.append(now)
    if old:
        log_mass, spread = policy.log_mass(part.kept.weight)[:, :, None, None], part.spread[:, :, None, None]
        begin, kept = 0, list[mx.array]()
        for rows in part.kept.rows.parts:
            end = begin + rows.shape[2]
            kept += compensated(dots(rows), log_mass[..., begin:end], spread, q, policy)
            spread, begin = spread[..., :0], end  # the first rows alone are residual ones
        logits[:0] = kept
    return softmax([x for x in logits if x.shape[-1]], part.sinks)


def weigh(p: mx.array, part: Part) -> mx.array:
    """Probabilities [B, h, G, l, kept + filled] times all values → [B, h, G, l, Dv]."""
    flat, old = p.flatten(2, 3), part.kept.weight.shape[2]
    out = part.recent.weigh(flat[..., old:])
    if old:
        out = part.kept.rows.weigh(flat[..., :old], out)
    return out.reshape(*p.shape[:4], part.recent.value_dim)


def _column_sums(p: mx.array, fade: mx.array) -> mx.array:
    """Σ_i fade[i] Σ_g p[..., g, i, j]."""
    factors = mx.broadcast_to(fade, p.shape[2:4]).reshape(1, -1)
    return (factors @ p.flatten(2, 3))[:, :, 0]


def _faded(state: State, mass: Scores, fade: float) -> Scores:
    """fade · score + mass for both stores."""
    now = fade * state.scores.recent[:, :, : state.filled] + mass.recent
    behind = state.recent_rows - state.filled
    return Scores(fade * state.scores.kept + mass.kept, mx.pad(now, [(0, 0), (0, 0), (0, behind)]))
