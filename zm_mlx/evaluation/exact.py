"""The caches that an exact prefill leaves, from what full caches computed of the prompt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from ..host.cache import ZeroMergeCache
from ..ops.choose import Operations, mode
from ..phases import PIECE, ExactPrompt
from ..policies import Policy
from ..state.layout import Layout
from ..state.state import Scores, State, to_model, to_storage
from .recording import STEP, Layer


class Source(NamedTuple):
    """What a layer's cache is made of.

    scores: of the prompt's tokens by its last queries, [H, T] float32; reading: of a second reading, where
    the policy has one. In the model's order of heads.
    """

    layer: Layer
    scores: mx.array
    policy: Policy
    reading: mx.array | None = None


def scored(layer: Layer, policy: Policy) -> mx.array:
    """The scores [H, T] of a prompt by the policy's window of queries; they depend on its window and decay alone."""
    layout = policy.layout(policy.smallest, layer.rows.shape[1])
    operations = Operations(layout, policy, mode())
    state = _whole(layer, layout)
    call = layer.last(policy.window)
    before = layer.length - call.length
    for begin in range(0, call.length, STEP):  # no query of a block sees what comes after it
        block = call.at(begin, min(begin + STEP, call.length))
        state = state._replace(filled=before + begin + block.length)
        state = state._replace(scores=operations.score(block, state))
        mx.eval(state.scores)
    return state.scores.recent[0]


def replayed(layer: Layer, policy: Policy, turn: mx.array) -> mx.array:
    """What a prompt's tokens are worth to its own queries behind each piece, [H, T] float32."""
    layout = policy.layout(policy.smallest, layer.rows.shape[1])
    operations = Operations(layout, policy, mode(), turn)
    state, call = _whole(layer, layout), layer.last(None)
    for begin in range(0, call.length, PIECE):
        end = min(begin + PIECE, call.length)
        if end - begin > 1:  # as ``ExactPrompt``: a token alone says nothing
            state = operations.replay(call.at(begin, end), state._replace(filled=end))
            mx.eval(state.reading)
    return state.reading.recent[0]


def compressed(source: Source, layout: Layout) -> ZeroMergeCache:
    """The cache after the prompt, compacted once."""
    cache = ZeroMergeCache(layout, policy=source.policy)  # without a turn: all pieces were replayed
    prompt = ExactPrompt(source.layer.length)
    if source.policy.fits:
        last = source.layer.last(PIECE)
        queries = to_storage(last.queries, layout, 1)
        prompt = replace(prompt, queries=queries, scale=last.scale, sinks=last.sinks)
    state = prompt.finish(_before(source, layout), cache.operations)
    mx.eval(state.arrays())
    cache.layer = state
    return cache


def fitted(sources: Sequence[Source], layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """The layouts that the policy makes for this prompt of uniform ones."""
    length = sources[0].layer.length
    if length <= min(a.capacity for a in layouts):
        return tuple(layouts)
    importance = []
    for source, layout in zip(sources, layouts, strict=True):
        found = source.policy.importance(_before(source, layout), layout).recent[0, :, : length - layout.proximity]
        importance.append(to_model(found, layout, 0))
    return sources[0].policy.fitted(layouts, importance)


def _before(source: Source, layout: Layout) -> State:
    """The state before the compaction that ends the prompt: all tokens are recent ones."""
    state = _whole(source.layer, layout)

    def column(scores: Scores, found: mx.array) -> Scores:
        return scores._replace(recent=to_storage(found, layout, 0)[None])

    state = state._replace(scores=column(state.scores, source.scores), since_compaction=0)
    return state if source.reading is None else state._replace(reading=column(state.reading, source.reading))


def _whole(layer: Layer, layout: Layout) -> State:
    """A prompt's rows in the recent store, without scores."""
    rows = layer.rows.map(lambda x: to_storage(x, layout, 1))
    return State.empty(layout, rows, layer.length).appended(rows)
