"""Speculative decoding: the last calls of a cache can be taken back (method.md 5).

A state is a value, so undoing a call is going back to the state before it, by reference. What was accepted of the
call is taken once more from there, through the usual way: rows, scores, a compaction that is due. The model does not
run again. So compactions come where they would come without a draft, and so do the tokens.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from .. import phases
from ..errors import UnsupportedModelError
from ..ops.choose import Operations
from ..phases import Phase, Streaming, Taken
from ..state.rows import Dense
from ..state.state import Call, State
from .batch import ZeroMergeBatch
from .cache import ZeroMergeCache
from .model_caches import members, zero_merge

TRIMMED = (mlx_lm_cache.KVCache, mlx_lm_cache.QuantizedKVCache)  # mlx-lm's own that give back any number of tokens


@contextmanager
def rollback(caches: Sequence[Any], k: int) -> "Iterator[Scope]":
    """Let the ZeroMerge caches of a model give back their last tokens, as mlx-lm's speculative decoding asks for::

        with zm_mlx.rollback(caches, 3):
            for response in stream_generate(
                model, tokenizer, prompt, draft_model=draft, num_draft_tokens=3, prompt_cache=caches
            ):
                print(response.text, end="")

    ``caches`` are those of the model followed by those of its draft model, as mlx-lm wants them in ``prompt_cache``.
    Greedy tokens are those of decoding without a draft, as far as the model's arithmetic is the same for one token
    and for several.

    Inside, a call of up to k + 1 tokens is decoding, a longer one belongs to a prompt; ``stream_generate`` reads all
    of its prompt but the last token as a prompt, whatever its length. At least the last k + 2 tokens of decoding can
    be taken back, in any number of calls. The states before these calls are kept meanwhile, which takes up to one
    budget more of memory for each compaction among them.

    At the end of the scope no cache holds a drafted token that was not accepted, and after an exception all hold the
    same tokens. Afterwards they are as any others. Inside, keep them from mlx-lm's prompt cache of a server, which
    would take back more.

    Args:
        caches: of one model, or of a model and its draft model; ZeroMerge caches, or mlx-lm's full ones.
        k: tokens that a draft proposes at a time, at most.

    Raises:
        UnsupportedModelError: a cache cannot give tokens back (sliding windows, recurrent layers).
        ValueError: k is not positive, or the caches are in such a scope already.
    """
    if not (isinstance(k, int) and k >= 1):
        raise ValueError(f"k must be 1 token or more, not {k!r}")
    every = list(members(caches))
    require_trimmable(every)
    own = zero_merge(every)
    if any(c.log is not None for c in own):
        raise ValueError("these caches are in a rollback scope already")
    scope, begun = Scope(k), [int(c.offset) for c in every]
    for cache in own:
        cache.log = Log(scope, int(cache.offset))
    failed = True
    try:
        yield scope
        failed = False
    except GeneratorExit:  # the caller wants no more tokens
        failed = False
        raise
    finally:
        _settle(every, begun, scope.most, failed)
        for cache in own:
            cache.log = None


@contextmanager
def reading(caches: Sequence[Any]) -> Iterator[None]:
    """Calls of these caches belong to a prompt, however short, also in a scope of ``rollback``."""
    scopes = [c.log.scope for c in zero_merge(caches) if c.log is not None]
    for scope in scopes:
        scope.reading = True
    try:
        yield
    finally:
        for scope in scopes:
            scope.reading = False


def require_trimmable(caches: Sequence[Any]) -> None:
    """Refuse caches of which one cannot give back any number of tokens.

    Raises:
        UnsupportedModelError: as ``rollback``.
    """
    for cache in members(caches):
        if isinstance(cache, ZeroMergeBatch):
            raise UnsupportedModelError("zm_mlx speculates for one sequence at a time, not for a batch of them")
        if type(cache) not in (ZeroMergeCache, *TRIMMED):
            raise UnsupportedModelError(
                f"speculative decoding needs caches that give back rejected tokens, and a {type(cache).__name__} does "
                "not (sliding windows and recurrent layers lose what they replace): generate without a draft"
            )


@dataclass
class Scope:
    """What the caches of one scope share.

    Args:
        k: tokens of a draft.
        reading: whether calls belong to a prompt, however short.
        most: tokens since the scope's begin that are accepted, as far as is known.
        outside: the exception that was being handled at its begin.
    """

    k: int
    reading: bool = False
    most: int | None = None
    outside: BaseException | None = field(default_factory=lambda: sys.exc_info()[1])

    @property
    def unwinding(self) -> bool:
        """Whether an exception is on its way out of what runs in the scope; the end of a generator is none."""
        error = sys.exc_info()[1]
        return not (error is None or error is self.outside or isinstance(error, GeneratorExit))


class Entry(NamedTuple):
    """A call that can be taken back: what was before it, and what it brought."""

    state: State
    phase: Phase
    call: Call
    new: Dense


class Log:
    """The last calls of one cache.

    Args:
        scope: that it is in.
        seen: tokens that the cache holds, which is where the scope begins.
    """

    def __init__(self, scope: Scope, seen: int) -> None:
        self.scope = scope
        self.begun = seen
        self._checked = seen  # tokens up to the last ``trim``
        self._entries: list[Entry] = []

    @property
    def held(self) -> int:
        """Tokens that can be taken back."""
        return sum(e.call.length for e in self._entries)

    def forget(self, seen: int) -> None:
        """Nothing of the ``seen`` tokens that came so far can be taken back any more."""
        self._checked = seen
        self._entries.clear()

    def take(self, phase: Phase, call: Call, new: Dense, state: State, ops: Operations) -> Taken:
        """``phases.take`` for a call, which is noted if it is decoding."""
        length = call.length
        if self.scope.reading or length > self.scope.k + 1:
            self.forget(state.seen + length)
            return phases.take(phase, call, new, state, ops)
        outputs: list[mx.array] = []
        begin = 0
        while begin < length:
            # What ends a prompt ends it with its own token, as without a draft; the rest begins no piece of another.
            streams = isinstance(phase, Streaming)
            end = length if streams else begin + 1
            part, rows = call, new
            if (begin, end) != (0, length):
                part, rows = call.at(begin, end), _between(new, begin, end)
            entry = Entry(state, phase, part, rows)
            decoding = replace(ops, turn=None) if streams and end - begin > 1 else ops
            out, state, phase = phases.take(phase, part, rows, state, decoding)
            self._note(entry)
            outputs.append(out)
            begin = end
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2), state, phase

    def trim(self, cache: ZeroMergeCache, n: int) -> int:
        """Take back the last n tokens of a cache.

        Where an exception broke off a call of the model, mlx-lm counts by the call before it, of whose tokens it took
        back some already: then at most those that came since.

        Returns:
            n.

        Raises:
            ValueError: fewer can be taken back.
        """
        back = max(0, min(n, self._seen(cache) - self._checked)) if self.scope.unwinding else n
        if back > self.held:
            raise ValueError(
                f"{back} tokens are to be taken back, and zm_mlx.rollback holds {self.held}: give it the number of "
                "tokens that a draft proposes, and keep its caches from mlx-lm's prompt cache meanwhile"
            )
        self.undo(cache, back)
        self._checked = self._seen(cache)
        return n

    def undo(self, cache: ZeroMergeCache, n: int) -> None:
        """Take back the last n tokens, or as many as can be."""
        while n > 0 and self._entries:
            last = self._entries.pop()
            cache.layer, cache.phase = last.state, last.phase
            n -= last.call.length
            if n < 0:  # attention is what scores tokens, so they attend again; what they see goes nowhere
                call, new = last.call.at(0, -n), _between(last.new, 0, -n)
                _, cache.layer, cache.phase = self.take(last.phase, call, new, last.state, cache.operations)

    def match(self, cache: ZeroMergeCache) -> None:
        """After an exception: without a call that never came to its end."""
        cache.drop_update()
        while self._entries and self._entries[-1].state.seen + self._entries[-1].call.length > self._seen(cache):
            self._entries.pop()

    def _note(self, entry: Entry) -> None:
        self._entries.append(entry)
        while self.held - self._entries[0].call.length >= self.scope.k + 2:
            del self._entries[0]

    @staticmethod
    def _seen(cache: ZeroMergeCache) -> int:
        return 0 if cache.layer is None else cache.layer.seen


def _between(rows: Dense, begin: int, end: int) -> Dense:
    """Some of new rows [B, H, L]."""
    return rows.map(lambda x: x[:, :, begin:end])


def _settle(every: Sequence[Any], begun: Sequence[int], most: int | None, failed: bool) -> None:
    """Take back what was not accepted; after a failure, also what not all caches have."""
    own = zero_merge(every)
    for cache in own:
        if cache.log is not None:
            cache.log.match(cache)
    came = [int(c.offset) - before for c, before in zip(every, begun, strict=True)]
    bounds = [most] if most is not None else []
    most = min(bounds + came if failed else bounds, default=None)
    if most is not None:
        for cache, tokens in zip(every, came, strict=True):
            _give_back(cache, max(0, tokens - most))
    # What was taken last, or once more, is not computed yet, and would keep what it is computed from.
    for cache in own:
        cache.unbind()
    mx.eval([c.layer.arrays() for c in own if c.layer is not None])


def _give_back(cache: Any, n: int) -> None:
    if not isinstance(cache, ZeroMergeCache):
        cache.trim(n)
    elif cache.log is not None:
        cache.log.undo(cache, n)
