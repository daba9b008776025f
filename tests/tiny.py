"""Tiny random inputs and models for the tests, and how to compare caches; the seed decides everything."""

from collections.abc import Iterable

import mlx.core as mx
import numpy as np
import twin
from mlx_lm.models import llama

from zm_mlx.cache import ZeroMergeCache

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


def assert_equals_twin(cache: ZeroMergeCache, made: list[twin.Cache]) -> None:
    """Rows, their order, weights, positions, scores and spreads of every head equal the twin's."""
    for b, sequence in enumerate(made):
        assert cache.offset == sequence.seen
        for h, head in enumerate(sequence.heads):
            held = cache.held(h, b)
            keys, values, weight, spread = head.arrays()
            assert held.weight.tolist() == weight.tolist()
            assert held.position.tolist() == [-1] * len(head.merged) + [r.tokens[0] for r in head.raw]
            np.testing.assert_allclose(f64(held.keys), keys, atol=2e-5)
            np.testing.assert_allclose(f64(held.values), values, atol=2e-5)
            np.testing.assert_allclose(f64(held.score), [r.score for r in head.rows], atol=2e-4, rtol=2e-4)
            if head.merged:
                found = f64(cache.kept.spread[b, cache.layout.order.index(h)])
                np.testing.assert_allclose(found, spread[: len(head.merged)], rtol=1e-3, atol=1e-5)


def state_of(cache: ZeroMergeCache, b: slice = slice(None)) -> list[np.ndarray]:
    """The live part of all arrays of some sequences."""
    recent = [x[b, :, : cache.live] for x in cache.recent]
    return [f64(x) for x in (*recent, *(x[b] for x in cache.kept))]


def assert_same_state(a: ZeroMergeCache, b: ZeroMergeCache, which: slice = slice(None)) -> None:
    """``a`` equals the sequences ``which`` of ``b``, up to float32 rounding."""
    assert (a.offset, a.left, a.live, a.staged) == (b.offset, b.left, b.live, b.staged)
    for x, y in zip(state_of(a), state_of(b, which), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4, rtol=2e-4)
