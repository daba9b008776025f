"""Saved caches: they continue as if never saved, and whatever does not fit or is damaged raises."""

import os
import re
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from mlx_lm.models import cache as mlx_lm_cache

import zm_mlx
from zm_mlx import saved
from zm_mlx.cache import ZeroMergeCache
from zm_mlx.policy import Policy

SMALL = Policy(residual=2, staging=3)
FLOATS = [mx.float32, mx.float16, mx.bfloat16]


def caches(rows=20, layers=2, policy=SMALL, **more):
    return [ZeroMergeCache(rows, policy=policy, **more) for _ in range(layers)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


@pytest.fixture
def model():
    return tiny.model(1)


@pytest.fixture
def file(path, model):
    """A saved cache of 50 tokens in 20 rows."""
    made = caches()
    tiny.feed(model, made, tiny.prompt(50))
    zm_mlx.save_prompt_cache(path, made)
    return path


def assert_same_greedy(model, a, b, more=4, count=12):
    rest = tiny.prompt(more, 77)
    found, logits = tiny.greedy(model, a, rest, count)
    again, others = tiny.greedy(model, b, rest, count)
    assert found.tolist() == again.tolist() and (logits == others).all()


# ---- round trips


@pytest.mark.parametrize("rows", [20, [30, 9]])
@pytest.mark.parametrize("prefill", ["streaming", "exact", "mid-prompt", "prompt of unknown length"])
def test_generation_continues_with_the_same_tokens(path, model, rows, prefill):
    more = {
        "streaming": {},
        "exact": {"prefill": "exact", "prompt_length": 50},
        "mid-prompt": {"prefill": "exact", "prompt_length": 53},
        "prompt of unknown length": {"prefill": "exact"},
    }[prefill]
    made = caches(rows, **more)
    tiny.feed(model, made, tiny.prompt(50), 9)
    zm_mlx.save_prompt_cache(str(path), made)
    loaded = zm_mlx.load_prompt_cache(str(path), model)
    for a, b in zip(made, loaded, strict=True):
        assert (b.offset, b.table, b.policy, b.prefill) == (a.offset, a.table, a.policy, a.prefill)
        assert b.nbytes == a.nbytes and b.layout == a.layout
    assert_same_greedy(model, made, loaded)
    if prefill == "mid-prompt":
        assert loaded[0].prefill == "streaming" and loaded[0].nbytes == loaded[0].layout.nbytes(16, 16, 4)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("residual", [0, 2])
def test_half_precision_continues_with_the_same_tokens(path, dtype, residual):
    model = tiny.model(1, dtype=dtype)
    made = caches(policy=Policy(residual=residual, staging=3))
    tiny.feed(model, made, tiny.prompt(50), 9)
    zm_mlx.save_prompt_cache(path, made)
    loaded = zm_mlx.load_prompt_cache(path, model)
    assert loaded[0].recent.keys.dtype == dtype
    assert_same_greedy(model, made, loaded)


def test_empty_caches_go_round(path, model):
    zm_mlx.save_prompt_cache(path, caches())
    loaded = zm_mlx.load_prompt_cache(path, model)
    assert all(c.empty() for c in loaded)
    assert_same_greedy(model, caches(), loaded, more=40)


def test_every_setting_of_the_policy_comes_back_exactly(path, model):
    policy = Policy(residual=1, proximity=0.3, staging=2, alpha=0.7, kappa=0.1, decay=0.987654321, pool=3)
    zm_mlx.save_prompt_cache(path, caches(policy=policy))
    assert zm_mlx.load_prompt_cache(path, model)[0].policy == policy


def test_metadata_goes_round_without_the_checksum(path):
    zm_mlx.save_prompt_cache(path, caches(), {"prompt": "naïve: ünïcode", "a.b": "c"})
    assert saved.read(path)[1] in (
        {"prompt": "naïve: ünïcode", "a.b": "c"},
        {"prompt": "naïve: ünïcode", "a": {"b": "c"}},  # mlx-lm's own tree of names
    )


def test_saving_leaves_the_caches_as_they_were(path, model):
    made, other = caches(), caches()
    for c in (made, other):
        tiny.feed(model, c, tiny.prompt(50))
    zm_mlx.save_prompt_cache(path, made)
    assert_same_greedy(model, made, other)


def test_overwriting_the_file_of_a_loaded_cache_does_not_change_it(file, model):
    loaded, reference = zm_mlx.load_prompt_cache(file, model), zm_mlx.load_prompt_cache(file, model)
    mx.eval([c.state for c in reference])
    zm_mlx.save_prompt_cache(file, caches(40))
    assert_same_greedy(model, loaded, reference)


def test_mlx_lms_loader_reads_the_file_and_ours_reads_mlx_lms(file, path, model):
    theirs = mlx_lm_cache.load_prompt_cache(str(file))
    assert [type(c) for c in theirs] == [ZeroMergeCache] * 2
    mlx_lm_cache.save_prompt_cache(str(path), theirs)
    assert_same_greedy(model, zm_mlx.load_prompt_cache(path, model), theirs)


def test_caches_beside_mlx_lms_own_are_saved_with_them(path):
    made = [caches()[0], mlx_lm_cache.RotatingKVCache(max_size=8)]
    q, k, v = tiny.tokens(0, 30)
    tiny.give(made[0], q, k, v)
    made[1].update_and_fetch(k, v)
    zm_mlx.save_prompt_cache(path, made)
    loaded, _ = saved.read(path)
    assert [type(c) for c in loaded] == [ZeroMergeCache, mlx_lm_cache.RotatingKVCache]
    assert loaded[1].offset == 30


# ---- wrong models


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"layers": 3}, "layers differ"),
        ({"layers": 1}, "layers differ"),
        ({"kv_heads": 4}, "heads=2"),
        ({"kv_heads": 1}, "heads=2"),
        ({"head_dim": 32}, "head_dim=16"),
        ({"dtype": mx.float16}, "itemsize=4"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_a_file_of_another_model_raises(file, other, what):
    with pytest.raises(ValueError, match=f"saved for another model.*{re.escape(what)}"):
        zm_mlx.load_prompt_cache(file, tiny.model(1, **other))


def test_a_file_of_another_16_bit_dtype_raises(path):
    half, brain = tiny.model(1, dtype=mx.float16), tiny.model(1, dtype=mx.bfloat16)
    made = caches()
    tiny.feed(half, made, tiny.prompt(30))
    zm_mlx.save_prompt_cache(path, made)
    with pytest.raises(ValueError, match="saved for another model"):
        zm_mlx.load_prompt_cache(path, brain)


def test_empty_caches_with_a_table_for_other_heads_raise(path, model):
    zm_mlx.save_prompt_cache(path, caches([30, 30, 9]))
    with pytest.raises(ValueError, match="saved for another model"):
        zm_mlx.load_prompt_cache(path, model)


# ---- files that are no caches


def test_a_missing_file_raises_and_names_the_path(path, model):
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        zm_mlx.load_prompt_cache(path, model)


@pytest.mark.parametrize("keep", ["0", "1", "7", "8", "header", "all but the data", "half", "all but one byte"])
def test_a_truncated_file_raises(file, model, keep):
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    known = {"header": header - 5, "all but the data": header, "half": len(data) // 2, "all but one byte": -1}
    file.write_bytes(data[: known.get(keep) or int(keep)])
    with pytest.raises(ValueError, match="truncated, damaged"):
        zm_mlx.load_prompt_cache(file, model)


@pytest.mark.parametrize("at", [0.0, 0.1, 0.37, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("bit", [1, 128])
def test_one_flipped_bit_in_the_data_raises(file, model, at, bit):
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + int(at * (len(data) - begin - 1))] ^= bit
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        zm_mlx.load_prompt_cache(file, model)


@pytest.mark.parametrize("at", range(0, 100, 9))
def test_a_flipped_bit_in_the_header_raises_or_changes_nothing(file, model, at):
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + at * size // 100] ^= 2
    reference = zm_mlx.load_prompt_cache(file, model)
    mx.eval([c.state for c in reference])
    file.write_bytes(data)
    try:
        loaded = zm_mlx.load_prompt_cache(file, model)
    except ValueError as error:
        assert "damaged" in str(error) or "another model" in str(error)
    else:
        assert_same_greedy(model, loaded, reference)


def test_bytes_after_the_end_change_nothing_or_raise(file, model):
    reference = zm_mlx.load_prompt_cache(file, model)
    mx.eval([c.state for c in reference])
    file.write_bytes(file.read_bytes() + b"more")
    try:
        loaded = zm_mlx.load_prompt_cache(file, model)
    except ValueError:
        return
    assert_same_greedy(model, loaded, reference)


@pytest.mark.parametrize("metadata", [None, {}, {"0": "x"}, {"format": "mlx"}, {"0.a": "b", "1.0": "Zebra", "2.0": ""}])
def test_a_foreign_safetensors_file_raises(path, model, metadata):
    mx.save_safetensors(str(path), {"model.weight": mx.ones((4, 4))}, metadata)
    with pytest.raises(ValueError, match="not a prompt cache"):
        zm_mlx.load_prompt_cache(path, model)


def test_a_cache_of_mlx_lm_alone_raises_and_says_so(path, model):
    plain = [mlx_lm_cache.KVCache() for _ in range(2)]
    tiny.feed(model, plain, tiny.prompt(20))
    mlx_lm_cache.save_prompt_cache(str(path), plain)
    with pytest.raises(ValueError, match="no ZeroMerge caches: it was made by mlx-lm alone"):
        zm_mlx.load_prompt_cache(path, model)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"{}", b"a long text that is no tensor at all\n" * 50])
def test_a_text_file_with_the_right_name_raises(path, model, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a prompt cache"):
        zm_mlx.load_prompt_cache(path, model)


def test_a_directory_raises(path, model):
    path.mkdir()
    with pytest.raises(OSError):
        zm_mlx.load_prompt_cache(path, model)


def test_a_file_of_another_format_version_raises(path, model, monkeypatch):
    monkeypatch.setattr("zm_mlx.cache.FORMAT", 2)
    zm_mlx.save_prompt_cache(path, caches())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another version of zm_mlx"):
        zm_mlx.load_prompt_cache(path, model)


# ---- writing


def test_another_suffix_raises_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.safetensors, unlike .*cache\.bin"):
        zm_mlx.save_prompt_cache(tmp_path / "cache.bin", caches())
    assert not os.listdir(tmp_path)


def test_a_pending_update_is_not_saved(path):
    made = caches()
    made[1].update_and_fetch(*tiny.tokens(0, 3)[1:])
    with pytest.raises(ValueError, match="never attended"):
        zm_mlx.save_prompt_cache(path, made)
    assert not path.exists()


def test_a_folder_that_does_not_exist_raises_oserror(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        zm_mlx.save_prompt_cache(tmp_path / "nowhere" / "cache.safetensors", caches())


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "while writing"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(file, model, monkeypatch, error, when):
    before = file.read_bytes()

    def fail(name, *_):
        if when == "while writing":
            Path(name).write_bytes(b"half a file")
        raise error("no space left")

    monkeypatch.setattr(saved.mlx_lm_cache, "save_prompt_cache", fail)
    with pytest.raises(OSError if error is RuntimeError else error):
        zm_mlx.save_prompt_cache(file, caches())
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_a_failed_rename_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(saved.os, "replace", fail)
    with pytest.raises(OSError):
        zm_mlx.save_prompt_cache(file, caches())
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_saving_twice_replaces_the_file_and_leaves_nothing_behind(file, model):
    zm_mlx.save_prompt_cache(file, caches(40))
    assert zm_mlx.load_prompt_cache(file, model)[0].table == 40
    assert os.listdir(file.parent) == [file.name]
