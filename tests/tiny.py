"""Tiny random inputs and models for the tests, and how to compare caches; the seed decides everything."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import twin
from mlx_lm.models import llama

from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.policies import Policy
from zm_mlx.state.layout import Layout
from zm_mlx.state.state import State

TOLERANCE = {mx.float32: 2e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}


def model(
    seed: int = 0,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = 96,
    context: int = 4096,
    dtype: mx.Dtype = mx.float32,
) -> llama.Model:
    """A random llama whose attention is peaked enough that lost rows change its tokens."""
    mx.random.seed(seed)
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=2 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        vocab_size=vocab,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    made = llama.Model(args)
    for layer in made.model.layers:
        layer.self_attn.q_proj.weight = 3 * layer.self_attn.q_proj.weight
        layer.self_attn.o_proj.weight = 3 * layer.self_attn.o_proj.weight
    made.set_dtype(dtype)
    mx.eval(made.parameters())
    return made


def prompt(length: int, seed: int = 0, batch: int = 1, vocab: int = 96) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, vocab, (batch, length)))


def chunks(length: int, size: int) -> Iterable[slice]:
    for begin in range(0, length, size):
        yield slice(begin, min(begin + size, length))


def feed(made: llama.Model, caches: list, tokens: mx.array, size: int = 10**9) -> mx.array:
    """Logits of all tokens, given in chunks."""
    logits = []
    for c in chunks(tokens.shape[1], size):
        logits.append(made(tokens[:, c], cache=caches))
        mx.eval(logits, [x.state for x in caches])
    return mx.concatenate(logits, axis=1)


def greedy(made: llama.Model, caches: list, tokens: mx.array, count: int, size: int = 10**9):
    """Greedy tokens [B, count] after a prompt given in chunks, and their logits [B, count, vocab]."""
    logits = [feed(made, caches, tokens, size)[:, -1:]]
    found = [logits[0].argmax(-1)]
    for _ in range(count - 1):
        logits.append(made(found[-1], cache=caches))
        found.append(logits[-1].argmax(-1))
        mx.eval(found[-1])
    return np.array(mx.concatenate(found, axis=1)), f64(mx.concatenate(logits, axis=1))


def f64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def tokens(
    seed: int,
    length: int,
    *,
    batch: int = 1,
    heads: int = 2,
    groups: int = 2,
    dim: int = 8,
    value_dim: int | None = None,
    dtype: mx.Dtype = mx.float32,
    sharp: float = 2.0,
) -> tuple[mx.array, mx.array, mx.array]:
    """Random queries [B, H * G, T, D], keys [B, H, T, D] and values [B, H, T, Dv] of a layer."""
    rng = np.random.default_rng(seed)
    q = sharp * rng.standard_normal((batch, heads * groups, length, dim))
    k = rng.standard_normal((batch, heads, length, dim))
    v = rng.standard_normal((batch, heads, length, value_dim or dim))
    return tuple(mx.array(x.astype(np.float32)).astype(dtype) for x in (q, k, v))


def cache(rows: int | Sequence[int], heads: int = 2, policy: Policy | None = None, **more) -> ZeroMergeCache:
    """A cache of N rows per head, one number for all heads or one a head."""
    policy = policy or Policy()
    return ZeroMergeCache(policy.layout(rows, heads), policy=policy, **more)


def give(cache: ZeroMergeCache, q: mx.array, k: mx.array, v: mx.array, size: int = 10**9, **more) -> mx.array:
    """Outputs of a cache for tokens given in chunks of ``size``, or of the sizes in a list."""
    length = q.shape[2]
    if isinstance(size, int):
        cuts = list(chunks(length, size))
    else:
        ends = np.minimum(np.cumsum(size), length)
        cuts = [slice(int(a), int(b)) for a, b in zip([0, *ends], [*ends, length], strict=True) if b > a]
    outputs = []
    for c in cuts:
        keys, values = cache.update_and_fetch(k[:, :, c], v[:, :, c])
        outputs.append(cache.attend(q[:, :, c], keys, values, q.shape[-1] ** -0.5, **more))
        mx.eval(outputs, [x for x in cache.state if isinstance(x, mx.array)])
    return mx.concatenate(outputs, axis=2)


def rounding(dtype: mx.Dtype):
    """Float64 to the nearest number of ``dtype``, in float64 (float32: left alone)."""
    if dtype == mx.float32:
        return np.asarray
    return lambda x: f64(mx.array(np.asarray(x, np.float32)).astype(dtype))


def twin_of(cache: ZeroMergeCache, **more) -> twin.Cache:
    """A float64 twin with the regions and settings of a cache that has seen tokens."""
    a, p = cache.layout, cache.policy
    how = {"alpha": p.alpha, "kappa": p.kappa, "decay": p.decay, "pool": p.pool, "window": p.window}
    return twin.Cache(a.residual, a.context, a.proximity, a.staging, **{**how, **more})


class Rows(NamedTuple):
    """Filled rows of one head: keys [n, D], values [n, Dv], weight [n], score [n], position [n] (-1 if merged)."""

    keys: mx.array
    values: mx.array
    weight: mx.array
    score: mx.array
    position: mx.array


def rows_of(state: State, layout: Layout, head: int, batch: int = 0) -> Rows:
    """The filled rows of one of the model's heads: kept rows, then recent ones."""
    stored, filled = layout.order.index(head), state.filled
    begin, end = layout.starts[stored : stored + 2]
    rows = slice(begin, min(end, begin + state.departed))
    kept = (*state.kept.rows, state.kept.weight, state.scores.kept, state.kept.position)
    keys, values, score = (x[batch, stored, :filled] for x in (*state.recent, state.scores.recent))
    position = mx.arange(state.departed, state.departed + filled, dtype=mx.int32)
    pairs = zip(kept, (keys, values, mx.ones((filled,)), score, position), strict=True)
    return Rows(*[mx.concatenate([x[batch, rows], y]) for x, y in pairs])


def held(cache: ZeroMergeCache, head: int, batch: int = 0) -> Rows:
    """The filled rows of one of the model's heads in a cache that has seen tokens."""
    return rows_of(cache.layer, cache.layout, head, batch)


def assert_equals_twin(cache: ZeroMergeCache, made: list[twin.Cache]) -> None:
    """Rows, their order, weights, positions, scores and spreads of every head equal the twin's."""
    for b, sequence in enumerate(made):
        assert cache.offset == sequence.seen
        for h, head in enumerate(sequence.heads):
            found = held(cache, h, b)
            keys, values, weight, spread = head.arrays()
            assert found.weight.tolist() == weight.tolist()
            assert found.position.tolist() == [-1] * len(head.merged) + [r.tokens[0] for r in head.raw]
            np.testing.assert_allclose(f64(found.keys), keys, atol=2e-5)
            np.testing.assert_allclose(f64(found.values), values, atol=2e-5)
            np.testing.assert_allclose(f64(found.score), [r.score for r in head.rows], atol=2e-4, rtol=2e-4)
            if head.merged:
                residual = f64(cache.layer.residuals.spread[b, cache.layout.order.index(h)])
                np.testing.assert_allclose(residual, spread[: len(head.merged)], rtol=1e-3, atol=1e-5)


def state_of(cache: ZeroMergeCache, b: slice = slice(None)) -> list[np.ndarray]:
    """The filled part of all arrays of some sequences."""
    state = cache.layer
    recent = [x[b, :, : state.filled] for x in (*state.recent, state.scores.recent)]
    kept = (*state.kept.rows, *state.kept[1:], state.scores.kept, *state.residuals)
    return [f64(x) for x in (*recent, *(x[b] for x in kept))]


def assert_same_state(a: ZeroMergeCache, b: ZeroMergeCache, which: slice = slice(None)) -> None:
    """``a`` equals the sequences ``which`` of ``b``, up to float32 rounding; in their readings if both have them."""
    for clock in ("departed", "filled", "since_compaction"):
        assert getattr(a.layer, clock) == getattr(b.layer, clock), clock
    for x, y in zip(state_of(a), state_of(b, which), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4, rtol=2e-4)
    if a.layer.reads and b.layer.reads:
        filled = slice(0, a.layer.filled)
        readings = [(x.kept, x.recent[:, :, filled]) for x in (a.layer.reading, b.layer.reading)]
        for x, y in zip(*readings, strict=True):
            np.testing.assert_allclose(f64(x), f64(y[which]), atol=2e-4, rtol=2e-4)
