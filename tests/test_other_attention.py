"""Attention that does not go through mlx-lm's function as it is: soft caps, latent rows, shared rows, own formulas."""

import copy

import mlx.core as mx
import mlx.nn as nn
import model_configs
import numpy as np
import pytest
from architectures import OTHERS, VOCAB, build
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache
from states import random_queries, random_state
from test_attention import head_of
from tiny import f64, feed, held, prompt

import zm_mlx
from zm_mlx.evaluation.recording import Recorder
from zm_mlx.host.hook import replace_caches
from zm_mlx.host.latent import is_latent
from zm_mlx.host.model_caches import zero_merge
from zm_mlx.ops.plain import attention, half, uncompressed
from zm_mlx.ops.remembering import Remembering
from zm_mlx.policies import Policy
from zm_mlx.state.layout import Layout
from zm_mlx.state.state import Call

TOLERANCE = 1e-4  # relative, float32
PROMPT, STEPS, ROWS = 70, 4, 40
ONE_BY_ONE = ("olmo",)  # mlx-lm's own cannot take more than one token


def difference(found: mx.array, expected: mx.array) -> float:
    return (abs(found - expected).max() / abs(expected).max()).item()


class Held:
    """The rows that a ZeroMerge cache holds, for one call of mlx-lm's own attention."""

    def __init__(self, cache: zm_mlx.ZeroMergeCache, latent: bool) -> None:
        heads = [held(cache, h) for h in range(cache.layout.heads)]
        weights = [x.weight.tolist() for x in heads]
        assert {w for x in weights for w in x} <= {0, 1}, "mlx-lm's attention knows no merged rows"
        rows = [mx.array([i for i, w in enumerate(x) if w]) for x in weights]
        keys, values = (mx.stack([x[i][j] for x, j in zip(heads, rows, strict=True)])[None] for i in (0, 1))
        rotated = keys.shape[-1] - values.shape[-1]
        self.rows = (values, keys[..., :rotated]) if latent else (keys, values)
        self.count, self.offset = keys.shape[2], cache.offset

    def update_and_fetch(self, *new: mx.array) -> tuple[mx.array, ...]:
        self.rows = tuple(mx.concatenate(pair, axis=2) for pair in zip(self.rows, new, strict=True))
        self.offset += new[0].shape[2]
        return self.rows

    def keys_and_values(self) -> tuple[mx.array, ...]:
        return self.rows

    def make_mask(self, length: int, **_: object) -> mx.array | None:
        columns = mx.arange(self.count + length)
        return None if length == 1 else columns <= mx.arange(self.count, self.count + length)[:, None]


def on_the_same_rows(model: nn.Module, caches: list) -> list:
    """For each of a model's caches one with the same rows, for mlx-lm's own attention."""
    latent = any(is_latent(m) for m in model.modules())

    def same(cache: object) -> object:
        if isinstance(cache, CacheList):
            return CacheList(*map(same, cache.caches))
        return Held(cache, latent) if isinstance(cache, zm_mlx.ZeroMergeCache) else copy.deepcopy(cache)

    return [same(c) for c in caches]


def run(name: str, caches: list, size: int) -> mx.array:
    """Logits of a prompt in chunks, then of one token after the other."""
    tokens = prompt(PROMPT + STEPS, vocab=VOCAB)
    first = feed(build(name), caches, tokens[:, :PROMPT], size)
    return mx.concatenate([first, feed(build(name), caches, tokens[:, PROMPT:], 1)], axis=1)


def full(name: str, size: int) -> mx.array:
    """With mlx-lm's own caches, in the same calls: in some of its models (plamo3) sliding windows depend on these."""
    return run(name, make_prompt_cache(build(name)), 1 if name in ONE_BY_ONE else size)


@pytest.mark.parametrize("size", [7, 64])
@pytest.mark.parametrize("name", OTHERS)
def test_logits_are_mlx_lms_while_nothing_was_evicted(name, size):
    check_within_the_budget(name, size)


@pytest.mark.parametrize("name", OTHERS)
def test_after_a_compaction_logits_are_mlx_lms_on_the_rows_that_are_held(name):
    check_after_a_compaction(name)


def check_within_the_budget(name: str, size: int) -> None:
    found = run(name, zm_mlx.make_prompt_cache(build(name), PROMPT + STEPS), size)
    assert difference(found, full(name, size)) < TOLERANCE


def check_after_a_compaction(name: str) -> None:
    """Decoding, and a chunk of a prompt that follows: the next turn of a conversation."""
    model, tokens = build(name), prompt(PROMPT + STEPS, vocab=VOCAB)
    caches = zm_mlx.make_prompt_cache(model, ROWS)
    feed(model, caches, tokens[:, :PROMPT], 64)
    feed(model, caches, tokens[:, PROMPT : PROMPT + 1])  # ends the prompt

    def step(new: mx.array) -> mx.array:
        expected = model(new, cache=on_the_same_rows(model, caches))
        found = model(new, cache=caches)
        assert difference(found, expected) < TOLERANCE
        return found

    last = [step(tokens[:, t : t + 1]) for t in range(PROMPT + 1, PROMPT + STEPS)][-1]
    assert all(c.size() <= ROWS < c.offset for c in zero_merge(caches))
    assert difference(last, full(name, 64)[:, -1:]) > 10 * TOLERANCE, "nothing was compressed"
    # Where no piece of a prompt is held (the model's rotation is not known), a compaction may come within the chunk.
    while any(c.layout.staging - c.layer.since_compaction < 4 for c in zero_merge(caches)):
        step(tokens[:, :1])
    if name not in ONE_BY_ONE:
        step(prompt(4, seed=1, vocab=VOCAB))


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3", "gemma4_text", "gemma3n"])
def test_chunks_of_a_prompt_change_nothing_while_it_is_compressed(name, prefill):
    how = {"policy": Policy(), "prefill": prefill, "prompt_length": PROMPT}
    in_7, in_64 = (run(name, zm_mlx.make_prompt_cache(build(name), ROWS, **how), size) for size in (7, 64))
    assert difference(in_7, in_64) < TOLERANCE


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3", "gemma4_text", "gemma3n"])
def test_a_row_of_a_ragged_batch_is_what_it_is_alone(name):
    model, lengths, padding = build(name), (50, 33), (0, 1)
    tokens = [prompt(n + STEPS, seed, vocab=VOCAB) for seed, n in enumerate(lengths)]
    alone, batched = [], []
    for x, n, missing in zip(tokens, lengths, padding, strict=True):
        caches = zm_mlx.make_prompt_cache(model, ROWS)
        feed(model, caches, x[:, :n], 64)
        batched.append(copy.deepcopy(caches))
        alone.append(feed(model, caches, x[:, n : n + STEPS - missing]))
    # Their ends in one batch, padded at the right.
    caches = [rows[0].merge(rows) for rows in zip(*batched, strict=True)]
    ends = mx.concatenate([x[:, n:] for x, n in zip(tokens, lengths, strict=True)])
    for c in caches:
        c.prepare(lengths=[STEPS - n for n in padding], right_padding=list(padding))
    found = model(ends, cache=caches)
    for c in caches:
        c.finalize()
    for i, expected in enumerate(alone):
        assert difference(found[i : i + 1, : expected.shape[1]], expected) < TOLERANCE


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n"])
def test_nothing_is_kept_for_later_layers_once_they_have_asked(name):
    """What a compaction replaced would stay in memory, in copies of the cache too."""
    model, tokens = build(name), prompt(PROMPT + 9, vocab=VOCAB)
    caches = zm_mlx.make_prompt_cache(model, ROWS)
    for size, part in ((32, tokens[:, :PROMPT]), (1, tokens[:, PROMPT:])):
        feed(model, caches, part, size)
        remembering = [c.operations for c in zero_merge(caches) if isinstance(c.operations, Remembering)]
        assert remembering and not any(x.heard or x.before for x in remembering)


def test_quantised_projections_of_latent_rows_have_equal_logits(monkeypatch):
    sizes = {
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "moe_intermediate_size": 64,
    }
    monkeypatch.setitem(model_configs.OVERRIDES, "deepseek_v3", {**sizes, "intermediate_size": 64})
    model, tokens = model_configs.architecture("deepseek_v3"), prompt(30, vocab=VOCAB)
    nn.quantize(model, 32, 4)
    assert type(model.layers[0].self_attn.embed_q).__name__ == "QuantizedMultiLinear"
    found = feed(model, zm_mlx.make_prompt_cache(model, 64), tokens, 7)
    assert difference(found, feed(model, make_prompt_cache(model), tokens, 7)) < TOLERANCE


def test_a_module_keeps_its_own_attention_with_other_caches():
    model, tokens = build("gemma2"), prompt(9, vocab=VOCAB)
    expected = feed(model, make_prompt_cache(model), tokens)
    zm_mlx.make_prompt_cache(model, 64)
    assert mx.array_equal(feed(model, make_prompt_cache(model), tokens), expected)


@pytest.mark.parametrize("name", ["llama_gqa", "deepseek_v3", "gemma4_text"])
def test_the_full_cache_that_a_printout_compares_with_is_mlx_lms(name):
    """Latent attention keeps fewer numbers of a token in mlx-lm's cache than in a row."""
    model, own = build(name), make_prompt_cache(build(name))
    feed(model, own, prompt(7, vocab=VOCAB))
    full = sum(x[:, :, :7].nbytes for c in own if type(c) is KVCache for x in (c.keys, c.values))
    assert zm_mlx.plan_cache(model, 64).own_bytes(7) == full


# ---- the soft cap


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("departed", [0, 4, 30])
def test_capped_attention_is_its_formula(departed, length):
    """Also of merged rows, whose weight and spread are added to the capped score."""
    layout, policy, cap, scale = Layout(2, (5, 5), 6, 6), Policy(), 1.5, 0.7
    state = random_state(layout, departed=departed, filled=9)
    call = Call(random_queries(layout, length, 3, 8, mx.float32), scale, cap=cap)
    found = [operation(call, state, layout, policy)[0] for operation in (attention.attend, half.attend)]
    if not departed:
        found.append(uncompressed.attend(call, state))
    for b, h in np.ndindex(2, layout.heads):
        keys, values, weight, spread, old = head_of(layout, state, b, h)
        for g, i in np.ndindex(3, length):
            q = f64(call.queries)[b, 3 * h + g, i] * scale
            logits = cap * np.tanh(keys @ q / cap) + policy.alpha * np.log(weight)
            logits += np.minimum(policy.kappa, spread * (q @ q) / 2)
            logits[old + 9 - length + 1 + i :] = -np.inf
            p = np.exp(logits - logits.max())
            for out in found:
                np.testing.assert_allclose(f64(out)[b, 3 * h + g, i], p @ values / p.sum(), atol=2e-5)


def test_a_prompt_that_is_saved_in_its_middle_keeps_its_cap():
    model, tokens = build("gemma2"), prompt(60, vocab=VOCAB)
    caches = zm_mlx.make_prompt_cache(model, ROWS, prefill="exact", prompt_length=60)
    feed(model, caches, tokens[:, :30])
    again = [zm_mlx.ZeroMergeCache.from_state(c.state) for c in caches]
    assert again[0].phase.cap == caches[0].phase.cap == model.model.layers[0].self_attn.attn_logit_softcapping
    assert difference(feed(model, again, tokens[:, 30:]), feed(model, caches, tokens[:, 30:])) < 1e-6


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3", "gemma4_text", "gemma3n"])
def test_the_evaluation_records_a_prompt_without_changing_its_logits(name):
    model, tokens = build(name), prompt(40, vocab=VOCAB)
    heads = [s.heads for s in zm_mlx.plan_cache(model, 64).shapes]
    caches = replace_caches(make_prompt_cache(model), lambda i: Recorder(heads[i], 40))
    assert difference(feed(model, caches, tokens, 16), feed(model, make_prompt_cache(model), tokens, 16)) < TOLERANCE
