"""Compaction, ``compaction.compact``, as Metal kernels (method.md 4, 7).

Three launches, since a kernel cannot wait for all rows of a head and cannot write into arrays that
exist, while heads of one layer may be in different phases of their life:

1. ``compact_select``, a threadgroup per head, reads the importance only and writes, as one number a
   row, where each row of the new kept store comes from, and the list of victims;
2. ``merge`` (see merge.py), left out while no head merges, writes the new residual rows;
3. ``compact``, a simdgroup per row, copies what the numbers name into the new kept store.

Keys and values of survivors thus move once, and those of victims are read once.
"""

from typing import NamedTuple

import mlx.core as mx

from ...policies.policy import Policy
from ...state.layout import Layout
from ...state.mixed import numbers_of
from ...state.rows import Dense
from ...state.state import Kept, Merged, Scores, State
from ._common import SIMD, kernel
from .merge import MAX_RESIDUAL, Victims, merge

MAX_REACH = 2048  # rows on either side of a row over which importance can be pooled
ROWS = 8  # of a threadgroup of the last launch
SELECT = ("kept_importance", "recent_importance", "starts", "departed", "leaving", "reach", "max_victims")
COPY = (
    *("kept_keys", "kept_values", "kept_weight", "kept_score", "kept_position"),
    *("recent_keys", "recent_values", "recent_score"),
    *("merged_keys", "merged_values", "merged_weight", "merged_score", "source", "departed"),
)


class Plan(NamedTuple):
    """What becomes of the rows: where each new kept row comes from (see common.h), [B, K] int32, and who is merged."""

    source: mx.array
    victims: Victims


def serves(state: State, layout: Layout, policy: Policy) -> bool:
    """Whether the kernels are written for this compaction."""
    return layout.residual <= MAX_RESIDUAL and _reach(_pools(state, layout), policy) <= MAX_REACH


def compact(state: State, layout: Layout, policy: Policy, importance: Scores) -> State:
    """``compaction.compact`` of what ``serves``.

    Args:
        importance: by which rows are selected; the scores themselves stay with their rows.
    """
    leaving = state.leaving(layout)
    if leaving and layout.starts[-1]:
        plan = _selected(state, layout, policy, importance)
        merged = None
        if layout.residual and any(_pools(state, layout)):
            merged = _held(state, layout) if policy.fits else merge(state, layout, plan.victims)
        kept, scores = _copied(state, layout, plan.source, merged)
        if state.reads:
            state = state._replace(reading=state.reading._replace(kept=_moved(state.reading, plan.source)))
        state = state._replace(
            kept=kept,
            scores=state.scores._replace(kept=scores),
            residuals=merged.residuals if merged else state.residuals,
        )
    return state.without_leaving(layout, leaving)


def _held(state: State, layout: Layout) -> Merged:
    """The residual rows as they are; empty where a head's first rows were raw tokens until now."""
    parts = []
    for group in layout.groups:
        kept = state.kept.of(group).first(layout.residual)
        parts.append(kept._replace(weight=kept.weight * (state.departed > group.rows)))
    rows = Dense.joined([numbers_of(kept.rows) for kept in parts], axis=1)
    weight = mx.concatenate([kept.weight for kept in parts], axis=1)
    return Merged(rows, weight, mx.zeros(weight.shape), state.residuals)


def _selected(state: State, layout: Layout, policy: Policy, importance: Scores) -> Plan:
    batch, heads, pools = state.recent.shape[0], layout.heads, _pools(state, layout)
    # Without residual rows nobody is merged, but an array has elements.
    victims = max((n - g.context for n, g in zip(pools, layout.groups, strict=True) if n), default=1)
    victims = victims if layout.residual else 1
    threads = 1024 if max(pools) > 1024 else 256
    source, *found = kernel("compact_select", SELECT, ("source", "victims", "victim_count", "phase"))(
        inputs=[
            *importance,
            mx.array(layout.starts, mx.int32),
            *(state.departed, state.leaving(layout), _reach(pools, policy), victims),
        ],
        template=[("R", layout.residual), ("THREADS", threads)],
        grid=(heads * threads, batch, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[importance.kept.shape, (batch, heads, victims), (batch, heads), (batch, heads)],
        output_dtypes=[mx.int32] * 4,
    )
    return Plan(source, Victims(*found))


def _copied(state: State, layout: Layout, source: mx.array, merged: Merged | None) -> tuple[Kept, mx.array]:
    """The new kept rows and their scores."""
    kept, recent, scores = state.kept, state.recent, state.scores
    new_recent = [*recent, scores.recent]
    # Without merged rows nothing comes from there.
    new_merged = [*merged.rows, merged.weight, merged.score] if merged else [*new_recent, scores.recent]
    old = [*kept.rows, kept.weight, scores.kept, kept.position]
    batch, rows = kept.weight.shape
    keys, values, weight, score, position = kernel("compact", COPY, tuple(f"new_{x}" for x in COPY[:5]))(
        inputs=[*old, *new_recent, *new_merged, source, state.departed],
        template=[("T", recent.dtype), ("D", recent.head_dim), ("DV", recent.value_dim), ("R", layout.residual)],
        grid=(SIMD, rows, batch),
        threadgroup=(SIMD, min(ROWS, rows), 1),
        output_shapes=[x.shape for x in old],
        output_dtypes=[x.dtype for x in old],
    )
    return Kept(Dense(keys, values), weight, position), score


def _moved(reading: Scores, source: mx.array) -> mx.array:
    """What the new kept rows were worth in a second reading: nothing, if they are merged."""
    rows = reading.kept.shape[1]
    both = mx.concatenate([reading.kept, reading.recent.flatten(1, 2)], axis=1)
    row = mx.where(source < rows, source, source - rows)  # see common.h
    return mx.where(source < 0, 0, mx.take_along_axis(both, mx.maximum(row, 0), axis=1))


def _pools(state: State, layout: Layout) -> list[int]:
    """For each group, the rows among which each of its heads selects; 0 while all its tokens fit."""
    competing = [state.competing(group, layout) for group in layout.groups]
    return [0 if raw is None else state.leaving(layout) + raw.stop - raw.start for raw in competing]


def _reach(pools: list[int], policy: Policy) -> int:
    """Rows on either side of a row over which its importance is pooled."""
    return max(0, min(policy.reach, max(pools) - 1))
