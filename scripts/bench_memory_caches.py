"""The caches of the memory benchmark by name: what each should hold, how one is made, how one is filled.

A name is a family and what it needs, in the words of ``--kv-budget``: ``full``, ``quantized:8``,
``rotating:0.05``, ``rotating:2048``, ``zeromerge:0.05``, ``veloxquant:h2o`` (with DEFAULT_ROWS) or
``veloxquant:h2o:0.05``. A fraction is one of the context.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from zm_mlx.budget import Budget, Request, resolve, total_bytes
from zm_mlx.host import caches
from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.host.plan import plan_cache
from zm_mlx.phases import PIECE, Prefill
from zm_mlx.policies import ZeroMerge
from zm_mlx.state.layout import LayerShape, Layout
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Kept, Residuals, Scores, State

FORMS = "full, quantized:BITS, rotating:N, zeromerge:N, veloxquant:h2o[:N] or veloxquant:snapkv[:N]"
BITS = (8, 6, 4, 3, 2)  # what mlx quantises to
GROUPS = (64, 32)  # elements that share a scale; 64 is mlx-lm's default, 32 for head dims that 64 does not divide
VELOXQUANT = {"h2o": "h2o_budget", "snapkv": "snap_budget"}  # method, and the setting that holds its rows
DEFAULT_ROWS = "2048"
FILL_CHUNK = 2048
NO_BUDGET = Budget("rows", 0)


class Made(NamedTuple):
    """One cache per layer of a model, and those of its full-attention layers, which are the ones compared."""

    caches: list[Any]
    compared: list[Any]


@dataclass(frozen=True)
class Cache:
    """A cache by name. ``str(cache)`` is the name."""

    name: str
    family: str
    bits: int = 0
    method: str = ""
    budget: Budget = NO_BUDGET

    @classmethod
    def parse(cls, name: str) -> "Cache":
        """Read a name.

        Raises:
            ValueError: it is none, or VeloxQuant-MLX is not installed; the message names the remedy.
        """
        family, _, rest = name.partition(":")
        if name == "full":
            return cls(name, family)
        if family == "quantized" and rest.isdigit() and int(rest) in BITS:
            return cls(name, family, bits=int(rest))
        if family in ("rotating", "zeromerge") and rest:
            return cls(name, family, budget=_rows_or_fraction(rest))
        method, _, rest = rest.partition(":")
        if family == "veloxquant" and method in VELOXQUANT:
            if not has_veloxquant():
                raise ValueError("VeloxQuant-MLX is not installed: pip install VeloxQuant-MLX, or leave it out")
            return cls(name, family, method=method, budget=_rows_or_fraction(rest or DEFAULT_ROWS))
        raise ValueError(f"not a cache; the forms are {FORMS}, N a fraction (0.05) or rows (2048), BITS one of {BITS}")

    def __str__(self) -> str:
        return self.name

    # ---- what it should hold

    def layouts(self, shapes: Sequence[LayerShape], context: int) -> tuple[Layout, ...]:
        """What a budget means for ZeroMerge; other caches get as many rows."""
        return resolve(self.budget, shapes, ZeroMerge(), Request(prompt_tokens=context)).layouts

    def rows(self, shapes: Sequence[LayerShape], context: int) -> int:
        """N, rows per head, of a cache with a budget."""
        return self.layouts(shapes, context)[0].capacity

    def holds(self, shapes: Sequence[LayerShape], context: int, decoded: int) -> int:
        """Bytes of the cache at ``context`` tokens, the last ``decoded`` of which came one by one."""
        stepped = _stepped(context)
        match self.family:
            case "full":
                return sum(stepped * s.token_bytes for s in shapes)
            case "quantized":
                return sum(stepped * _quantized_token_bytes(s, self.bits) for s in shapes)
            case "zeromerge":
                return total_bytes(self.layouts(shapes, context), shapes)
        rows = self.rows(shapes, context)
        if self.family == "rotating":
            return sum(min(rows, stepped) * s.token_bytes for s in shapes)
        held = min(rows, context)
        if self.method == "snapkv":  # it cuts the prompt only: what is decoded comes on top
            held = min(rows, context - decoded) + _stepped(decoded)
        return sum(held * s.token_bytes // s.itemsize * _veloxquant_dtype(s).size for s in shapes)

    def prefill_holds(self, shapes: Sequence[LayerShape], prompt: int, step: int, prefill: Prefill) -> int:
        """Bytes at the worst moment of a prefill, without activations."""
        if self.family in ("full", "quantized"):
            return self.holds(shapes, prompt, 0)
        tokens = min(step, prompt)
        if self.family == "zeromerge":  # the whole prompt, or a piece of it beside what comes
            tokens = prompt if prefill == "exact" else tokens + PIECE
        incoming = sum(tokens * s.token_bytes for s in shapes)
        return self.holds(shapes, prompt, 0) + incoming

    @property
    def period(self) -> int:
        """Tokens between two growths of mlx-lm's buffer at most; 0 where it does not grow (ZeroMerge says its own)."""
        return KVCache.step if self.family in ("full", "quantized") or self.method == "snapkv" else 0

    # ---- the objects

    def make(
        self, model: nn.Module, shapes: Sequence[LayerShape], context: int, prefill: Prefill = "streaming"
    ) -> Made:
        """Empty caches for a prompt of ``context`` tokens."""
        match self.family:
            case "zeromerge":
                plan = plan_cache(model, self.budget, prompt_length=context, prefill=prefill, head_rows=None)
                made = caches.zeromerge(model, plan)
            case "full":
                made = caches.full(model)
            case "quantized":
                made = caches.quantized(model, self.bits, [_group(s) for s in shapes])
            case "rotating":
                made = caches.rotating(model, [self.rows(shapes, context)] * len(shapes))
            case _:
                return self._veloxquant(model, self.rows(shapes, context))
        return Made(made.every, made.growing)

    def _veloxquant(self, model: nn.Module, rows: int) -> Made:
        from veloxquant_mlx import KVCacheBuilder, KVCacheConfig

        config = KVCacheConfig(method=self.method, **{VELOXQUANT[self.method]: rows})
        every = list(KVCacheBuilder.for_model(model, config))
        return Made(every, [c for c in every if type(c).__module__.startswith("veloxquant_mlx")])

    def filled(self, model: nn.Module, shapes: Sequence[LayerShape], context: int, tokens: int, seed: int) -> Made:
        """Caches for ``context`` tokens that have seen ``tokens``, with seeded random keys and values."""
        mx.random.seed(seed)
        made = self.make(model, shapes, context)
        rows = self.rows(shapes, context) if self.budget.value else tokens
        for cache, shape in zip(made.compared, shapes, strict=True):  # one by one, or all temporaries exist at once
            self._fill(cache, shape, tokens, rows)
            mx.eval(cache.state)
        mx.clear_cache()
        return made

    def _fill(self, cache: Any, shape: LayerShape, tokens: int, rows: int) -> None:
        if self.family == "zeromerge":
            stream(cache, shape, tokens)
        elif self.family == "full":
            cache.state = (*_random_rows(shape, _stepped(tokens)), tokens)
        elif self.family == "quantized":
            group, random = _group(shape), _random_rows(shape, _stepped(tokens))
            packed = [mx.quantize(x, group_size=group, bits=self.bits) for x in random]
            cache.state = (*packed, tokens, group, self.bits)
        elif self.family == "rotating":
            filled = _random_rows(shape, min(rows, _stepped(tokens)))
            cache.state = (*filled, tokens, cache.keep, rows, min(tokens, rows))
        elif self.method == "h2o":  # it evicts token by token, so that filling it through its update takes n · N
            filled = _random_rows(shape, min(rows, tokens))
            cache.state = tuple(x.astype(_veloxquant_dtype(shape)) for x in filled)
        else:
            for begin in range(0, tokens, FILL_CHUNK):
                cache.update_and_fetch(*_random_rows(shape, min(FILL_CHUNK, tokens - begin)))
                mx.eval(cache.state)


def has_veloxquant() -> bool:
    """Whether VeloxQuant-MLX can be imported."""
    return find_spec("veloxquant_mlx") is not None


def epoch(cache: Any) -> int:
    """A number that changes when a cache does what it does not do at every token: grow, or compact."""
    if isinstance(cache, ZeroMergeCache):
        return cache.layer.departed if cache.layer else 0
    return int(cache.nbytes)


def stream(cache: ZeroMergeCache, shape: LayerShape, tokens: int) -> None:
    """Put an empty cache into the state that streaming ``tokens`` tokens leaves, with random rows."""
    cache.layer = streamed(cache.layout, shape, tokens)
    mx.eval(cache.layer.arrays())


def streamed(layout: Layout, shape: LayerShape, tokens: int) -> State:
    """What streaming ``tokens`` tokens leaves of them, in a layout with as many rows for each head.

    Rows, weights, positions and the count to the next compaction are those of a cache that really
    saw the tokens (a test compares them); which tokens are kept, and all keys and values, are not.
    """
    since_compaction = (tokens - layout.capacity) % layout.staging
    departed = max(0, tokens - since_compaction - layout.proximity)
    filled, rows = tokens - departed, layout.residual + layout.context[0]
    recent = _random_rows(shape, layout.recent)
    empty = State.empty(layout, recent, layout.recent)
    if departed <= rows:
        raw, residuals = _random_rows(shape, rows), empty.residuals
        weights = [1.0] * departed + [0.0] * (rows - departed)
        positions = [i if i < departed else -1 for i in range(rows)]
    else:
        raw, residuals, weights, positions = _merged(layout, shape, departed)
    scores = Scores(
        kept=_scores(shape.heads, rows, min(departed, rows)).flatten(1, 2),
        recent=_scores(shape.heads, layout.recent, filled),
    )
    kept = Kept(
        raw.map(lambda x: x.flatten(1, 2)),
        mx.array(weights * shape.heads)[None],
        mx.array(positions * shape.heads, mx.int32)[None],
    )
    return State(kept, residuals, recent, scores, empty.reading, departed, filled, since_compaction)


def _merged(layout: Layout, shape: LayerShape, departed: int) -> tuple[Dense, Residuals, list[float], list[int]]:
    """Kept rows once more tokens have departed than there are such rows.

    Returns:
        rows [1, H, rows] and the sums behind them; weights and positions of one head, the same for all.
    """
    residual, context = layout.residual, layout.context[0]
    share, more = divmod(departed - context, max(1, residual))
    counts = [float(share + (i < more)) for i in range(residual)]
    count, dims = mx.array(counts)[:, None], (shape.head_dim, shape.value_dim)
    # The mean of w random rows has 1/√w of their length; the rest is the variance behind it.
    means = Dense(*(mx.random.normal((1, shape.heads, residual, d)) / mx.sqrt(mx.maximum(count, 1)) for d in dims))
    spread = mx.broadcast_to(1 - 1 / mx.maximum(count[:, 0], 1), means.shape)
    squares = count[:, 0] * ((means.keys**2).sum(axis=-1) + shape.head_dim * spread)
    rows = means.zip(_random_rows(shape, context), lambda x, y: mx.concatenate([x.astype(y.dtype), y], axis=2))
    residuals = Residuals(spread, count * means.keys, count * means.values, squares)
    positions = [-1] * residual + [i * departed // context for i in range(context)]
    return rows, residuals, counts + [1.0] * context, positions


def _scores(heads: int, rows: int, filled: int) -> mx.array:
    return mx.where(mx.arange(rows) < filled, mx.random.uniform(shape=(1, heads, rows)), 0.0)


def _random_rows(shape: LayerShape, rows: int) -> Dense:
    sizes = [(1, shape.heads, rows, d) for d in (shape.head_dim, shape.value_dim)]
    return Dense(*(mx.random.normal(s, _dtype(shape)) for s in sizes))


def _dtype(shape: LayerShape) -> mx.Dtype:
    found: mx.Dtype = getattr(mx, shape.dtype.rpartition(".")[2])
    return found


def _veloxquant_dtype(shape: LayerShape) -> mx.Dtype:
    """VeloxQuant-MLX stores bfloat16 as it is and everything else as float16."""
    return mx.bfloat16 if _dtype(shape) == mx.bfloat16 else mx.float16


def _stepped(tokens: int) -> int:
    """Rows of mlx-lm's buffer, which grows in steps."""
    step: int = KVCache.step
    return math.ceil(tokens / step) * step


def _group(shape: LayerShape) -> int:
    for size in GROUPS:
        if shape.head_dim % size == 0 and shape.value_dim % size == 0:
            return size
    raise ValueError(f"head dims {shape.head_dim} and {shape.value_dim} cannot be quantised in groups of {GROUPS}")


def _quantized_token_bytes(shape: LayerShape, bits: int) -> int:
    """Packed elements, and a scale and a bias a group."""
    elements = shape.heads * (shape.head_dim + shape.value_dim)
    return elements * bits // 8 + 2 * shape.itemsize * elements // _group(shape)


def _rows_or_fraction(text: str) -> Budget:
    budget = Budget.parse(text)
    if budget.kind not in ("rows", "fraction"):
        raise ValueError(f"a budget of {text} does not compare caches: give a fraction (0.05) or rows (2048)")
    return budget
