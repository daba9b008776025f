"""200 damaged files of saved prompts: each is refused with one error of ours, or gives exactly what was saved.

What test_saved_files.py does to files byte by byte is done here to what they are made of: tensors, header, metadata.
"""

import json
import resource
import signal
import sys
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

import zm_mlx
from zm_mlx.errors import UserError
from zm_mlx.host import saved
from zm_mlx.saved_prompt import Saved

FILES = 200
NOTES = {"model": "some/model", "tokens": json.dumps(list(range(90))), "tokenizer_config": "{}"}
SECONDS = 60  # for all files of a kind: what takes longer hangs


@pytest.fixture(scope="module")
def model():
    return tiny.model(1, head_dim=32)


@pytest.fixture(scope="module")
def files(tmp_path_factory, model):
    """Bytes of a compressed prompt, and of one that is held whole so far and whose rows become codes."""
    made = {}
    for name, how in (("numbers", {}), ("codes", {"kv_bits": 8, "prefill": "exact", "prompt_length": 70})):
        caches = zm_mlx.make_prompt_cache(model, 40, **how)
        tiny.feed(model, caches, tiny.prompt(60), 20)
        file = tmp_path_factory.mktemp("saved") / "a.safetensors"
        zm_mlx.save_prompt_cache(file, caches, NOTES)
        made[name] = file.read_bytes()
    return made


# ---- damage; each takes the bytes of a file and of another one, and a random generator


def parts(data):
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def whole(header, body):
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def two_tensors(header, rng):
    names = sorted(
        n for n in header if n != "__metadata__" and header[n]["data_offsets"][1] > header[n]["data_offsets"][0]
    )
    return rng.choice(names, 2, replace=False).tolist()


def truncated(data, other, rng):
    return data[: rng.integers(len(data))]


def flipped(data, other, rng):
    found = bytearray(data)
    for at in rng.integers(0, len(data), rng.integers(1, 9)):
        found[at] ^= 1 << int(rng.integers(8))
    return bytes(found)


def a_block_of_zeros(data, other, rng):
    """As a file system leaves it after a crash."""
    at, size = int(rng.integers(len(data))), int(rng.choice([1, 512, 4096]))
    return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]


def the_head_of_one_and_the_tail_of_another(data, other, rng):
    at = int(rng.integers(1, min(len(data), len(other))))
    return data[:at] + other[at:]


def the_header_of_another(data, other, rng):
    return whole(parts(other)[0], parts(data)[1])


def tensors_change_names(data, other, rng):
    header, body = parts(data)
    a, b = two_tensors(header, rng)
    header[a], header[b] = header[b], header[a]
    return whole(header, body)


def tensors_change_places(data, other, rng):
    header, body = parts(data)
    (a, b), (c, d) = sorted(header[n]["data_offsets"] for n in two_tensors(header, rng))
    return whole(header, body[:a] + body[c:d] + body[b:c] + body[a:b] + body[d:])


def a_tensor_is_gone(data, other, rng):
    header, body = parts(data)
    del header[two_tensors(header, rng)[0]]
    return whole(header, body)


def a_tensor_says_something_else(data, other, rng):
    header, body = parts(data)
    tensor = header[two_tensors(header, rng)[0]]
    tensor |= [
        {"shape": tensor["shape"][::-1]},
        {"shape": [2**40, *tensor["shape"]]},
        {"shape": [-1, *tensor["shape"]]},
        {"shape": "many"},
        {"dtype": "F16"},
        {"dtype": "X9"},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": tensor["data_offsets"][::-1]},
        {"data_offsets": []},
    ][rng.integers(9)]
    return whole(header, body)


def metadata_says_something_else(data, other, rng):
    header, body = parts(data)
    notes = header["__metadata__"]
    name = sorted(notes)[rng.integers(len(notes))]
    value = [notes[name] + "x", "", "[" * 5000, str(2**70), "KVCache", '{"format": 4}'][rng.integers(6)]
    if value == notes[name]:
        value = "another"
    notes[name] = value
    return whole(header, body)


def metadata_is_gone(data, other, rng):
    header, body = parts(data)
    notes = header["__metadata__"]
    del notes[sorted(notes)[rng.integers(len(notes))]]
    return whole(header, body)


def metadata_is_from_another(data, other, rng):
    header, body = parts(data)
    return whole({**header, "__metadata__": parts(other)[0]["__metadata__"]}, body)


def settings_say_something_else(data, other, rng):
    """A digit of the layout, the policy or the clock, which are text in a tensor of code points."""
    header, body = parts(data)
    texts = [
        t for n, t in sorted(header.items()) if n != "__metadata__" and t["dtype"] == "I32" and len(t["shape"]) == 1
    ]
    begin, end = texts[rng.integers(len(texts))]["data_offsets"]
    points = np.frombuffer(body[begin:end], np.int32).copy()
    digits = np.flatnonzero((points >= ord("0")) & (points <= ord("9")))
    at = digits[rng.integers(len(digits))]
    points[at] = ord("0") + (points[at] - ord("0") + rng.integers(1, 10)) % 10
    return whole(header, body[:begin] + points.tobytes() + body[end:])


def written_anew(data, other, rng):
    """With the same contents: what holds then is that it is refused, or equal."""
    header, body = parts(data)
    return whole(dict(sorted(header.items(), reverse=bool(rng.integers(2)))), body)


DAMAGE = (
    truncated,
    flipped,
    a_block_of_zeros,
    the_head_of_one_and_the_tail_of_another,
    the_header_of_another,
    tensors_change_names,
    tensors_change_places,
    a_tensor_is_gone,
    a_tensor_says_something_else,
    metadata_says_something_else,
    metadata_is_gone,
    metadata_is_from_another,
    settings_say_something_else,
    written_anew,
)


# ---- what must hold


def contents(made, notes):
    arrays = {n: np.array(x) if isinstance(x, mx.array) else x for n, x in tree_flatten([c.state for c in made])}
    return [type(c) for c in made], notes, arrays


def equal(found, before):
    assert found[:2] == before[:2] and found[2].keys() == before[2].keys()
    for name, x in found[2].items():
        np.testing.assert_array_equal(x, before[2][name])


@contextmanager
def bounded():
    """No hang, and no memory beyond a little."""

    def hangs(*_):
        raise AssertionError(f"{SECONDS} seconds were not enough")

    before, soft = signal.signal(signal.SIGALRM, hangs), resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(SECONDS)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, soft[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, soft)


@pytest.mark.parametrize("kind", ["numbers", "codes"])
def test_a_damaged_file_is_refused_or_gives_what_was_saved(tmp_path, model, files, kind):
    data, other = files[kind], files["codes" if kind == "numbers" else "numbers"]
    path = tmp_path / "cache.safetensors"
    path.write_bytes(data)
    before = contents(*saved.read(path))
    rng = np.random.default_rng(0 if kind == "numbers" else 1)
    mx.reset_peak_memory()
    tried = refused = 0
    with bounded():
        while tried < FILES // 2:
            damaged = DAMAGE[tried % len(DAMAGE)](data, other, rng)
            if damaged in (data, other):
                continue
            tried += 1
            path.write_bytes(damaged)
            try:
                found = contents(*saved.read(path))
            except ValueError as error:
                refused += 1
                assert str(path) in str(error)
                with pytest.raises(ValueError, match=r"cache\.safetensors"):
                    zm_mlx.load_prompt_cache(path, model)
                with pytest.raises(UserError, match="--prompt-cache-file"):
                    Saved.read(str(path))
            else:
                equal(found, before)
    assert refused > FILES // 2 - len(DAMAGE)  # or nothing was damaged
    assert mx.get_peak_memory() < mx.get_active_memory() + 10 * len(data)
