"""One sequence at a time with a draft model, behind the part of mlx-lm's ``BatchGenerator`` that the loop uses."""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationBatch, PromptProcessingBatch

from ..host.lookup import Step
from ..host.model_caches import members, zero_merge
from ..host.rollback import rollback
from ..host.speculating import fill, speculative_generate_step


@dataclass(eq=False)
class Request:
    """A request: what is left of its prompt, and its answer.

    Args:
        uid: its number.
        segments: of the prompt that are to be read; the last is the prompt's last token.
        total: tokens in them at first.
        limit: tokens of the answer, at most.
        caches: the model's, one a layer, and then the draft model's.
        tokens: that the caches hold, or will once the answer is complete.
        sampler: as mlx-lm takes it.
        processors: of logits, as mlx-lm takes them.
        stop: finds the end of the answer (``StopSequences.Matcher``).
        steps: the answer's tokens, once its prompt is read.
        given: tokens of the answer so far.
    """

    uid: int
    segments: list[list[int]]
    total: int
    limit: int
    caches: list[Any]
    tokens: list[int]
    sampler: Any
    processors: list[Any]
    stop: Any
    steps: Iterator[Step] | None = None
    given: int = 0


class Drafted:
    """A model and its draft model.

    Args:
        model: that answers.
        draft: whose proposals it verifies.
        count: of tokens that are proposed at a time.
        step: tokens of a prompt in one call of a model, at most.
    """

    def __init__(self, model: nn.Module, draft: nn.Module, count: int, step: int) -> None:
        self._model, self._draft, self._count, self._step = model, draft, count, step
        self._waiting: deque[Request] = deque()
        self._uids = 0

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(c.nbytes for s in self._waiting for c in s.caches)

    def insert_segments(
        self,
        segments: Sequence[list[list[int]]],
        max_tokens: Sequence[int],
        caches: Sequence[list[Any]],
        all_tokens: Sequence[list[int]],
        samplers: Sequence[Any],
        logits_processors: Sequence[list[Any]],
        stop_sequences: Sequence[Any],
    ) -> list[int]:
        """One request, as ``BatchGenerator`` takes several; its caches are copied, not written."""
        (left,) = segments
        left = [list(segment) for segment in left if segment]
        if len(left[-1]) > 1:
            left[-1:] = [left[-1][:-1], left[-1][-1:]]
        uid, self._uids = self._uids, self._uids + 1
        self._waiting.append(
            Request(
                uid=uid,
                segments=left,
                total=sum(map(len, left)),
                limit=max_tokens[0],
                caches=copy.deepcopy(list(caches[0])),
                tokens=list(all_tokens[0]),
                sampler=samplers[0],
                processors=list(logits_processors[0] or []),
                stop=stop_sequences[0].matcher(),
            )
        )
        return [uid]

    def next(self) -> tuple[list[Any], list[Any]]:
        """mlx-lm's responses to one step of the request that came first: a part of its prompt, or a token."""
        if not self._waiting:
            return [], []
        sequence = self._waiting[0]
        if sequence.steps is not None:
            return [], [self._token(sequence, sequence.steps)]
        return [self._read(sequence)], []

    def extract_cache(self, uids: Sequence[int]) -> dict[int, tuple[list[Any], list[int]]]:
        """Copies of caches whose prompts are not read to their ends, and the tokens that they hold.

        A copy ends the piece of a prompt that is held beyond the budget, as those of ``ZeroMergeBatch`` do.
        """
        found = {s.uid: (copy.deepcopy(s.caches), list(s.tokens)) for s in self._waiting if s.uid in uids}
        for caches, _ in found.values():
            for cache in zero_merge(caches):
                cache.finish_prompt()
        return found

    def remove(self, uids: Sequence[int]) -> None:
        """Forget requests, wherever they stand."""
        for sequence in [s for s in self._waiting if s.uid in uids]:
            self._end(sequence)

    def close(self) -> None:
        """Forget all requests."""
        self.remove([s.uid for s in self._waiting])

    def _end(self, sequence: Request) -> None:
        self._waiting.remove(sequence)
        if sequence.steps is not None:
            sequence.steps.close()  # type: ignore[attr-defined]

    def _read(self, sequence: Request) -> Any:
        """The next tokens of a prompt; with its last one the answer begins."""
        segments = sequence.segments
        if len(segments) == 1 and len(segments[0]) == 1:
            sequence.steps = self._answer(sequence, segments.pop()[0])
            return PromptProcessingBatch.Response(sequence.uid, (sequence.total, sequence.total), True, True)
        part, segments[0] = segments[0][: self._step], segments[0][self._step :]
        ended = not segments[0]
        if ended:
            segments.pop(0)
        self._fill(sequence, part, self._step)
        sequence.tokens += part
        done = sequence.total - sum(map(len, segments))
        return PromptProcessingBatch.Response(sequence.uid, (done, sequence.total), ended, False)

    def _fill(self, sequence: Request, tokens: Sequence[int], step: int) -> None:
        """Tokens for both models, whose caches stand at the same one."""
        split = len(self._model.layers)
        own, drafts = sequence.caches[:split], sequence.caches[split:]
        fill([(self._draft, drafts), (self._model, own)], mx.array(list(tokens)), step)

    def _answer(self, sequence: Request, last: int) -> Iterator[Step]:
        """The answer's tokens; what is not accepted is taken back also when the iterator is closed."""
        before = mx.array(sequence.tokens, dtype=mx.uint32)
        sequence.tokens.append(last)
        steps = speculative_generate_step(
            mx.array([last]),
            self._model,
            self._draft,
            mx.default_stream(mx.default_device()),
            num_draft_tokens=self._count,
            max_tokens=sequence.limit,
            sampler=sequence.sampler,
            logits_processors=[_behind(before, p) for p in sequence.processors],
            prompt_cache=sequence.caches,
        )
        with rollback(sequence.caches, self._count), closing(steps):  # type: ignore[type-var]
            yield from steps

    def _token(self, sequence: Request, steps: Iterator[Step]) -> Any:
        """The next token of an answer; with the last one the caches, which hold all of it."""
        token, logprobs, _ = next(steps)
        sequence.tokens.append(int(token))
        sequence.given += 1
        reason = "length" if sequence.given >= sequence.limit else None
        if sequence.stop.advance(int(token)):
            reason = "stop"
        response = GenerationBatch.Response(sequence.uid, int(token), logprobs, reason, None, None)
        if reason is not None:
            self._end(sequence)
            self._complete(sequence)
            response.prompt_cache, response.all_tokens = sequence.caches, sequence.tokens
        return response

    def _complete(self, sequence: Request) -> None:
        """The tokens that each model has not had, such as the last one of an answer."""
        split = len(self._model.layers)
        for model, own in ((self._draft, sequence.caches[split:]), (self._model, sequence.caches[:split])):
            seen = int(next(members(own)).offset)
            fill([(model, own)], mx.array(sequence.tokens[seen:]), 1)


def _behind(before: mx.array, processor: Any) -> Any:
    """A processor of logits that sees the prompt too, of which mlx-lm's function gets the last token alone."""
    return lambda tokens, logits: processor(mx.concatenate([before, tokens]), logits)
