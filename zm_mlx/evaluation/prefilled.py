"""A prompt that a model has read once, from which the caches of all contenders are made.

Where the prompt is compressed at its end, as by an exact prefill, every method sees the keys, values
and queries of one and the same reading, so the model need not run again for each of them.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache

from ..budget import total_bytes
from ..calibration.table import Table
from ..host.cache import ZeroMergeCache
from ..host.caches import ROTATING_KEEP
from ..host.hook import replace_caches
from ..host.model_caches import members, zero_merge
from ..host.probe import probe
from ..host.turning import turns
from ..phases import PIECE
from ..policies import Policy, ZeroMerge
from ..policies.expected_attention import ExpectedAttention, Queries
from ..policies.kvzip import KVzip
from ..state.layout import LayerShape, Layout
from . import expected, kvzip
from .caches import Contender, Quantization, full, rows_of, window_rows
from .exact import Source, compressed, fitted, replayed, scored
from .recording import STEP, Layer, Recording, evaluate, read, record
from .window import Window


class Prompted:
    """A prompt read once with full caches; ``caches`` makes those of a contender from it.

    Args:
        model: any model that this package serves.
        tokens: the prompt without its last token. That one is fed first when generation begins, as in mlx-lm, so
            that every logit comes from the compressed cache.
        tokenizer: the model's, which only KVzip needs: it asks the model to repeat the prompt.
        before: a prompt that was read, behind which these tokens come.
        table: of the model, by which ``zeromerge`` shares rows out.

    Attributes:
        layers: what each full-attention layer computed.
        shapes: what a token takes in each of them.

    Raises:
        ValueError: no tokens.
        UnsupportedModelError: the model cannot be served.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Sequence[int] | mx.array,
        tokenizer: Any = None,
        before: "Prompted | None" = None,
        table: Table | None = None,
    ) -> None:
        self.model, self.tokenizer, self.table = model, tokenizer, table
        new = as_array(tokens)
        if not new.size:
            raise ValueError("a prompt needs at least one token besides its last one")
        self.tokens: mx.array = new if before is None else mx.concatenate([before.tokens, new])
        self.shapes: list[LayerShape] = probe(model) if before is None else before.shapes
        self._recording: Recording = record(model, new, self.shapes, None if before is None else before._recording)
        self._scores: dict[tuple[int | None, float], list[mx.array]] = {}  # by the policy's window and decay

    def __len__(self) -> int:
        return int(self.tokens.size)

    @property
    def layers(self) -> list[Layer]:
        return self._recording.layers

    @property
    def others(self) -> list[Any]:
        """The model's own caches, in which those of layers without full attention are filled."""
        return self._recording.others

    def followed_by(self, tokens: Sequence[int] | mx.array) -> "Prompted":
        """The prompt with more tokens behind it, of which only these are read."""
        return Prompted(self.model, tokens, self.tokenizer, self, self.table)

    def caches(self, contender: Contender) -> list[Any]:
        """Caches that have seen the prompt, one for each layer of the model; new ones at each call.

        What follows the prompt is decoding to them, in blocks as well.

        Raises:
            ValueError: the budget is too small for this contender, or it does not work in this way.
        """
        if contender.streaming:
            caches = replace_caches(make_prompt_cache(self.model), self._streaming(contender))
            read(self.model, caches, self.tokens)
        else:
            caches = replace_caches(fork(self._recording.others), self._exact(contender))
        for cache in zero_merge(caches):
            decoding(cache)
        return caches

    def _exact(self, contender: Contender) -> Callable[[int], Any]:
        """The i-th full-attention layer's cache, compressed from the recorded prompt."""
        if contender.method == "full":
            return lambda i: full(self.layers[i].rows)
        if contender.method == "rotating":
            rows = window_rows(self.shapes, self._room(contender))
            return lambda i: Window(self.layers[i].rows, rows)
        if contender.method == "quantized":
            numbers = Quantization.within(self.shapes, contender.budget)
            return lambda i: numbers.of(self.layers[i].rows)
        sources = self._sources(self._policy(contender))
        layouts = fitted(sources, self._layouts(contender))
        if total_bytes(layouts, self.shapes) > self._room(contender):
            raise ValueError("layers differ in what a row takes: rows cannot be moved between them at equal bytes")
        return lambda i: compressed(sources[i], layouts[i])

    def _streaming(self, contender: Contender) -> Callable[[int], Any]:
        """The i-th full-attention layer's cache, empty."""
        if contender.method == "full":
            return lambda _: None
        if contender.method == "rotating":
            rows = window_rows(self.shapes, self._room(contender))
            return lambda _: RotatingKVCache(rows, keep=ROTATING_KEEP)
        if contender.method == "quantized":
            numbers = Quantization.within(self.shapes, contender.budget)
            return lambda _: QuantizedKVCache(numbers.group, numbers.bits)
        policy = self._policy(contender)
        if policy.needs:
            raise ValueError(f"{contender.name} does not work: {contender.method} needs {policy.needs}")
        layouts = self._layouts(contender)
        known = self._turns if policy.replays else [None] * len(layouts)
        return lambda i: ZeroMergeCache(layouts[i], policy=policy, turn=known[i])

    def _room(self, contender: Contender) -> int:
        return contender.room(self.shapes, len(self))

    def _policy(self, contender: Contender) -> Policy:
        """The contender's, with codes that suit the model."""
        return (contender.settings or Policy()).coded_for([d for s in self.shapes for d in s.dims])

    def _layouts(self, contender: Contender) -> tuple[Layout, ...]:
        """As many rows as the budget's bytes hold, before anything is known of the prompt.

        What codes save is counted beside numbers of 16 bits, in which models are stored, also where these are float32.
        """
        policy, shapes = self._policy(contender), self.shapes
        if contender.bits is not None:
            shapes = [replace(s, itemsize=min(2, s.itemsize)) for s in shapes]
        rows = rows_of(policy, shapes, contender.room(shapes, len(self)))
        uniform = policy.layouts(rows, [s.heads for s in self.shapes])
        if self.table is None or not contender.shares:
            return uniform
        return self.table.layouts(uniform, self.shapes, len(self))

    def _sources(self, policy: Policy) -> list[Source]:
        """What the layers' caches are made of, with what only the model can tell of this prompt."""
        asked = policy.window, policy.decay
        if asked not in self._scores:
            self._scores[asked] = [scored(x, policy) for x in self.layers]
        sources = [Source(*x, policy) for x in zip(self.layers, self._scores[asked], strict=True)]
        if isinstance(policy, ExpectedAttention):
            queries = zip(sources, self._queries, strict=True)
            return [s._replace(policy=replace(policy, queries=q)) for s, q in queries]
        if policy.replays:
            return [s._replace(reading=r) for s, r in zip(sources, self._replayed, strict=True)]
        if isinstance(policy, KVzip):
            return [s._replace(reading=r) for s, r in zip(sources, self._repeated, strict=True)]
        return sources

    @cached_property
    def _turns(self) -> list[mx.array | None]:
        """What moves each layer's queries behind a piece."""
        return turns(self.model, self.shapes, PIECE)

    @cached_property
    def _replayed(self) -> list[mx.array | None]:
        """Each layer's importance to the prompt's own queries."""
        policy, pairs = ZeroMerge(), zip(self.layers, self._turns, strict=True)
        return [None if turn is None else replayed(x, policy, turn) for x, turn in pairs]

    @cached_property
    def _queries(self) -> list[Queries]:
        """The distribution of each layer's queries."""
        rotations = expected.rotations(self.model, self._recording.others)
        return [expected.distribution(x, rotate) for x, rotate in zip(self.layers, rotations, strict=True)]

    @cached_property
    def _repeated(self) -> list[mx.array]:
        """Each layer's importance while the model repeats the prompt."""
        if self.tokenizer is None:
            raise ValueError("kvzip asks the model to repeat the prompt: give Prompted the tokenizer")
        return kvzip.reconstruct(self.model, self.tokenizer, self.tokens, self._recording)


def decoding(cache: ZeroMergeCache) -> None:
    """End the prompt: blocks that follow must not pass for parts of one, which are held above the cap."""
    cache.finish_prompt()
    cache.operations = replace(cache.operations, turn=None)


def fork(caches: list[Any]) -> list[Any]:
    """Caches that go on from here independently; rows are shared until one of both is written."""
    return copy.deepcopy(caches)


def continue_(model: nn.Module, caches: list[Any], tokens: Sequence[int] | mx.array) -> mx.array:
    """Logits [n, V] float32 after each of n tokens, which the caches take.

    Tokens go in one block (of no more than ``STEP``), which gives the same as one after the other for all
    caches but mlx-lm's rotating one with first tokens: in longer calls it masks these.

    Raises:
        ValueError: no tokens.
    """
    tokens = as_array(tokens)
    if not tokens.size:
        raise ValueError("there is nothing to continue with")
    one_by_one = any(isinstance(c, RotatingKVCache) and c.keep for c in members(caches))
    step = 1 if one_by_one else STEP
    logits: list[mx.array] = []
    for begin in range(0, tokens.size, step):
        logits.append(model(tokens[None, begin : begin + step], cache=caches)[0].astype(mx.float32))
        mx.eval(logits[-1])
        evaluate(caches)
    return mx.concatenate(logits, axis=0)


def as_array(tokens: Sequence[int] | mx.array) -> mx.array:
    """Tokens [n]."""
    return tokens.reshape(-1) if isinstance(tokens, mx.array) else mx.array(list(tokens))
