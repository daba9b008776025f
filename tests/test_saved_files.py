"""Files of saved caches: written whole or not at all, and read only when every byte is as it was written."""

import errno
import json
import os
import re
import resource
import stat
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache

import zm_mlx
from zm_mlx.host import saved
from zm_mlx.policies import Policy

NOTES = {"model": "some/model", "tokenizer_config": '{"trust_remote_code": null}', "empty": ""}


def caches(rows=20, layers=2):
    return [tiny.cache(rows, policy=Policy(residual=2, staging=3)) for _ in range(layers)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


@pytest.fixture(scope="module")
def model():
    return tiny.model(1)


@pytest.fixture
def file(path, model):
    """A saved cache of 50 tokens in 20 rows."""
    made = caches()
    tiny.feed(model, made, tiny.prompt(50))
    zm_mlx.save_prompt_cache(path, made, NOTES)
    return path


def header_of(data):
    return 8 + int.from_bytes(data[:8], "little")


def contents(path):
    """Everything that a file gives, as values that can be compared."""
    made, notes = saved.read(path)
    arrays = {name: np.array(x) if isinstance(x, mx.array) else x for name, x in tree_flatten([c.state for c in made])}
    return [type(c) for c in made], notes, [c.kernels for c in made], arrays


def assert_refused(path, model, match=""):
    for load in (saved.read, lambda p: zm_mlx.load_prompt_cache(p, model)):
        with pytest.raises(ValueError, match=match) as found:
            load(path)
        assert str(path) in str(found.value)


# ---- damage


@pytest.mark.parametrize("keep", ["0", "1", "7", "8", "header", "all but the data", "half", "all but one byte"])
def test_a_truncated_file_raises(file, model, keep):
    data = file.read_bytes()
    header = header_of(data)
    known = {"header": header - 5, "all but the data": header, "half": len(data) // 2, "all but one byte": -1}
    file.write_bytes(data[: known.get(keep) or int(keep)])
    assert_refused(file, model, "truncated, damaged")


@pytest.mark.parametrize("more", [b"\0", b"more", b"\0" * 5000, "twice"])
def test_bytes_after_the_end_raise(file, model, more):
    data = file.read_bytes()
    file.write_bytes(data + (data if more == "twice" else more))
    assert_refused(file, model, "truncated, damaged")


@pytest.mark.parametrize("at", [0.0, 0.1, 0.37, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("bit", [1, 128])
def test_one_flipped_bit_in_the_data_raises(file, model, at, bit):
    data = bytearray(file.read_bytes())
    begin = header_of(data)
    data[begin + int(at * (len(data) - begin - 1))] ^= bit
    file.write_bytes(data)
    assert_refused(file, model, "damaged")


def test_a_flipped_bit_at_every_place_of_the_header_raises(file, model):
    data = file.read_bytes()
    for at in range(header_of(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|longer than"):
            saved.read(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"some/model", b"evil/model"),
        (b'"0.model"', b'"0.mobel"'),
        (b'"0.zm_mlx_kernels":"auto,auto"', b'"0.zm_mlx_kernels":"ops,ops"  '),
        (b'"1.0":"ZeroMergeCache"', b'"1.0":"KVCache"       '),
        (b'"0.empty":"",', b"             "),
        (b'"0.zm_mlx_sha256"', b'"0.zm_mlx_sha257"'),
        (b"zm_mlx_sha256", b"zm_mlx_crc320"),
    ],
)
def test_changed_metadata_or_class_names_raise(file, model, old, new):
    data = file.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    file.write_bytes(data.replace(old, new))
    assert_refused(file, model, "damaged")


def test_a_rewritten_header_with_the_same_contents_raises_too(file, model):
    data = file.read_bytes()
    end = header_of(data)
    header = json.dumps(json.loads(data[8:end]), indent=1).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    assert_refused(file, model, "damaged")


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_raises_valueerror_or_changes_nothing(file, seed):
    before, data = contents(file), file.read_bytes()
    random = np.random.default_rng(seed)
    for _ in range(32):
        damaged = bytearray(data)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(0, min(len(damaged), 10**9 if random.random() < 0.5 else 1500) + 1))
            some = random.bytes(int(random.choice([1, 1, 2, 16, 300])))
            kind = random.integers(0, 4)
            if kind == 0:
                del damaged[at:]
            elif kind == 1:
                damaged[at : at + len(some)] = some
            elif kind == 2:
                damaged[at:at] = some
            else:
                damaged += some
        file.write_bytes(damaged)
        try:
            found = contents(file)
        except ValueError as error:
            assert str(file) in str(error)
        else:
            assert found[:3] == before[:3] and damaged == data


@pytest.mark.parametrize("length", [10**15, 2**63, 2**64 - 1, 10**8 + 1, 50_000])
def test_a_header_that_claims_more_than_the_file_has_is_not_read(file, model, length):
    data = file.read_bytes()
    file.write_bytes(length.to_bytes(8, "little") + data[8:])
    assert_refused(file, model, "longer than")


@pytest.mark.parametrize("claim", [10**15, 2**62])
def test_an_array_that_claims_more_than_the_file_has_is_not_allocated(path, model, claim):
    tensor = {"dtype": "F32", "shape": [claim], "data_offsets": [0, 4 * claim]}
    header = json.dumps({"0.0": tensor, "__metadata__": {"1.0": "ZeroMergeCache", "2.0": ""}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    assert_refused(path, model, "no checksum")


def test_a_sparse_file_with_an_absurd_header_is_not_read(path, model):
    with path.open("wb") as made:
        made.write((10**9).to_bytes(8, "little"))
        made.truncate(2 * 10**9)
    assert_refused(path, model, "longer than the 100000000 bytes that the format allows")


# ---- files that are no caches of ours


def test_a_missing_file_raises_and_names_the_path(path, model):
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        zm_mlx.load_prompt_cache(path, model)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_raises_oserror(path, model, make):
    make(path)
    with pytest.raises(OSError, match=re.escape(str(path))):
        zm_mlx.load_prompt_cache(path, model)


def test_another_suffix_is_refused_by_name(file, model):
    other = file.rename(file.with_suffix(".bin"))
    assert_refused(other, model, r"ends in \.safetensors")


@pytest.mark.parametrize("metadata", [None, {}, {"0": "x"}, {"format": "mlx"}, {"0.a": "b", "1": "Zebra", "2.0": ""}])
def test_a_foreign_safetensors_file_raises(path, model, metadata):
    mx.save_safetensors(str(path), {"model.weight": mx.ones((4, 4))}, metadata)
    assert_refused(path, model, "not a prompt cache.*something else")


@pytest.mark.parametrize("content", [b"", b"hello\n", b"{}", b"a long text that is no tensor at all\n" * 50])
def test_a_text_file_with_the_right_name_raises(path, model, content):
    path.write_bytes(content)
    assert_refused(path, model, "not a prompt cache")


@pytest.mark.parametrize("header", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 10**5, b'{"__metadata__": [1]}', b"\0" * 99])
def test_a_header_that_is_no_header_raises(path, model, header):
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert_refused(path, model, "not a prompt cache")


def test_a_cache_of_mlx_lm_alone_raises_and_names_the_maker(path, model):
    plain = [mlx_lm_cache.KVCache() for _ in range(2)]
    tiny.feed(model, plain, tiny.prompt(20))
    mlx_lm_cache.save_prompt_cache(str(path), plain)
    assert_refused(path, model, "no ZeroMerge caches: it was made by mlx-lm alone.*python -m zm_mlx.cache_prompt")


@pytest.mark.parametrize("container", [lambda c: c, mlx_lm_cache.CacheList], ids=["plain", "CacheList"])
@pytest.mark.parametrize("metadata", [{}, {"zm_mlx_crc32": "12345"}])
def test_a_file_without_a_checksum_raises_and_says_another_version(path, model, container, metadata):
    mlx_lm_cache.save_prompt_cache(str(path), [container(c) for c in caches()], metadata)
    assert_refused(path, model, "another version of zm_mlx or by mlx-lm.*python -m zm_mlx.cache_prompt")


def test_a_file_of_another_format_version_raises(path, model, monkeypatch):
    monkeypatch.setattr("zm_mlx.packed.FORMAT", 12345)
    zm_mlx.save_prompt_cache(path, caches())
    monkeypatch.undo()
    assert_refused(path, model, "another version of zm_mlx")


# ---- writing


@pytest.mark.parametrize("target", ["kept", "other name", "relative", "chain", "not there yet"])
def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path, model, target):
    folder = tmp_path / "folder"
    folder.mkdir()
    real, link = folder / ("blob" if target == "other name" else "real.safetensors"), tmp_path / "link.safetensors"
    if target != "not there yet":
        real.write_bytes(b"old")
    if target == "chain":
        between = tmp_path / "between.safetensors"
        between.symlink_to(real)
        link.symlink_to(between)
    else:
        link.symlink_to(Path("folder", real.name) if target == "relative" else real)
    zm_mlx.save_prompt_cache(link, caches(40))
    assert link.is_symlink() and not real.is_symlink() and os.listdir(folder) == [real.name]
    assert zm_mlx.load_prompt_cache(link, model)[0].layout.capacity == 40


def test_a_link_to_itself_raises_and_stays(path):
    path.symlink_to(path)
    with pytest.raises(OSError, match=re.escape(str(path))):
        zm_mlx.save_prompt_cache(path, caches())
    assert path.is_symlink() and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_permissions_of_an_old_file_stay_and_nobody_reads_the_new_one_before(file, monkeypatch, mode):
    file.chmod(mode)
    seen, save = [], saved.mlx_lm_cache.save_prompt_cache

    def watched(to, *more):
        save(to, *more)
        seen.append(stat.S_IMODE(os.stat(to.name).st_mode))

    monkeypatch.setattr(saved.mlx_lm_cache, "save_prompt_cache", watched)
    zm_mlx.save_prompt_cache(file, caches(40))
    assert [*seen, stat.S_IMODE(file.stat().st_mode)] == [mode, mode]


def test_a_new_file_gets_the_permissions_of_any_new_file(path):
    zm_mlx.save_prompt_cache(path, caches())
    (path.parent / "other").write_bytes(b"")
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


def test_a_file_or_folder_that_may_not_be_written_raises_and_stays(file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr(saved.os, "access", lambda *_: False)  # permissions do not bind root
    with pytest.raises(PermissionError, match=re.escape(str(file))):
        zm_mlx.save_prompt_cache(file, caches())
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_a_place_where_no_file_can_be_raises_oserror_with_the_path(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.safetensors")
    before = sorted(os.listdir(tmp_path))
    for name in ("folder.safetensors", "nowhere/a.safetensors", "file/a.safetensors", "pipe.safetensors"):
        with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
            zm_mlx.save_prompt_cache(tmp_path / name, caches())
    with pytest.raises(OSError, match="too long"):
        zm_mlx.save_prompt_cache(tmp_path / (300 * "a" + ".safetensors"), caches())
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", ["ü" * 121 + "a", "\udcff", "a\nb"], ids=["as long as allowed", "no Unicode", "lines"])
def test_any_name_that_the_file_system_takes_works(tmp_path, model, name):
    path = tmp_path / f"{name}.safetensors"
    try:
        path.touch()
    except OSError as error:
        pytest.skip(f"not here: {error}")
    zm_mlx.save_prompt_cache(path, caches())
    assert len(zm_mlx.load_prompt_cache(path, model)) == 2


def test_a_full_disk_raises_and_leaves_the_old_file(file):
    before, (soft, hard) = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=re.escape(str(file))) as found:
            zm_mlx.save_prompt_cache(file, caches(400, layers=30))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found.value.errno == errno.EFBIG
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "while writing"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(file, monkeypatch, error, when):
    before = file.read_bytes()

    def fail(to, *_):
        if when == "while writing":
            to.write(b"half a file")
        raise error("no space left")

    monkeypatch.setattr(saved.mlx_lm_cache, "save_prompt_cache", fail)
    with pytest.raises(OSError if error is RuntimeError else error):
        zm_mlx.save_prompt_cache(file, caches())
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_the_new_file_is_whole_and_on_the_disk_before_it_takes_the_old_ones_place(file, monkeypatch):
    """So a process that is killed at any moment leaves one or the other."""
    before, synced, replace = file.read_bytes(), [], os.replace

    def watched(part, target):
        assert synced and target.read_bytes() == before
        assert contents(part)[1] == {"new": "notes"}
        replace(part, target)

    monkeypatch.setattr(saved.os, "fsync", lambda _: synced.append(True))
    monkeypatch.setattr(saved.os, "replace", watched)
    zm_mlx.save_prompt_cache(file, caches(40), {"new": "notes"})
    assert contents(file)[1] == {"new": "notes"}


def test_a_failed_rename_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(saved.os, "replace", fail)
    with pytest.raises(OSError, match=re.escape(str(file))):
        zm_mlx.save_prompt_cache(file, caches())
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_saving_twice_replaces_the_file_and_leaves_nothing_behind(file, model):
    zm_mlx.save_prompt_cache(file, caches(40))
    assert zm_mlx.load_prompt_cache(file, model)[0].layout.capacity == 40
    assert os.listdir(file.parent) == [file.name]
