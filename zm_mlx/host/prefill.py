"""Fills caches with a prompt, of which each piece may be read twice (method.md 5)."""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList

from ..errors import UnsupportedModelError
from ..phases import PIECE
from .cache import ZeroMergeCache
from .model_caches import zero_merge
from .part import least
from .plan import positions_of
from .probe import name_of

STEP = 2048  # tokens of a call of the model, mlx-lm's own number

Progress = Callable[[int, int], None]  # prompt tokens done, prompt tokens in all


def prefill(
    model: nn.Module,
    tokens: Sequence[int] | mx.array,
    caches: list[Any],
    *,
    step: int = STEP,
    progress: Progress | None = None,
) -> None:
    """Advance caches by tokens of a prompt, as mlx-lm's prefill does; with ``score="reread"`` read them twice.

    Give it all tokens but the last one, with which ``mlx_lm.stream_generate(..., prompt_cache=caches)`` goes on.

    After a piece of the prompt was read as usual, the model reads it again, at the positions that follow, seeing
    the first tokens of the context and the piece alone, and nothing of that is stored. The most attention that a
    token gets then is what the policy ranks it by, beside its attention so far. Pieces are equal parts of the
    tokens, of up to ``PIECE``. A streaming cache holds its budget and one piece meanwhile. Tokens are read once if
    all fit into the budget.

    Args:
        model: the model that the caches were made for.
        tokens: [n].
        caches: as ``make_prompt_cache`` made them; advanced in place.
        step: tokens of a call of the model, at most (or one more); a second reading is one call.
        progress: called with the tokens done and n.

    Raises:
        ValueError: no tokens, or a step that is not positive (1 where tokens are to be read twice).
        UnsupportedModelError: the model has no positions after the prompt.
    """
    prompt = tokens.reshape(-1) if isinstance(tokens, mx.array) else mx.array(list(tokens))
    total = int(prompt.size)
    if not total:
        raise ValueError("a prompt needs tokens")
    own = zero_merge(caches)
    twice = any(c.policy.score == "reread" for c in own) and not least(model, _fits(own, total))
    if step < (2 if twice else 1):
        fewest = "2 tokens or more, for a call of one is decoding" if twice else "1 token or more"
        raise ValueError(f"step must be {fewest}, not {step}")
    if twice:
        _require_positions(model, own, total)
    done = 0
    if progress:
        progress(done, total)
    for count in (_twice if twice else _once)(model, prompt, caches, step):
        done += count
        if progress:
            progress(done, total)


def _once(model: nn.Module, tokens: mx.array, caches: list[Any], step: int) -> Iterator[int]:
    """Read tokens as usual; yields how many a call took."""
    edges = [*range(0, tokens.size, step), tokens.size]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:  # a call of one token would end an exact prompt
        del edges[-2]
    for begin, end in pairwise(edges):
        model(tokens[None, begin:end], cache=caches)
        mx.eval([c.state for c in caches])
        mx.clear_cache()
        yield end - begin


def _twice(model: nn.Module, tokens: mx.array, caches: list[Any], step: int) -> Iterator[int]:
    """Read tokens twice, piece by piece; yields how many a call of the first reading took."""
    ends = min((n for c in zero_merge(caches) if (n := c.remaining) is not None), default=tokens.size + 1)
    if ends <= tokens.size:  # an exact prompt is compressed with its last token, so what comes before is read twice
        yield from _pieces(model, tokens[: ends - 1], caches, step)
        yield from _once(model, tokens[ends - 1 : ends], caches, step)
        tokens = tokens[ends:]
    yield from _pieces(model, tokens, caches, step)


def _pieces(model: nn.Module, tokens: mx.array, caches: list[Any], step: int) -> Iterator[int]:
    count = -(-tokens.size // PIECE)
    for begin, end in pairwise(i * tokens.size // max(1, count) for i in range(count + 1)):
        piece = tokens[begin:end]
        streaming = [c for c in zero_merge(caches) if c.prefill == "streaming"]
        for c in streaming:
            c.begin_prompt(piece.size + 1)  # one more than comes: it is to be compressed after its second reading
        yield from _once(model, piece, caches, step)
        _again(model, piece, caches)
        for c in streaming:
            c.finish_prompt()
        mx.eval([c.state for c in caches])


def _again(model: nn.Module, piece: mx.array, caches: list[Any]) -> None:
    """The second reading of the newest tokens."""
    own = zero_merge(caches)
    try:
        for c in own:
            c.rereading = True
        model(piece[None], cache=[_beside(c) for c in caches])
        mx.eval([c.layer.reading for c in own if c.layer])
    finally:
        for c in own:
            c.rereading = False
    mx.clear_cache()


def _beside(cache: Any) -> Any:
    """A cache for the second reading: ours, which stores nothing of it, and copies of all others."""
    if isinstance(cache, ZeroMergeCache):
        return cache
    return CacheList(*map(_beside, cache.caches)) if type(cache) is CacheList else copy.deepcopy(cache)


def _fits(own: Sequence[ZeroMergeCache], tokens: int) -> bool:
    """Whether nothing is compressed before this prompt has ended."""
    return all(c.offset + max(tokens, c.remaining or 0) <= c.layout.capacity for c in own)


def _require_positions(model: nn.Module, own: Sequence[ZeroMergeCache], tokens: int) -> None:
    """Refuse a model whose positions are a table that ends before the second reading of the last piece."""
    needed = max(c.offset for c in own) + tokens + min(tokens, PIECE)
    positions = positions_of(model)
    if positions is not None and positions < needed:
        raise UnsupportedModelError(
            f"zm_mlx cannot read a prompt of {tokens} tokens twice with {name_of(model)}: that takes {needed} "
            f"positions, and it has {positions}"
        )
