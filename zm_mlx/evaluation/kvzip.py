"""KVzip's importance: what a model attends to while it repeats the prompt (Kim et al. 2025, arXiv 2505.23416, 3.2)."""

import copy
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..host.hook import replace_caches
from ..ops.plain import uncompressed
from ..ops.plain.attention import block_length
from ..state.rows import Dense
from ..state.state import Call
from .recording import Recording, Whole, read

CHUNK = 2000  # tokens that are repeated at a time, as in the official code
TAIL = 8  # of the chunk before, with which a later request begins
SINKS = 4  # first tokens, which always stay (kvpress)
FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"


class Span(NamedTuple):
    """Tokens from ``begin`` to ``end`` of the prompt."""

    begin: int
    end: int


class Repeating(Whole):
    """The rows of a prompt [1, H, T] and of its repetition, whose attention to a span of the prompt is recorded.

    Attributes:
        found: the maximum probability that each token of the span got, [H, span] float32. The softmax is over the first
            tokens, the span, and the repetition so far, as in the official code.
    """

    def __init__(self, rows: Dense, span: Span, room: int) -> None:
        heads, self.prompt, self.span = rows.shape[1], rows.shape[2], span
        super().__init__(heads, self.prompt + room)
        self.update_and_fetch(*rows)
        self.found = mx.zeros((heads, span.end - span.begin))

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None = None,
        cap: float | None = None,
    ) -> mx.array:
        self.found = mx.maximum(self.found, self._attention(queries[0], scale))
        return uncompressed.attend(Call(queries, scale, sinks, cap), self.whole())

    def arrays(self) -> list[mx.array]:
        return [*super().arrays(), self.found]

    def _attention(self, queries: mx.array, scale: float) -> mx.array:
        """Maxima [H, span] over queries [H * G, L, D], of which the last is of the newest row."""
        keys = self.whole().newest.keys[0, :, : self.whole().filled]
        span, length = slice(self.span.begin, self.span.end), queries.shape[1]
        seen = mx.concatenate([keys[:, :SINKS], keys[:, span], keys[:, self.prompt :]], axis=1).astype(mx.float32)
        count, ours = seen.shape[1], slice(SINKS, SINKS + self.found.shape[1])
        grouped = queries.reshape(keys.shape[0], -1, *queries.shape[1:]).astype(mx.float32) * scale  # [H, G, L, D]
        step, best = block_length(grouped, count), mx.zeros_like(self.found)
        for begin in range(0, length, step):
            block = mx.depends(grouped[:, :, begin : begin + step], [best])  # one after the other, to bound memory
            newest = mx.arange(count - length + begin, count - length + begin + block.shape[2])[:, None]
            logits = mx.where(mx.arange(count) <= newest, block @ seen[:, None].swapaxes(-1, -2), -mx.inf)
            best = mx.maximum(best, mx.softmax(logits, axis=-1)[..., ours].max(axis=(1, 2)))
        return best


def reconstruct(model: nn.Module, tokenizer: Any, tokens: mx.array, recording: Recording) -> list[mx.array]:
    """Importance [H, T] float32 of the tokens of a recorded prompt in each layer; 1 for its first ones.

    The model is asked to repeat the prompt, in chunks of ``CHUNK`` tokens, and reads them as its answer.

    Raises:
        ValueError: the prompt is not longer than its first tokens.
    """
    if tokens.size <= SINKS:
        raise ValueError(f"a prompt to repeat has more than {SINKS} tokens")
    parts = [[mx.ones((x.rows.shape[1], SINKS))] for x in recording.layers]
    for begin in range(SINKS, tokens.size, CHUNK):
        span = Span(begin, min(begin + CHUNK, tokens.size))
        asked = mx.array(request(tokenizer, tokens, span))
        repetition = mx.concatenate([asked, tokens[span.begin : span.end]])
        caches = [Repeating(x.rows, span, repetition.size) for x in recording.layers]
        read(model, replace_caches(copy.deepcopy(recording.others), caches.__getitem__), repetition)
        for found, cache in zip(parts, caches, strict=True):
            found.append(cache.found)
    return [mx.concatenate(found, axis=1) for found in parts]


def request(tokenizer: Any, tokens: mx.array, span: Span) -> list[int]:
    """Tokens that ask to repeat a span, and begin the answer."""
    first = span.begin <= SINKS
    ask, tail = encode(tokenizer, FIRST if first else LATER), tokens[span.begin - TAIL : span.begin]
    return [*ask, *([] if first else map(int, tail)), *encode(tokenizer, answer_begins(tokenizer))]


def answer_begins(tokenizer: Any) -> str:
    """What a chat template puts between a user's words and the answer; a line break without one."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n"
    mark = "0123456789"
    chat = [{"role": "user", "content": mark}]
    text: str = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return text.split(mark)[-1]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text alone."""
    return list(tokenizer.encode(text, add_special_tokens=False))
