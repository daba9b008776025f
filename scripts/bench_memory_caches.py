"""The caches of the memory benchmark by name: what each should hold, how one is made, how one is filled.

A name is a family and what it needs, in the words of ``--kv-budget``: ``full``, ``quantized:8``,
``rotating:0.05``, ``rotating:2048``, ``zeromerge:0.05``, ``veloxquant:h2o`` (with DEFAULT_ROWS) or
``veloxquant:h2o:0.05``. A fraction is one of the context.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

from zm_mlx.budget import Budget, LayerShape, layout, resolve
from zm_mlx.cache import Prefill, ZeroMergeCache
from zm_mlx.generate import ROTATING_KEEP
from zm_mlx.hook import replace_caches
from zm_mlx.plan import plan_cache
from zm_mlx.policy import Policy
from zm_mlx.stores import Kept, Recent

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

    def rows(self, shapes: Sequence[LayerShape], context: int) -> int:
        """N, rows per head, of a cache with a budget."""
        return resolve(self.budget, shapes, Policy(), prompt_tokens=context).rows

    def holds(self, shapes: Sequence[LayerShape], context: int, decoded: int) -> int:
        """Bytes of the cache at ``context`` tokens, the last ``decoded`` of which came one by one."""
        stepped = _stepped(context)
        match self.family:
            case "full":
                return sum(stepped * s.token_bytes for s in shapes)
            case "quantized":
                return sum(stepped * _quantized_token_bytes(s, self.bits) for s in shapes)
        rows = self.rows(shapes, context)
        if self.family == "zeromerge":
            layouts = [layout(rows, s, Policy()) for s in shapes]
            return sum(a.nbytes(s.head_dim, s.value_dim, s.itemsize) for a, s in zip(layouts, shapes, strict=True))
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
        whole = self.family == "zeromerge" and prefill == "exact"
        incoming = sum((prompt if whole else min(step, prompt)) * s.token_bytes for s in shapes)
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
        if self.family == "zeromerge":
            caches = plan_cache(model, self.budget, prompt_length=context, prefill=prefill).caches(model)
            return Made(caches, [c for c in _flat(caches) if isinstance(c, ZeroMergeCache)])
        if self.family == "veloxquant":
            caches = self._veloxquant(model, self.rows(shapes, context))
            return Made(caches, [c for c in caches if type(c).__module__.startswith("veloxquant_mlx")])
        compared: list[Any] = []

        def layer(i: int) -> Any:
            if self.family == "quantized":
                compared.append(QuantizedKVCache(_group(shapes[i]), self.bits))
            elif self.family == "rotating":
                compared.append(RotatingKVCache(self.rows(shapes, context), keep=ROTATING_KEEP))
            else:
                compared.append(KVCache())
            return compared[-1]

        return Made(replace_caches(make_prompt_cache(model), layer), compared)

    def _veloxquant(self, model: nn.Module, rows: int) -> list[Any]:
        from veloxquant_mlx import KVCacheBuilder, KVCacheConfig

        config = KVCacheConfig(method=self.method, **{VELOXQUANT[self.method]: rows})
        return list(KVCacheBuilder.for_model(model, config))

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


def phase(cache: Any) -> int:
    """A number that changes when a cache does what it does not do at every token: grow, or compact."""
    return int(cache.left if isinstance(cache, ZeroMergeCache) else cache.nbytes)


def stream(cache: ZeroMergeCache, shape: LayerShape, tokens: int) -> None:
    """Put an empty cache into the state that streaming ``tokens`` tokens leaves, with random rows.

    Rows, weights, positions and the count to the next compaction are those of a cache that really
    saw the tokens (a test compares them); which tokens are kept, and all keys and values, are not.
    """
    regions, width = layout(cache.table, shape, cache.policy), (shape.head_dim, shape.value_dim)
    staged = (tokens - regions.capacity) % regions.staging
    left = max(0, tokens - staged - regions.proximity)
    live = tokens - left
    keys, values = _random_rows(shape, regions.recent)
    recent = Recent(keys, values, _scores(shape.heads, regions.recent, live))
    kept = Kept.empty(1, regions, *width, keys.dtype)
    residual, context = regions.residual, regions.context[0]
    if left <= residual + context:
        weights = [1.0] * left + [0.0] * (residual + context - left)
        positions = [i if i < left else -1 for i in range(residual + context)]
        merged: tuple[mx.array, ...] = kept[5:]
        keys, values = _random_rows(shape, residual + context)
    else:
        share, more = divmod(left - context, max(1, residual))
        counts = [float(share + (i < more)) for i in range(residual)]
        weights = counts + [1.0] * context
        positions = [-1] * residual + [i * left // context for i in range(context)]
        # The mean of w random rows has 1/√w of their length; the rest is the variance behind it.
        count = mx.array(counts)[:, None]
        means = [mx.random.normal((1, shape.heads, residual, d)) / mx.sqrt(mx.maximum(count, 1)) for d in width]
        spread = mx.broadcast_to(1 - 1 / mx.maximum(count[:, 0], 1), kept.spread.shape)
        squares = count[:, 0] * ((means[0] ** 2).sum(axis=-1) + shape.head_dim * spread)
        merged = (spread, *(count * x for x in means), squares)
        raw = _random_rows(shape, context)
        keys, values = (mx.concatenate([x.astype(y.dtype), y], axis=2) for x, y in zip(means, raw, strict=True))
    rows = [
        *(x.flatten(1, 2) for x in (keys, values)),
        mx.array(weights * shape.heads)[None],
        _scores(shape.heads, residual + context, min(left, residual + context)).flatten(1, 2),
        mx.array(positions * shape.heads, mx.int32)[None],
    ]
    *_, text = cache.state
    facts = json.dumps({**json.loads(str(text)), "left": left, "live": live, "staged": staged})
    cache.state = [*recent, *rows, *merged, None, None, facts]


def _scores(heads: int, rows: int, filled: int) -> mx.array:
    return mx.where(mx.arange(rows) < filled, mx.random.uniform(shape=(1, heads, rows)), 0.0)


def _random_rows(shape: LayerShape, rows: int) -> tuple[mx.array, mx.array]:
    sizes = [(1, shape.heads, rows, d) for d in (shape.head_dim, shape.value_dim)]
    keys, values = (mx.random.normal(s, _dtype(shape)) for s in sizes)
    return keys, values


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


def _flat(caches: Sequence[Any]) -> Iterator[Any]:
    for cache in caches:
        yield from _flat(cache.caches) if hasattr(cache, "caches") else (cache,)
