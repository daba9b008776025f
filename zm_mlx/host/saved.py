"""Saving and loading prompt caches: checked against the model, complete or not there at all."""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..ops.choose import Mode, mode
from ..policies import Policy
from ..state.layout import LayerShape
from .cache import ZeroMergeCache
from .hook import replace_caches
from .model_caches import members, zero_merge
from .own_caches import own_caches
from .probe import probe

RESERVED = "zm_mlx_"  # how names of metadata begin that are not the user's
CHECKSUM = RESERVED + "sha256"  # of the whole file, with zeros in place of the checksum itself
KERNELS = RESERVED + "kernels"
BLANK = b"0" * 64
# A quote inside of a JSON string is escaped, so no name or value of a user looks like this.
STATED = re.compile(rb'"0\.%s":"([0-9a-f]{64})"' % CHECKSUM.encode())
HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors format

MAKER = "python -m zm_mlx.cache_prompt"


def save_prompt_cache(path: str | os.PathLike[str], caches: list[Any], metadata: dict[str, str] | None = None) -> None:
    """Save caches to a ``.safetensors`` file for ``load_prompt_cache``.

    mlx-lm's own ``load_prompt_cache`` reads the file too, once ``zm_mlx`` has been imported: without
    the import it does not know the class of the caches, and nothing attends to them.

    The file is written beside the old one and renamed: a crash leaves the old file, or none. A
    symbolic link stays one, and its target is replaced; an old file's permissions stay as they are.
    Numbers in the state of mlx-lm's own caches come back as float32 where they are floats.

    Args:
        path: the file.
        caches: as ``make_prompt_cache`` made them, between two calls of the model.
        metadata: names and values, which ``read`` gives back.

    Raises:
        ValueError: the path does not end in ``.safetensors``, no cache is a ZeroMerge cache, one has
            a pending update, or the metadata holds something else than strings.
        OSError: the file cannot be written.
    """
    path = Path(path)
    _check_suffix(path)
    if not isinstance(caches, list | tuple) or not zero_merge(caches):
        raise ValueError("there is no ZeroMerge cache to save; mlx-lm's own caches are saved with mlx-lm")
    if foreign := [c for c in members(caches) if not hasattr(type(c), "state")]:
        raise ValueError(f"a cache must be one of mlx-lm or zm_mlx, not {foreign[0]!r}")
    if any(c.pending for c in zero_merge(caches)):
        raise ValueError("a cache has tokens that were never attended; save it between two calls of the model")
    noted = {
        **_checked(metadata),
        CHECKSUM: BLANK.decode(),
        KERNELS: ",".join(c.kernels for c in zero_merge(caches)),
    }
    try:
        _replace(Path(os.path.realpath(path)), list(caches), noted)
    except (OSError, RuntimeError) as error:  # what Python says of the temporary file, or mlx of its arrays
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        raise OSError(number or errno.EIO, f"cannot write the prompt cache: {reason or error}", str(path)) from error


def load_prompt_cache(path: str | os.PathLike[str], model: nn.Module, *, kernels: Mode | None = None) -> list[Any]:
    """Load caches that ``save_prompt_cache`` saved, check that they fit, attach the hook.

    Generation continues from them with the tokens it would have continued with when they were saved.

    Args:
        path: the file.
        model: the model that the caches were filled with.
        kernels: as for ``make_prompt_cache``; without it what the caches were made with, if that was
            "metal" or "ops".

    Raises:
        ValueError: the file is truncated, damaged, foreign, of another version, or of another model.
        UnsupportedModelError: the model cannot be served.
        OSError: the file cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an mlx-lm model, as mlx_lm.load returns it, not {model!r}")
    chosen = kernels and mode(kernels)
    caches, _ = read(path)
    if difference := _difference(caches, _filled(model, probe(model))):
        raise ValueError(f"{path} was saved for another model: {difference}")
    for cache in zero_merge(caches):
        cache.kernels = chosen or cache.kernels
    return caches


def read(path: str | os.PathLike[str]) -> tuple[list[Any], dict[str, str]]:
    """Caches and the user's metadata of a file, as far as they can be checked without a model.

    Raises:
        ValueError, OSError: as for ``load_prompt_cache``.
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"{path} is no file") if path.exists() else FileNotFoundError(f"no prompt cache file at {path}")
    try:
        _check_suffix(path)
        # mlx takes the kind of a file from its name, and knows no names that are not Unicode.
        with open("cache.safetensors", "rb", opener=lambda _, flags: os.open(path, flags)) as file:
            noted = _verified(file)
            file.seek(0)
            caches: list[Any] = mlx_lm_cache.load_prompt_cache(file)
            mx.eval([c.state for c in caches])  # mlx reads an array when it is used, but the file may change
    except OSError:
        raise
    except Exception as error:  # a state of another version may break anywhere
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a prompt cache that can be read here: {reason}") from error
    for cache, kernels in zip(zero_merge(caches), noted[KERNELS].split(","), strict=True):
        if kernels != "auto":
            cache.kernels = mode(kernels)  # type: ignore[arg-type]
    return caches, {name: value for name, value in noted.items() if not name.startswith(RESERVED)}


def _check_suffix(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"a prompt cache file ends in .safetensors, unlike {path}")


def _checked(metadata: dict[str, str] | None) -> dict[str, str]:
    """The metadata, if a file can hold it."""
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"metadata must be a dictionary of strings, not {type(metadata).__name__}")
    for item in (metadata or {}).items():
        if not all(isinstance(x, str) for x in item):
            raise ValueError(f"metadata must be strings, names and values alike, unlike {item[0]!r}: {item[1]!r}")
        if item[0].startswith(RESERVED):
            raise ValueError(f"the metadata {item[0]!r} cannot be saved: names with {RESERVED} belong to zm_mlx")
        if re.search(r"\.\W*\d", item[0]):  # and makes as long a list
            raise ValueError(f"the metadata {item[0]!r} cannot be saved: mlx-lm reads a number after a dot as an index")
        try:
            "".join(item).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the metadata {item[0]!r} cannot be saved: it is no valid Unicode ({error})") from error
    return dict(metadata or {})


# ---- writing


def _replace(target: Path, caches: list[Any], noted: dict[str, str]) -> None:
    """Write a file beside ``target``, with its owner and permissions where it exists, and let it take its place."""
    old = None
    if target.is_symlink():  # resolved, and still a link
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if target.exists():
        if not target.is_file():
            kind = errno.EISDIR if target.is_dir() else errno.EINVAL
            raise OSError(kind, os.strerror(kind))
        if not os.access(target, os.W_OK):  # a rename would not mind
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        old = target.stat()

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, 0o666 if old is None else 0o600)

    part = target.with_name(f".zm_mlx-{secrets.token_hex(8)}.safetensors")
    try:
        with open(part, "x+b", opener=opener) as file:
            if old is not None:
                with suppress(OSError):  # only root may give files away
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
            mlx_lm_cache.save_prompt_cache(file, caches, noted)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _seal(file: BinaryIO) -> None:
    """Write a file's checksum into the place that was left for it."""
    header = _header(file)
    place = STATED.search(header)
    if place is None:
        raise ValueError("mlx wrote the metadata in another form than zm_mlx knows")
    digest = _digest(file, header, place)
    file.seek(8 + place.start(1))
    file.write(digest)


# ---- reading


def _verified(file: BinaryIO) -> dict[str, str]:
    """The metadata of a file in which every byte is as it was written.

    Raises:
        ValueError: another kind of file, of another version, or damaged (the message says which).
    """
    header = _header(file)
    stated = STATED.search(header)
    if stated is not None and _digest(file, header, stated) != stated[1]:
        raise ValueError("it is truncated, damaged or changed: its contents do not match their checksum")
    metadata = _metadata(header)
    if stated is not None:
        return {name[2:]: value for name, value in metadata.items() if name.startswith("0.")}
    classes = {value for name, value in metadata.items() if name.startswith("1.")}
    if not classes:
        raise ValueError("it holds something else, or is damaged")
    if not classes & {ZeroMergeCache.__name__, mlx_lm_cache.CacheList.__name__}:
        raise ValueError(
            f"it holds no ZeroMerge caches: it was made by mlx-lm alone, whose caches are mlx-lm's to load. "
            f"To make one for zm_mlx: {MAKER}"
        )
    raise ValueError(
        "it has no checksum: it was saved by another version of zm_mlx or by mlx-lm, or is damaged. "
        f"To make one for this version: {MAKER}"
    )


def _header(file: BinaryIO) -> bytes:
    """The header of a safetensors file, as JSON; the length that the file claims for it is not believed."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError("it is truncated, damaged or something else: its header is longer than the file")
    if length > HEADER_LIMIT:
        raise ValueError(f"its header is longer than the {HEADER_LIMIT} bytes that the format allows")
    return file.read(length)


def _digest(file: BinaryIO, header: bytes, place: re.Match[bytes]) -> bytes:
    """SHA-256 of a whole file as hexadecimal digits, with zeros in place of the checksum."""
    digest = hashlib.sha256(len(header).to_bytes(8, "little"))
    digest.update(header[: place.start(1)] + BLANK + header[place.end(1) :])
    file.seek(8 + len(header))
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest().encode()


def _metadata(header: bytes) -> dict[str, str]:
    try:
        metadata = json.loads(header)["__metadata__"]
        return {str(name): str(value) for name, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


# ---- comparing with the model


def _filled(model: nn.Module, shapes: list[LayerShape]) -> list[Any]:
    """Caches of a model after one token; only their shapes are computed."""

    def make(i: int) -> ZeroMergeCache:
        return ZeroMergeCache(Policy().layout(64, shapes[i].heads), kernels="ops")

    caches = replace_caches(own_caches(model), make)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    return caches


def _difference(caches: Sequence[Any], needed: Sequence[Any]) -> str | None:
    """How caches differ from those that a model needs, if they do."""
    if len(caches) != len(needed):
        return f"its layers differ ({len(caches)} against {len(needed)})"
    for i, (cache, other) in enumerate(zip(caches, needed, strict=True)):
        if (kind := _kind(cache)) != _kind(other):
            return f"layer {i} holds {kind}, the model needs {_kind(other)}"
        for found, right in zip(members([cache]), members([other]), strict=True):
            facts, others = _facts(found), _facts(right)
            for name in facts:
                if name in others and facts[name] != others[name]:
                    return f"layer {i} has {name} {facts[name]}, the model needs {others[name]}"
    return None


def _kind(cache: Any) -> str:
    """The class of a cache, and those of its members."""
    name = type(cache).__name__
    inner = getattr(cache, "caches", None)
    return f"{name}({', '.join(map(_kind, inner))})" if isinstance(inner, list | tuple) else name


def _facts(cache: Any) -> dict[str, Any]:
    """What a model decides about a cache, as far as the cache knows it yet."""
    if isinstance(cache, mlx_lm_cache.ArraysCache):
        # [batch, ...], or with a number of tokens in between: [batch, tokens, channels]
        shapes = {
            f"array {i} of": x.shape[1 if x.ndim > 3 else 2 :] for i, x in enumerate(cache.cache) if x is not None
        }
        return {"arrays:": len(cache.cache), **shapes}
    facts = {name: getattr(cache, name, None) for name in ("max_size", "chunk_size", "keep")}
    keys, values = (getattr(cache, name, None) for name in ("keys", "values"))
    if isinstance(cache, ZeroMergeCache):
        facts |= {"shape": cache.shape, "rows for KV heads:": cache.layout.heads}
    elif keys is not None and values is not None:
        facts["shape"] = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype.size, str(keys.dtype))
    return {name: x for name, x in facts.items() if x is not None}
