"""What must hold for every cache: any table of rows, batch, chunk sizes, number of query heads."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import assert_equals_twin, assert_same_state, f64, give, held, tokens, twin_of

from zm_mlx.policies import Policy
from zm_mlx.state.layout import LayerShape

few = settings(max_examples=25, deadline=None, derandomize=True)
TOO_CLOSE = 1e-4  # decisions nearer than this may differ between float32 and float64


@dataclass
class Case:
    """A small layer and the tokens for it; ``rows`` is one number or a table."""

    rows: int | list[int]
    policy: Policy
    batch: int
    groups: int
    heads: int
    length: int
    sizes: list[int]
    seed: int

    def tokens(self):
        return tokens(self.seed, self.length, batch=self.batch, heads=self.heads, groups=self.groups, value_dim=6)

    def cache(self, **more):
        return tiny.cache(self.rows, self.heads, policy=self.policy, **more)

    @property
    def table(self):
        return [self.rows] * self.heads if isinstance(self.rows, int) else self.rows


@st.composite
def cases(draw, residual=range(5), uniform=None):
    """Rows from the floor up; a table has a head with its floor and one with everything."""
    batch, groups, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    r = draw(st.sampled_from(residual))
    staging = draw(st.integers(1, 5))
    policy = Policy(
        residual=r,
        staging=staging,
        proximity=draw(st.sampled_from([0.1, 0.5, 0.8])),
        kappa=draw(st.sampled_from([0.0, 0.5, 3.0])),
        pool=draw(st.sampled_from([1, 3, 13])),
        decay=draw(st.sampled_from([0.9, 0.98, 1.0])),
        alpha=draw(st.sampled_from([0.6, 1.0])),
    )
    floor = r + staging + 1
    length = draw(st.integers(20, 60))
    rows = draw(st.integers(floor, floor + 15))
    if heads > 1 and not (draw(st.booleans()) if uniform is None else uniform):
        smallest = draw(st.sampled_from([floor, floor, floor + 3]))
        rows = draw(st.permutations([smallest, length + 5, max(rows, smallest)][:heads]))
    sizes = draw(st.lists(st.integers(1, 25), max_size=6))
    return Case(rows, policy, batch, groups, heads, length, sizes, draw(st.integers(0, 10**6)))


def twins(case, cache, q, k, v, prompt=None):
    """A twin for each sequence, run over the same tokens, and its outputs."""
    made, outputs = [twin_of(cache) for _ in range(case.batch)], []
    for b, sequence in enumerate(made):
        if prompt:
            sequence.begin_prompt(prompt)
        outputs.append(sequence.run(f64(q[b]), f64(k[b]), f64(v[b]), q.shape[-1] ** -0.5))
    return made, np.stack(outputs)


@few
@given(cases())
def test_outputs_and_state_equal_the_twin(case):
    """Covers: a merged row is the float64 mean of exactly the tokens assigned to it; true positions; plain eviction."""
    q, k, v = case.tokens()
    cache = case.cache()
    out = give(cache, q, k, v, case.sizes)
    made, expected = twins(case, cache, q, k, v)
    assume(all(m.doubt > TOO_CLOSE for m in made))
    assert_equals_twin(cache, made)
    np.testing.assert_allclose(f64(out), expected, atol=5e-5, rtol=1e-4)


@few
@given(cases(), st.data())
def test_exact_prefill_equals_the_twins_one_shot_compaction(case, data):
    prompt = data.draw(st.integers(1, case.length))
    q, k, v = case.tokens()
    cache = case.cache(prefill="exact", prompt_length=prompt)
    out = give(cache, q, k, v, case.sizes)
    assert cache.prefill == "streaming"
    made, expected = twins(case, cache, q, k, v, prompt)
    assume(all(m.doubt > TOO_CLOSE for m in made))
    assert_equals_twin(cache, made)
    np.testing.assert_allclose(f64(out), expected, atol=5e-5, rtol=1e-4)


@few
@given(cases(residual=range(1, 5)), st.booleans())
def test_weights_sum_to_the_tokens_seen_after_every_call(case, exact):
    q, k, v = case.tokens()
    cache = case.cache(**({"prefill": "exact", "prompt_length": case.length // 2} if exact else {}))
    seen = 0
    for size in [*case.sizes, case.length]:
        end = min(case.length, seen + size)
        if end == seen:
            break
        give(cache, q[:, :, seen:end], k[:, :, seen:end], v[:, :, seen:end])
        seen = end
        for b in range(case.batch):
            assert [held(cache, h, b).weight.sum().item() for h in range(case.heads)] == [seen] * case.heads


@few
@given(cases())
def test_rows_never_exceed_the_budget_after_any_call_and_offset_is_the_tokens_seen(case):
    q, k, v = case.tokens()
    cache = case.cache()
    seen, nbytes = 0, None
    for size in [*case.sizes, *[1] * 12, case.length]:
        end = min(case.length, seen + size)
        if end == seen:
            break
        give(cache, q[:, :, seen:end], k[:, :, seen:end], v[:, :, seen:end])
        seen = end
        assert cache.offset == seen
        filled = [len(held(cache, h).weight) for h in range(case.heads)]
        assert all(n <= most for n, most in zip(filled, case.table, strict=True))
        assert cache.size() == max(filled)
        if seen >= max(case.table):
            assert min(h - n for h, n in zip(filled, case.table, strict=True)) >= -case.policy.staging
        assert nbytes in (None, cache.nbytes), "the arrays grew"
        nbytes = cache.nbytes
    assert nbytes == cache.layout.nbytes(LayerShape(case.heads, 8, 6, 4), case.batch)
    recent = cache.layer.recent_rows
    per_head = np.diff(cache.layout.starts)
    assert [int(per_head[cache.layout.order.index(h)]) + recent for h in range(case.heads)] == case.table


@few
@given(cases())
def test_the_newest_tokens_are_bit_equal_to_what_arrived(case):
    q, k, v = (x.astype(mx.bfloat16) for x in case.tokens())
    cache = case.cache()
    give(cache, q, k, v, case.sizes)
    newest = cache.layout.proximity
    for b in range(case.batch):
        for h in range(case.heads):
            rows = held(cache, h, b)
            assert rows.position.tolist()[-newest:] == list(range(case.length - newest, case.length))
            raw = [(i, p) for i, p in enumerate(rows.position.tolist()) if p >= 0]
            assert [p for _, p in raw] == sorted({p for _, p in raw})
            for i, p in raw:
                assert rows.weight[i].item() == 1
                assert mx.array_equal(rows.keys[i], k[b, h, p]) and mx.array_equal(rows.values[i], v[b, h, p])


@few
@given(cases(uniform=True))
def test_a_uniform_table_equals_the_uniform_number(case):
    q, k, v = case.tokens()
    a, b = case.cache(), tiny.cache([case.rows] * case.heads, case.heads, policy=case.policy)
    out = give(a, q, k, v, case.sizes), give(b, q, k, v, case.sizes)
    assert mx.array_equal(*out)
    for x, y in zip(a.state[:-1], b.state[:-1], strict=True):
        assert (x is None and y is None) or mx.array_equal(x, y)


@few
@given(cases(), st.sampled_from([1, 7, 512, 2048]))
def test_streaming_reaches_the_same_state_for_every_chunk_size(case, size):
    q, k, v = case.tokens()
    whole, parts = case.cache(), case.cache()
    out = give(whole, q, k, v), give(parts, q, k, v, size)
    made, _ = twins(case, whole, q, k, v)
    assume(all(m.doubt > TOO_CLOSE for m in made))
    np.testing.assert_allclose(f64(out[0]), f64(out[1]), atol=2e-5, rtol=1e-4)
    assert_same_state(whole, parts)


@few
@given(cases(), st.sampled_from([2, 7, 512]), st.data())
def test_exact_prefill_reaches_the_same_state_for_every_chunk_size_and_when_finished_by_hand(case, size, data):
    prompt = data.draw(st.integers(1, case.length))
    q, k, v = case.tokens()
    known = case.cache(prefill="exact", prompt_length=prompt)
    give(known, q, k, v)
    parts = case.cache(prefill="exact", prompt_length=prompt)
    give(parts, q, k, v, size)
    by_hand = case.cache(prefill="exact", prompt_length=prompt + 1)
    give(by_hand, *(x[:, :, :prompt] for x in (q, k, v)), size)
    assert by_hand.prefill == "exact"
    by_hand.finish_prompt()
    if prompt < case.length:
        give(by_hand, *(x[:, :, prompt:] for x in (q, k, v)), size)
    made, _ = twins(case, known, q, k, v, prompt)
    assume(all(m.doubt > TOO_CLOSE for m in made))
    assert_same_state(known, parts)
    assert_same_state(known, by_hand)


@few
@given(cases())
def test_a_sequence_alone_equals_the_sequence_within_its_batch(case):
    q, k, v = case.tokens()
    together = case.cache()
    out = give(together, q, k, v, case.sizes)
    made, _ = twins(case, together, q, k, v)
    assume(all(m.doubt > TOO_CLOSE for m in made))
    for b in range(case.batch):
        alone = case.cache()
        one = slice(b, b + 1)
        np.testing.assert_allclose(f64(give(alone, q[one], k[one], v[one])), f64(out[one]), atol=2e-5, rtol=1e-4)
        assert_same_state(alone, together, one)


@few
@given(cases(), st.booleans())
def test_nothing_is_merged_below_the_budget_and_rows_stay_in_order(case, exact):
    q, k, v = case.tokens()
    cache = case.cache(**({"prefill": "exact", "prompt_length": case.length} if exact else {}))
    room = min(case.table) - 1
    part = [x[:, :, :room] for x in (q, k, v)]
    out = give(cache, *part, case.sizes)
    if exact:
        cache.finish_prompt()
    seen = part[0].shape[2]
    for b in range(case.batch):
        for h in range(case.heads):
            rows = held(cache, h, b)
            assert rows.position.tolist() == list(range(seen)) and rows.weight.tolist() == [1] * seen
            assert mx.array_equal(rows.keys, part[1][b, h]) and mx.array_equal(rows.values, part[2][b, h])
    keys, values = part[1:]
    full = mx.fast.scaled_dot_product_attention(part[0], keys, values, scale=8**-0.5, mask="causal")
    np.testing.assert_allclose(f64(out), f64(full), atol=2e-5)


@few
@given(cases(residual=(0,)))
def test_no_residual_rows_is_plain_eviction(case):
    """Every row is a raw token: the newest ones, and per head the most important of the others."""
    q, k, v = case.tokens()
    cache = case.cache()
    give(cache, q, k, v, case.sizes)
    for b in range(case.batch):
        for h in range(case.heads):
            rows = held(cache, h, b)
            assert set(rows.weight.tolist()) <= {1.0} and min(rows.position.tolist()) >= 0
            assert mx.array_equal(rows.keys, k[b, h, rows.position])
    assert cache.layer.residuals.key_sum.size == cache.layer.residuals.spread.size == 0
