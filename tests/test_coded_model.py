"""kv_bits from the plan to the file: bytes, budgets, peaks, batches, drafts, saved prompts, refusals."""

import copy

import mlx.core as mx
import numpy as np
import pytest
import tiny
from test_coded_cache import codes_of
from tiny import f64

import zm_mlx
from zm_mlx.errors import UserError
from zm_mlx.evaluation.caches import Contender
from zm_mlx.evaluation.prefilled import Prompted
from zm_mlx.host import caches
from zm_mlx.host.batch import ZeroMergeBatch
from zm_mlx.host.caches import Wish
from zm_mlx.host.measuring import _after
from zm_mlx.policies import Policy, ZeroMerge
from zm_mlx.report import plan_lines
from zm_mlx.state.layout import LayerShape
from zm_mlx.state.rows import Dense

LLAMA = LayerShape(8, 128, 128, 2, "mlx.core.float16")
BITS = [8, 4]


def model(head_dim=64, **more):
    return tiny.model(head_dim=head_dim, **more)


def saved_share(bits: int, policy=ZeroMerge, rows: int = 2048) -> float:
    exact, coded = (policy(kv_bits=b).layout(rows, 8).nbytes(LLAMA) for b in (None, bits))
    return 1 - coded / exact


@pytest.mark.parametrize("policy", [ZeroMerge, Policy])
@pytest.mark.parametrize(("bits", "least"), [(8, 0.40), (4, 0.62)])
def test_a_layer_of_llama_3_8b_takes_40_and_62_percent_less_as_planned_and_as_held(policy, bits, least):
    assert saved_share(bits, policy) >= least
    _, k, v = tiny.tokens(0, 1, heads=8, groups=1, dim=128, dtype=mx.float16)
    held = []
    for b in (None, bits):
        given = policy(kv_bits=b)
        cache = tiny.cache(2048, 8, policy=given, kernels="ops")
        # The stores alone: attention over 16-bit rows takes long on a CPU.
        state = _after(2040, cache.layout, LLAMA, None)
        state = state.appended(Dense(k, v))
        cache.layer = cache.operations.compact(state._replace(since_compaction=0))
        mx.eval(cache.layer.arrays())
        held.append(cache.nbytes)
        assert cache.nbytes == given.layout(2048, 8).nbytes(LLAMA)
    assert 1 - held[1] / held[0] >= least


def test_a_budget_of_bytes_holds_more_rows_and_the_plan_says_so():
    made = model()
    plans = [zm_mlx.plan_cache(made, "200KB", kv_bits=b) for b in (None, *BITS)]
    rows = [p.layouts[0].rows[0] for p in plans]
    assert all(p.nbytes <= 200_000 for p in plans) and rows[1] > 2 * rows[0] and rows[2] > 1.2 * rows[1]
    assert any("codes of 4 bits in groups of 64" in line for line in plan_lines(plans[2]))
    assert not any("codes" in line for line in plan_lines(plans[0]))


@pytest.mark.parametrize("bits", BITS)
def test_the_peak_is_below_that_of_rows_that_stay_numbers(bits):
    """In the prompt and in decoding, at the same rows: nothing makes numbers of the whole cache."""
    q, k, v = tiny.tokens(0, 440, heads=8, groups=4, dim=128)
    mx.eval(q, k, v)
    peaks = []
    for b in (None, bits):
        cache, found = tiny.cache(320, 8, policy=ZeroMerge(kv_bits=b), kernels="ops"), []
        for begin, end, size in ((0, 420, 64), (420, 440, 1)):
            mx.clear_cache()
            before = mx.get_active_memory() - cache.nbytes
            mx.reset_peak_memory()
            tiny.give(cache, q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end], size)
            found.append(mx.get_peak_memory() - before)
        peaks.append(found)
    for exact, coded in zip(*peaks, strict=True):
        assert coded < exact


def test_head_dims_decide_the_groups_or_are_refused_with_what_works():
    assert zm_mlx.plan_cache(model(96), 64, kv_bits=8).policy.kv_group_size == 32
    assert zm_mlx.plan_cache(model(64), 64, kv_bits=8).policy.kv_group_size == 64
    assert zm_mlx.plan_cache(model(64), 64, kv_bits=8, kv_group_size=32).layouts[0].coding.group == 32
    for dim, more, words in (
        (48, {"kv_bits": 8}, "head dims that are multiples of 32.*48.*leave it out"),
        (96, {"kv_bits": 4, "kv_group_size": 64}, "does not divide the head dims 96.*32 works"),
        (64, {"kv_bits": 6}, "kv_bits must be 8 or 4"),
        (64, {"kv_group_size": 64}, "needs kv_bits"),
    ):
        with pytest.raises(ValueError, match=words):
            zm_mlx.make_prompt_cache(model(dim), 64, **more)
    with pytest.raises(UserError, match="--kv-bits: "):
        caches.fresh(model(48), "zeromerge", Wish("64", kv_bits=8), 100, 1)


def test_a_saved_prompt_goes_on_and_keeps_its_bits(tmp_path):
    made, file = model(), str(tmp_path / "a.safetensors")
    own = zm_mlx.make_prompt_cache(made, 48, kv_bits=4)
    tiny.feed(made, own, tiny.prompt(200), 64)
    zm_mlx.save_prompt_cache(file, own)
    again = zm_mlx.load_prompt_cache(file, made)
    assert [c.nbytes for c in again] == [c.nbytes for c in own] and again[0].policy.kv_bits == 4
    want, logits = tiny.greedy(made, own, tiny.prompt(1, seed=3), 40)
    found, others = tiny.greedy(made, again, tiny.prompt(1, seed=3), 40)
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(logits, others)
    for wish, words in (
        (Wish(kv_bits=8), "--kv-bits 8 differs from the kv-bits .*(4): leave --kv-bits out"),
        (Wish(kv_bits=4, kv_group_size=32), "--kv-group-size 32 differs"),
    ):
        with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
            caches.continued(made, file, wish, 10)
    assert caches.continued(made, file, Wish(kv_bits=4), 10).seen == 200


def test_rows_of_a_batch_are_those_that_a_sequence_has_alone(bits=8):
    made = model(layers=1)
    prompts = [tiny.prompt(n, seed=n) for n in (150, 70)]
    alone = [zm_mlx.make_prompt_cache(made, 48, kv_bits=bits) for _ in prompts]
    for cache, tokens in zip(alone, prompts, strict=True):
        tiny.feed(made, cache, tokens, 64)
    batch = [type(a).merge([a, b]) for a, b in zip(*alone, strict=True)]
    assert all(isinstance(b, ZeroMergeBatch) for b in batch)
    before = copy.deepcopy(alone)
    tokens = [tiny.prompt(40, seed=9), tiny.prompt(40, seed=10)]
    for t in range(40):
        logits = made(mx.concatenate([x[:, t : t + 1] for x in tokens]), cache=batch)
        mx.eval(logits, [c.state for c in batch])
    assert batch[0].nbytes == sum(row.nbytes for row in batch[0].rows)
    for i, own in enumerate(alone):
        extracted = [b.extract(i) for b in batch]
        tiny.feed(made, own, tokens[i], 1)
        for x, y in zip(extracted, own, strict=True):
            assert codes_of(x).keys() == codes_of(y).keys() and x.offset == y.offset
            np.testing.assert_allclose(f64(x.layer.scores.kept), f64(y.layer.scores.kept), atol=1e-3)
    assert before[0][0].offset == 150


def test_what_is_taken_back_leaves_the_codes_of_what_was_accepted(bits=4):
    """Drafts of up to 5 tokens, of which some are rejected, with compactions among them."""
    made = model(layers=1)
    plain, drafted = (zm_mlx.make_prompt_cache(made, 40, kv_bits=bits, policy=Policy()) for _ in range(2))
    start, after = tiny.prompt(90), tiny.prompt(40, seed=4)
    for own in (plain, drafted):
        tiny.feed(made, own, start, 90)
    tiny.feed(made, plain, after, 1)
    done, rng = 0, np.random.default_rng(0)
    with zm_mlx.rollback(drafted, 4):
        while done < 40:
            count, wrong = min(40 - done, int(rng.integers(1, 4))), int(rng.integers(0, 3))
            call = mx.concatenate([after[:, done : done + count], tiny.prompt(max(1, wrong), seed=done)], axis=1)
            mx.eval(made(call, cache=drafted))
            assert all(c.trim(max(1, wrong)) == max(1, wrong) for c in drafted)
            done += count
    for x, y in zip(drafted, plain, strict=True):
        assert x.offset == y.offset == 130 and x.layer.departed == y.layer.departed > 40
        assert codes_of(x).keys() == codes_of(y).keys()
        a, b = codes_of(x), codes_of(y)
        assert np.mean([a[p] == b[p] for p in a]) > 0.5  # the model's own rounding differs with the length of a call
        np.testing.assert_allclose(f64(x.layer.kept.weight), f64(y.layer.kept.weight))


def test_an_evaluation_names_codes_and_counts_them_beside_16_bits():
    found = Contender("zeromerge-uniform-8bit-streaming", 0.1)
    assert (found.method, found.bits, found.streaming, found.shares) == ("zeromerge", 8, True, False)
    assert found.settings == ZeroMerge(kv_bits=8) and Contender("zeromerge", 0.1).bits is None
    with pytest.raises(ValueError, match="rotating-8bit does not work"):
        Contender("rotating-8bit", 0.1)
    with pytest.raises(ValueError, match=r"KeyNorm.*take another policy"):
        _ = Contender("key_norm-4bit", 0.1).settings
    made = Prompted(model(layers=1), tiny.prompt(600)[0])
    rows = [made.caches(Contender(name, 0.2))[0].layout.rows[0] for name in ("zeromerge-uniform", "zeromerge-8bit")]
    assert 1.5 < rows[1] / rows[0] < 2  # and not the 3.5 that codes are fewer than the bytes of float32
