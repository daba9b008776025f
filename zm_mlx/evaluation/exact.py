"""The caches that an exact prefill leaves, from what full caches computed of the prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..host.cache import ZeroMergeCache
from ..ops.choose import Operations, mode
from ..phases import ExactPrompt
from ..policies import Policy
from ..state.layout import Layout
from ..state.state import Call, Scores, State, to_model, to_storage
from .recording import Layer


class Source(NamedTuple):
    """What a layer's cache is made of: what was recorded, its policy, and a second reading [H, T] where it has one."""

    layer: Layer
    policy: Policy
    reading: mx.array | None = None


def compressed(source: Source, layout: Layout) -> ZeroMergeCache:
    """The cache after the prompt: scored by the policy's window of queries and compacted once."""
    cache = ZeroMergeCache(layout, policy=source.policy)
    state = ExactPrompt(source.layer.call.length).finish(_scored(source, layout), cache.operations)
    mx.eval(state.arrays())
    cache.layer = state
    return cache


def fitted(sources: Sequence[Source], layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """The layouts that the policy makes for this prompt of uniform ones."""
    length = sources[0].layer.call.length
    if length <= min(a.capacity for a in layouts):
        return tuple(layouts)
    importance = []
    for source, layout in zip(sources, layouts, strict=True):
        found = source.policy.importance(_scored(source, layout), layout).recent[0, :, : length - layout.proximity]
        importance.append(to_model(found, layout, 0))
    return sources[0].policy.fitted(layouts, importance)


def _scored(source: Source, layout: Layout) -> State:
    """All tokens in the recent store, as they are before the compaction that ends the prompt."""
    layer, policy, reading = source
    rows = layer.rows.map(lambda x: to_storage(x, layout, 1))
    state = State.empty(layout, rows, layer.call.length).appended(rows)
    queries, scale, sinks = layer.last(policy.window)
    sinks = None if sinks is None else to_storage(sinks, layout, 0)
    call = Call(to_storage(queries, layout, 1), scale, sinks)
    state = state._replace(scores=Operations(layout, policy, mode()).score(call, state))
    if reading is None:
        return state
    return state._replace(reading=Scores(state.reading.kept, to_storage(reading, layout, 0)[None]))
