"""A batch behind mlx-lm's protocol: padding, copies, rows that come and go; each row as if it were alone."""

import copy
import importlib
import io

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models import cache as mlx_lm_cache
from tiny import assert_same_state, f64, tokens

import zm_mlx
from zm_mlx import UnsupportedModelError
from zm_mlx.host import hook
from zm_mlx.host.batch import ZeroMergeBatch
from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.phases import Piece
from zm_mlx.policies import Policy, ZeroMerge

mlx_lm_generate = importlib.import_module("mlx_lm.generate")

ROWS = 24
DIM = 8
SCALE = DIM**-0.5
TURN = mx.array(np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, DIM)))[0].astype(np.float32))


def cache(rows=ROWS, policy=ZeroMerge(), **more):  # noqa: B008 - a value
    return tiny.cache(rows, policy=policy, turn=TURN, **more)


def merged(*caches):
    return caches[0].merge(list(caches))


def call(batch, q, k, v):
    """One call of attention as a model makes it, through the hook."""
    mask = batch.make_mask(q.shape[2])
    keys, values = batch.update_and_fetch(k, v)
    return hook.attention(q, keys, values, batch, SCALE, mask)


def rectangle(rows, left=None, filler=mx.nan):
    """Each row's (q, k, v) [1, ., l, D] in one rectangle, padded with ``filler`` on the right, or on the left too."""
    left = left or [0] * len(rows)
    width = max(n + row[0].shape[2] for n, row in zip(left, rows, strict=True))

    def padded(x, before):
        return mx.pad(x, [(0, 0), (0, 0), (before, width - before - x.shape[2]), (0, 0)], constant_values=filler)

    lists = zip(*([padded(x, n) for x in row] for n, row in zip(left, rows, strict=True)), strict=True)
    return tuple(mx.concatenate(xs) for xs in lists)


def cut(row, begin, end):
    return tuple(x[:, :, begin:end] for x in row)


def assert_alone(batch, i, rows, size=10**9):
    """Row i holds what a cache of its kind holds that took its tokens alone."""
    alone = cache()
    tiny.give(alone, *rows, size=size)
    assert_same_state(batch.extract(i), ended(alone))


def ended(alone):
    alone.finish_prompt()
    return alone


# ---- padding


@pytest.mark.parametrize("filler", [mx.nan, 1e4])
def test_padding_behind_the_tokens_never_reaches_a_row_and_gets_zeros(filler):
    rows = [tokens(1, 60), tokens(2, 7), tokens(3, 31)]
    batch = merged(cache(), cache(), cache())
    batch.prepare(lengths=[60, 7, 31], right_padding=[0, 53, 29])
    out = call(batch, *rectangle(rows, filler=filler))
    batch.finalize()
    for i, row in enumerate(rows):
        length = row[0].shape[2]
        np.testing.assert_allclose(f64(out[i : i + 1, :, :length]), f64(tiny.give(cache(), *row)), atol=2e-5)
        assert not mx.any(out[i, :, length:]).item()
        assert_alone(batch, i, row)


def test_padding_before_the_tokens_never_reaches_a_row_and_moves_its_positions():
    rows, left = [tokens(1, 40), tokens(2, 9)], [0, 31]
    batch = merged(cache(), cache())
    batch.prepare(left_padding=left)
    assert batch.offset.tolist() == [0, -31]
    q, k, v = rectangle(rows, left)
    for c in (slice(0, 20), slice(20, 40)):  # the padding takes more than one call
        out = call(batch, q[:, :, c], k[:, :, c], v[:, :, c])
    assert batch.offset.tolist() == [40, 9]
    np.testing.assert_allclose(f64(out[1:, :, -9:]), f64(tiny.give(cache(), *rows[1])), atol=2e-5)
    assert not mx.any(out[1, :, :-9]).item()
    for i, row in enumerate(rows):
        assert_alone(batch, i, row)


def test_lengths_count_down_over_the_calls_of_a_chunked_prompt():
    rows = [tokens(1, 50), tokens(2, 21), tokens(3, 3)]
    batch = merged(cache(), cache(), cache())
    q, k, v = rectangle(rows)
    batch.prepare(lengths=[50, 21, 3], right_padding=[0, 29, 47])
    for c in tiny.chunks(50, 16):
        call(batch, q[:, :, c], k[:, :, c], v[:, :, c])
    assert [row.offset for row in batch.rows] == [50, 21, 3]
    batch.finalize()
    assert batch.offset.tolist() == [50, 21, 3]
    more = [tokens(4, 2), tokens(5, 2), tokens(6, 2)]
    call(batch, *rectangle(more))  # after finalize every column is a token
    assert batch.offset.tolist() == [52, 23, 5]


def test_a_row_without_tokens_in_a_call_is_left_alone():
    batch = merged(cache(), cache())
    call(batch, *rectangle([tokens(1, 30), tokens(2, 30)]))
    before = batch.rows[1].layer
    batch.prepare(lengths=[5, 0], right_padding=[0, 5])
    out = call(batch, *rectangle([tokens(3, 5), cut(tokens(4, 1), 0, 0)]))
    assert batch.rows[1].layer is before
    assert not mx.any(out[1]).item()


def test_one_token_beside_longer_rows_ends_a_piece_as_it_does_alone():
    rows = [tokens(1, 80), tokens(2, 41)]
    batch = merged(cache(), cache())
    call(batch, *rectangle([cut(row, 0, 40) for row in rows]))
    batch.prepare(lengths=[40, 1], right_padding=[0, 39])
    call(batch, *rectangle([cut(rows[0], 40, 80), cut(rows[1], 40, 41)]))
    batch.finalize()
    assert [isinstance(row.phase, Piece) for row in batch.rows] == [True, False]
    assert_alone(batch, 0, rows[0], size=40)
    assert_alone(batch, 1, rows[1], size=40)


@pytest.mark.parametrize(
    "wrong",
    [{"right_padding": [0, 3]}, {"lengths": [1]}, {"left_padding": [1, 2, 3]}],
    ids=["no lengths", "too few", "too many"],
)
def test_padding_that_cannot_be_cut_off_is_refused(wrong):
    with pytest.raises(ValueError, match=r"lengths of the rows|rows of a batch"):
        merged(cache(), cache()).prepare(**wrong)


# ---- copies


def test_merge_leaves_its_caches_as_they_were():
    alone, row = cache(), tokens(1, 30)
    tiny.give(alone, *row)
    before = copy.deepcopy(alone)
    batch = merged(alone, alone)  # the same cache for two sequences: two rows, not one
    call(batch, *rectangle([tokens(2, 4), tokens(3, 4)]))
    mx.eval([x for r in batch.rows for x in r.layer.arrays()])
    assert alone.offset == 30
    assert_same_state(alone, before)
    assert_alone(batch, 0, tuple(mx.concatenate(x, axis=2) for x in zip(row, tokens(2, 4), strict=True)))
    assert_alone(batch, 1, tuple(mx.concatenate(x, axis=2) for x in zip(row, tokens(3, 4), strict=True)))


def test_an_extracted_row_and_the_batch_go_on_by_themselves():
    rows = [tokens(1, 30), tokens(2, 30)]
    batch = merged(cache(), cache())
    call(batch, *rectangle([cut(row, 0, 25) for row in rows]))
    taken = batch.extract(1)
    tiny.give(taken, *tokens(9, 5), size=1)
    for i in range(25, 30):
        call(batch, *rectangle([cut(row, i, i + 1) for row in rows]))
    for i, row in enumerate(rows):
        assert_alone(batch, i, row, size=[25, 1, 1, 1, 1, 1])
    alone = cache()
    tiny.give(alone, *cut(rows[1], 0, 25))
    alone.finish_prompt()
    tiny.give(alone, *tokens(9, 5), size=1)
    assert_same_state(taken, alone)


def test_a_split_copies_the_whole_batch_and_filters_both():
    rows = [tokens(i, 40) for i in range(3)]
    batch = merged(cache(), cache(), cache())
    call(batch, *rectangle([cut(row, 0, 30) for row in rows]))
    other = copy.deepcopy(batch)
    batch.filter([0, 2])
    other.filter([1])
    call(other, *cut(rows[1], 30, 40))
    call(batch, *rectangle([cut(rows[0], 30, 40), cut(rows[2], 30, 40)]))
    other.extend(batch)
    for i, row in enumerate([rows[1], rows[0], rows[2]]):
        assert_alone(other, i, row, size=30)


def test_rows_of_an_extended_batch_are_not_those_of_the_other_one():
    batch, other = merged(cache()), merged(cache())
    call(other, *tokens(1, 30))
    batch.extend(other)
    call(batch, *rectangle([tokens(2, 3), tokens(3, 3)]))
    assert other.offset.tolist() == [30]
    assert_alone(other, 0, tokens(1, 30))


def test_a_row_that_is_kept_twice_becomes_two():
    batch = merged(cache(), cache())
    call(batch, *rectangle([tokens(1, 30), tokens(2, 30)]))
    batch.filter(mx.array([1, 1, 0]))
    call(batch, *rectangle([tokens(3, 3), tokens(4, 3), tokens(5, 3)]))
    for i, (first, then) in enumerate([(2, 3), (2, 4), (1, 5)]):
        row = tuple(mx.concatenate(x, axis=2) for x in zip(tokens(first, 30), tokens(then, 3), strict=True))
        assert_alone(batch, i, row)


def test_a_copy_takes_no_memory_until_it_is_written():
    policy = Policy()
    big = ZeroMergeCache(policy.layout(4096, 2), policy=policy)
    tiny.give(big, *tokens(1, 64))
    mx.eval(big.layer.arrays())
    before = mx.get_active_memory()
    copies = [merged(big), copy.deepcopy(merged(big, big))]
    copies += [copies[0].extract(0)]
    mx.eval([x for row in copies[1].rows for x in row.layer.arrays()])
    assert mx.get_active_memory() - before < big.nbytes / 100


def test_prompts_side_by_side_take_the_working_memory_of_one():
    peaks = []
    for count in (1, 5):
        batch = merged(*(cache(256) for _ in range(count)))
        q, k, v = tokens(1, 512, batch=count, groups=4)
        mx.eval(call(batch, q, k, v))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(call(batch, q, k, v))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.3 * peaks[0]


def test_a_row_taken_in_the_middle_of_a_prompt_takes_its_budget_and_no_more():
    row = tokens(1, 100)
    batch = merged(cache())
    call(batch, *cut(row, 0, 70))
    taken = batch.extract(0)
    mx.eval(taken.layer.arrays())
    decoding = cache()
    tiny.give(decoding, *cut(row, 0, 70), size=1)
    assert taken.nbytes == decoding.nbytes < batch.nbytes
    call(batch, *cut(row, 70, 100))
    assert_alone(batch, 0, row)  # one piece of 100 tokens, as if nothing had been taken


# ---- what the model and the generator read


def test_offset_is_replaced_never_changed():
    batch = merged(cache(), cache())
    first = batch.offset
    _, k, v = rectangle([tokens(1, 6), tokens(2, 4)])
    batch.prepare(lengths=[6, 4], right_padding=[0, 2])
    batch.update_and_fetch(k, v)
    assert first.tolist() == [0, 0]
    assert batch.offset.tolist() == [6, 6]  # as of mlx-lm's batches: padding counts until finalize
    assert batch.offset.dtype == mx.int32


def test_an_evaluated_output_leaves_nothing_unevaluated_behind():
    batch = merged(cache(), cache(ROWS * 2))
    call(batch, *rectangle([tokens(1, 30), tokens(2, 30)]))
    active = []
    for i in range(120):
        mx.eval(call(batch, *rectangle([tokens(i, 1), tokens(i + 1, 1)])))
        active.append(mx.get_active_memory())
    assert max(active[60:]) <= max(active[:60]) + 2**12


def test_its_mask_is_causal_over_the_new_columns():
    batch = merged(cache(), cache())
    call(batch, *rectangle([tokens(1, 30), tokens(2, 30)]))
    assert batch.make_mask(1) is None
    assert batch.make_mask(5) == "causal"
    assert mx.array_equal(batch.make_mask(5, return_array=True), mx.tri(5).astype(mx.bool_))


def test_keys_can_be_made_to_wait_for_something_in_every_row():
    batch = merged(cache(), cache(), cache())
    assert batch.keys is None
    batch.keys = mx.zeros(1)  # before the first token there is nothing to wait for
    batch.prepare(lengths=[0, 5, 5], right_padding=[5, 0, 0])
    call(batch, *rectangle([cut(tokens(0, 1), 0, 0), tokens(1, 5), tokens(2, 5)]))
    batch.finalize()
    sent = mx.zeros(1) + 1
    batch.keys = mx.depends(batch.keys, sent)
    for i in (1, 2):
        graph = io.StringIO()
        mx.export_to_dot(graph, batch.rows[i].keys, sent=sent)
        assert '"sent" ->' in graph.getvalue()
    for i in (1, 2):
        assert_alone(batch, i, tokens(i, 5))


def test_saved_and_loaded_by_mlx_lm_it_goes_on_in_the_middle_of_a_padded_prompt(tmp_path):
    rows = [tokens(1, 50), tokens(2, 35)]
    batch = merged(cache(), cache())
    q, k, v = rectangle(rows, filler=0.0)
    batch.prepare(lengths=[50, 35], right_padding=[0, 15])
    call(batch, q[:, :, :30], k[:, :, :30], v[:, :, :30])
    path = str(tmp_path / "batch.safetensors")
    mlx_lm_cache.save_prompt_cache(path, [batch, merged(cache())])
    loaded, empty = mlx_lm_cache.load_prompt_cache(path)
    assert type(loaded) is ZeroMergeBatch
    assert empty.empty()
    call(loaded, q[:, :, 30:], k[:, :, 30:], v[:, :, 30:])
    loaded.finalize()
    for i, row in enumerate(rows):
        assert_alone(loaded, i, row)


def test_its_numbers_are_those_of_its_rows():
    batch = merged(cache(), cache(ROWS * 2))
    assert (batch.nbytes, batch.size(), batch.empty()) == (0, 0, True)
    batch.prepare(lengths=[90, 0], right_padding=[0, 90])
    call(batch, *rectangle([tokens(1, 90), cut(tokens(2, 1), 0, 0)]))
    assert not batch.empty()
    batch.finalize()
    call(batch, *rectangle([tokens(1, 1), tokens(2, 1)]))
    assert batch.nbytes == sum(row.nbytes for row in batch.rows)
    assert batch.size() == batch.rows[0].size()
    assert not batch.is_trimmable()
    assert batch.trim(3) == 0


# ---- misuse


def test_a_model_that_attends_otherwise_is_told():
    batch = merged(cache(), cache())
    q, k, v = rectangle([tokens(1, 5), tokens(2, 5)])
    keys, values = batch.update_and_fetch(k, v)
    with pytest.raises(UnsupportedModelError, match="as they are"):
        batch.attend(q, keys + 0, values, SCALE)
    with pytest.raises(UnsupportedModelError, match="more than once"):
        batch.attend(q, keys, values, SCALE)
    with pytest.raises(UnsupportedModelError, match="never attended"):
        batch.update_and_fetch(k, v)


@pytest.mark.parametrize("length", [1, 5])
def test_another_mask_than_the_causal_one_is_refused(length):
    batch = merged(cache(), cache())
    q, k, v = rectangle([tokens(1, length), tokens(2, length)])
    keys, values = batch.update_and_fetch(k, v)
    with pytest.raises(UnsupportedModelError, match="another mask"):
        hook.attention(q, keys, values, batch, SCALE, mx.zeros((length, length + 3)))


def test_columns_for_another_number_of_rows_are_refused():
    with pytest.raises(ValueError, match="batch of 2 rows"):
        call(merged(cache(), cache()), *tokens(1, 5))


def test_a_cache_of_several_sequences_is_no_row():
    several = cache()
    tiny.give(several, *tokens(1, 5, batch=2))
    with pytest.raises(ValueError, match="2 sequences"):
        merged(cache(), several)


def test_full_caches_beside_compressed_ones_are_refused_whichever_comes_first():
    made = tiny.model()
    full = mlx_lm_cache.make_prompt_cache(made)
    own = zm_mlx.make_prompt_cache(made, ROWS)
    for caches in ([full, own], [own, full]):
        generator = mlx_lm_generate.BatchGenerator(made, max_tokens=2)
        generator.insert([[1, 2, 3], [4, 5]], caches=caches)
        with pytest.raises(ValueError, match="all of its sequences or for none"):
            generator.next_generated()
    with pytest.raises(ValueError, match="cannot join"):
        own[0].merge([own[0], full[0]])
    with pytest.raises(ValueError, match="cannot join"):
        merged(cache()).extend(full[0].merge([full[0]]))


def test_waiting_sequences_cost_nothing():
    made = tiny.model()
    generator = mlx_lm_generate.BatchGenerator(made)
    generator.insert([[1, 2, 3]] * 3, caches=[zm_mlx.make_prompt_cache(made, 2048) for _ in range(3)])
    assert generator.prompt_cache_nbytes == 0
