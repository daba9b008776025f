"""The form in which a cache is saved: arrays, and everything else as one JSON string.

The one place that knows the fields of a state outside of ``state``.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from . import policies
from .phases import ExactPrompt, Phase, Piece, Streaming
from .policies import Policy
from .state.coded import Coded, Codes
from .state.coding import Coding
from .state.layout import Layout
from .state.mixed import Held, Mixed
from .state.rows import Dense
from .state.state import Kept, Residuals, Scores, State

FORMAT = 4

Packed = list[mx.array | str | None]


class Contents(NamedTuple):
    """What a cache is made of; no state before its first token, and no turn where none is known."""

    layout: Layout
    policy: Policy
    phase: Phase
    state: State | None
    turn: mx.array | None = None


def pack(contents: Contents) -> Packed:
    """A tree as mlx-lm saves it."""
    layout, policy, phase, state, turn = contents
    prompt = phase if isinstance(phase, ExactPrompt) else None
    facts = {
        "format": FORMAT,
        "layout": [layout.residual, list(layout.context), layout.proximity, layout.staging, layout.reading],
        "coding": None if layout.coding is None else [layout.coding.bits, layout.coding.group],
        "policy": {"name": policies.name_of(policy), **policy.as_dict()},
        "prompt": None if prompt is None else [prompt.length, prompt.before, prompt.scale, prompt.name, prompt.cap],
        "clock": None if state is None else [state.departed, state.filled, state.since_compaction],
    }
    last = [None, None] if prompt is None else [prompt.queries, prompt.sinks]
    return [*([] if state is None else state.arrays()), *last, turn, json.dumps(facts)]


def unpack(packed: Sequence[Any]) -> Contents:
    """The inverse of ``pack``; the arrays are copies, which in-place writes may change.

    Raises:
        ValueError: another version of zm_mlx packed this, or a policy that is not here.
    """
    *found, text = packed
    facts = json.loads(text)
    if facts["format"] != FORMAT:
        raise ValueError("the cache was saved by another version of zm_mlx")
    name = facts["policy"].pop("name")
    if name not in policies.BY_NAME:
        raise ValueError(
            f"the cache was saved with the policy {name!r}, which is none of {', '.join(policies.BY_NAME)}"
        )
    residual, context, proximity, staging, reading = facts["layout"]
    coding = facts.get("coding")  # older files have none
    coding = None if coding is None else Coding(*coding)
    layout = Layout(residual, tuple(context), proximity, staging, reading, coding)
    arrays = [None if x is None else mx.array(x) for x in found]
    *stores, queries, sinks, turn = arrays
    phase: Phase = Streaming()
    if facts["prompt"] is not None:
        length, before, scale, kind, *cap = facts["prompt"]  # older files have no cap
        phase = (Piece if kind == Piece.name else ExactPrompt)(length, before, queries, scale, sinks, *cap)
    return Contents(
        layout,
        policies.BY_NAME[name](**facts["policy"]),
        phase,
        _state(stores, facts["clock"], layout.coding) if stores else None,
        turn,
    )


def _state(arrays: list[Any], clock: list[int], coding: Coding | None) -> State:
    """The inverse of ``State.arrays``."""
    rest = iter(arrays)

    def some(count: int) -> list[mx.array]:
        return [next(rest) for _ in range(count)]

    def numbers() -> Dense:
        return Dense(*some(2))

    if coding is None:
        kept, residuals = Kept(numbers(), *some(2)), Residuals(*some(4))
        return State(kept, residuals, numbers(), Scores(*some(2)), Scores(*some(2)), *clock)
    held = Held(numbers(), Coded(Codes(*some(3)), Codes(*some(3)), coding))
    kept, residuals = Kept(held, *some(2)), Residuals(*some(4))
    coded = Coded(Codes(*some(3)), Codes(*some(3)), coding)
    return State(kept, residuals, Mixed(numbers(), coded, True), Scores(*some(2)), Scores(*some(2)), *clock)
