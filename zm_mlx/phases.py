"""How tokens are taken: compressed as they come, or held whole until their prompt ends (method.md 5).

A phase takes new tokens into a state, in blocks that end where something happens, and says which
phase follows. Phases are values, as states are.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import mlx.core as mx

from .ops.choose import Operations
from .policies.policy import Policy
from .state.layout import Layout
from .state.rows import Dense, after
from .state.state import Bound, Call, Scores, State

Prefill = Literal["exact", "streaming"]
PIECE = 512  # tokens that are read again together, at most
FEWEST = 128  # queries to which a residual row is fitted: it has as many numbers as a head has dims


@dataclass(frozen=True)
class Streaming:
    """Compacts each time the staging region is full: never more rows than the budget.

    Args:
        bound: attention for one token, until the next compaction.
    """

    bound: Bound | None = field(default=None, compare=False)
    name: ClassVar[Prefill] = "streaming"

    @property
    def arrays(self) -> list[mx.array]:
        return []

    def recent_rows(self, layout: Layout) -> int:
        """Rows of the recent store that an empty cache begins with."""
        return layout.open

    def room(self, state: State, ops: Operations) -> int:
        """Tokens until something happens: the staging region is full."""
        return ops.layout.staging - state.since_compaction

    def block(self, call: Call, state: State, ops: Operations) -> "Taken":
        """Attend to tokens that are stored already, take over the scores, compact where it is due."""
        state = self._own(state)
        out, scores = ops.attend(call, state)
        since = state.since_compaction + call.length
        if since < ops.layout.staging:
            phase = Streaming() if self.bound and self.bound.keys else self  # or keys would be held twice
            return out, state._replace(scores=scores, since_compaction=since), phase
        return out, ops.compact(state._replace(scores=scores, since_compaction=0)), Streaming()

    def prepared(self, state: State, call: Call, ops: Operations) -> "tuple[State, Phase]":
        """A prompt whose tokens are replayed is held in pieces: as long as a piece, whatever the budget."""
        if not ops.replays:
            return state, self
        return Piece(PIECE, state.seen).prepared(self._own(state), call, ops)

    def token(self, call: Call, new: Dense, state: State, ops: Operations) -> "Taken":
        """``take`` for one token, with as little Python as it takes."""
        kept, residuals, recent, scores, reading, departed, filled, since = state
        recent.write(filled, new)
        state = State(kept, residuals, recent, scores, reading, departed, filled + 1, since + 1)
        phase, bound = self, self.bound
        if bound is None:
            bound = ops.bind(call, state)
            phase, kept = Streaming(bound), bound.read(state).kept
        out, scores = bound.step(call.queries, state)
        if since + 1 < ops.layout.staging:
            # The output needs the new rows, and a step evaluates the scores with it.
            return out, State(kept, residuals, recent, scores, reading, departed, filled + 1, since + 1), phase
        state = bound.read(State(kept, residuals, recent, scores, reading, departed, filled + 1, 0))
        state = ops.compact(state)
        return _with_arrays(out, state, self), state, Streaming()

    def finish(self, state: State, ops: Operations) -> State:
        """Nothing to do: nothing is held back."""
        return self._own(state)

    def _own(self, state: State) -> State:
        """The state, to be read by others than what is bound."""
        return self.bound.read(state) if self.bound else state


@dataclass(frozen=True)
class ExactPrompt:
    """Holds a prompt whole and compacts it once, scored by its last W queries.

    Args:
        length: tokens of the prompt, as announced.
        before: tokens seen before it.
        queries: the last ones, which score a prompt that ends earlier and are replayed, and their scale, sinks and cap.
    """

    length: int
    before: int = 0
    queries: mx.array | None = None
    scale: float = 0.0
    sinks: mx.array | None = None
    cap: float | None = None
    name: ClassVar[Prefill] = "exact"

    @property
    def arrays(self) -> list[mx.array]:
        return [x for x in (self.queries, self.sinks) if x is not None]

    def recent_rows(self, layout: Layout) -> int:
        """Rows of the recent store that an empty cache begins with."""
        return max(layout.open, self.length)

    def prepared(self, state: State, call: Call, ops: Operations) -> "tuple[State, Phase]":
        """Room for the whole prompt; or its end, if the call comes from decoding though the prompt is not complete.

        A prefill ends in one or two calls of one token. Any other that would exceed the budget is none of its.
        """
        remaining = self.length - self._taken(state)
        if call.length == 1 and self._decoding(remaining, state, ops):
            return self.finish(state, ops), Streaming()
        if state.filled + remaining > state.recent_rows:
            state = state.with_recent_rows(state.filled + remaining)
        return state, self

    def room(self, state: State, ops: Operations) -> int:
        """Tokens until something happens: the scored part of the prompt begins, or the prompt ends."""
        taken, first = self._taken(state), self._first_scored(ops.policy)
        ends = [first if taken < first else self.length]
        if ops.replays:
            ends.append(taken - taken % PIECE + PIECE)
        return min(ends) - taken

    def block(self, call: Call, state: State, ops: Operations) -> "Taken":
        """Attend to tokens that are stored already; score them if they are among the last W."""
        phase: ExactPrompt = self
        scored = self._taken(state) > self._first_scored(ops.policy)
        if not scored or _remembers(ops):
            phase = self._remembering(call, ops)
        if scored:
            out, scores = ops.attend(call, state)
            state = state._replace(scores=scores)
        else:
            out = ops.attend_whole(call, state)
            state = self._faded(call, state, ops)
        if self._taken(state) % PIECE == 0:
            state = phase._replayed(state, PIECE, ops)
        if self._taken(state) < self.length:
            return out, state, phase
        return out, phase.finish(state, ops), Streaming()

    def finish(self, state: State, ops: Operations) -> State:
        """End the prompt with the tokens that it has: score them by the last W queries, and compact once."""
        if not self._taken(state):
            return ops.compact(state)
        state = self._replayed(self._scored(state, ops), self._taken(state) % PIECE, ops)
        capacity = ops.layout.capacity
        # Compactions stay where they would be if the prompt had been streamed, until one merges.
        since = (state.seen - capacity) % ops.layout.staging if state.seen <= capacity else 0
        state = state._replace(since_compaction=since)
        return self._fitted(state, ops.compact(state), ops)

    def _fitted(self, before: State, left: State, ops: Operations) -> State:
        """With a residual row for the victims of the compaction that ends the prompt, where the policy has one."""
        if not ops.policy.fits or self.queries is None or left.departed in (0, before.departed):
            return left
        last = self.queries[:, :, -min(PIECE, self._taken(before)) :]
        if last.shape[2] < FEWEST:
            return left
        return ops.fit(before, left, self._call(last))

    def _taken(self, state: State) -> int:
        return state.seen - self.before

    def _first_scored(self, policy: Policy) -> int:
        """The token of the prompt from which on tokens are scored as they come."""
        return 0 if policy.window is None else max(0, self.length - policy.window)

    def _decoding(self, remaining: int, state: State, ops: Operations) -> bool:
        """Whether a call of one token is none of the prompt's, and would exceed the budget."""
        return remaining > 2 and state.seen >= ops.layout.capacity

    def _remembering(self, call: Call, ops: Operations) -> "ExactPrompt":
        """With the last queries, as many as score a prompt that ends here, or are replayed."""
        both = [call.queries] if self.queries is None else [self.queries, call.queries]
        count = max(ops.policy.window or 0, PIECE if _remembers(ops) else 0)
        last = mx.contiguous(mx.concatenate(both, axis=2)[:, :, -count:])
        return replace(self, queries=last, scale=call.scale, sinks=call.sinks, cap=call.cap)

    def _call(self, queries: mx.array) -> Call:
        """Some of the queries that are kept, as they came."""
        return Call(queries, self.scale, self.sinks, self.cap)

    def _faded(self, call: Call, state: State, ops: Operations) -> State:
        """Older scores after queries that give none."""
        if not self.before:
            return state
        fade = ops.policy.decay**call.length
        return state._replace(scores=Scores(*(fade * x for x in state.scores)))

    def _replayed(self, state: State, count: int, ops: Operations) -> State:
        """The newest ``count`` tokens, which are a piece, read again by their own queries."""
        if not ops.replays or self.queries is None or count < 2:
            return state
        return ops.replay(self._call(self.queries[:, :, -count:]), state)

    def _scored(self, state: State, ops: Operations) -> State:
        """Add what the kept queries give, as far as they are among the last W of the prompt."""
        scored = max(0, self._taken(state) - self._first_scored(ops.policy))
        window = ops.policy.window
        if self.queries is None or window is None or scored == window:
            return state
        last = self.queries[:, :, -window:]
        queries = last[:, :, : last.shape[2] - scored] if _remembers(ops) else last[:, :, scored - window :]
        if not queries.shape[2]:
            return state
        then = state._replace(filled=state.filled - scored, scores=Scores.zeros_like(state.scores))
        mass = ops.score(self._call(queries), then)
        fade = ops.policy.decay**scored
        return state._replace(scores=Scores(*(x + fade * y for x, y in zip(state.scores, mass, strict=True))))


@dataclass(frozen=True)
class Piece(ExactPrompt):
    """A part of a prompt that a streaming cache holds until it was read again; then it is compacted."""

    name: ClassVar[Prefill] = "streaming"

    def finish(self, state: State, ops: Operations) -> State:
        """End the piece with the tokens that it has; so few that streaming would not have compacted yet stay staged."""
        taken = self._taken(state)
        since = state.since_compaction + taken
        if since >= ops.layout.staging:
            return super().finish(state, ops)
        state = self._replayed(state, taken % PIECE, ops)
        return state.without_leaving(ops.layout, 0)._replace(since_compaction=since)

    def _decoding(self, remaining: int, state: State, ops: Operations) -> bool:
        """A piece ends with any such call, so that decoding never holds one."""
        return True


Phase = Streaming | ExactPrompt
Taken = tuple[mx.array, State, Phase]


def take(phase: Phase, call: Call, new: Dense, state: State, ops: Operations) -> Taken:
    """Attend to new tokens [B, H, L] and store them.

    Returns:
        output [B, H * G, L, Dv] in the dtype of the queries, and what state and phase follow.
    """
    length = call.length
    if length == 1 and isinstance(phase, Streaming):
        return phase.token(call, new, state, ops)
    state, phase = phase.prepared(state, call, ops)
    if length == 1 and isinstance(phase, Streaming):  # decoding has begun, and ended its prompt
        return phase.token(call, new, state, ops)
    outputs: list[mx.array] = []
    begin = 0
    while begin < length:
        if begin and isinstance(phase, Streaming):  # a piece of a prompt has ended
            state, phase = phase.prepared(state, call, ops)
        end = min(length, begin + phase.room(state, ops))
        block, rows = call.at(begin, end), Dense(new.keys[:, :, begin:end], new.values[:, :, begin:end])
        if outputs:  # one block after the other, or the logits of all exist at once
            block = block._replace(queries=after(block.queries, outputs[-1]))
            rows = Dense(after(rows.keys, outputs[-1]), after(rows.values, outputs[-1]))
        out, state, phase = phase.block(block, state.appended(rows), ops)
        outputs.append(out)
        begin = end
    out = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
    return _with_arrays(out, state, phase), state, phase


def begin(length: int, phase: Phase, state: State | None, ops: Operations) -> tuple[State | None, Phase]:
    """Take the next ``length`` tokens as one prompt; a prompt that is under way ends here.

    Raises:
        ValueError: length is not positive.
    """
    if not (isinstance(length, int) and length >= 1):
        raise ValueError(f"prompt_length must be 1 token or more, not {length!r}")
    state = None if state is None else phase.finish(state, ops)
    return state, ExactPrompt(length, 0 if state is None else state.seen)


def _remembers(ops: Operations) -> bool:
    """Whether the last queries of a prompt are needed at its end, or at that of a piece, whatever scores it."""
    return ops.replays or ops.policy.fits


def _with_arrays(out: mx.array, state: State, phase: Phase) -> mx.array:
    """out, evaluated with all arrays: decode evaluates only its token, and the others would pile up as graph."""
    done: mx.array = mx.depends(out, [*state.arrays(), *phase.arrays])
    return done
