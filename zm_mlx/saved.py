"""Saving and loading prompt caches: checked against the model, complete or not there at all."""

import os
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache

from .budget import LayerShape
from .cache import ZeroMergeCache
from .hook import attach, probe, replace_caches

CHECKSUM = "zm_mlx_crc32"


def save_prompt_cache(path: str | os.PathLike[str], caches: list[Any], metadata: dict[str, str] | None = None) -> None:
    """Save caches to a ``.safetensors`` file that this and mlx-lm's own loader read.

    The file is written under another name and renamed: a crash leaves the old file, or none.
    Numbers in the state of mlx-lm's own caches come back as float32 where they are floats.

    Raises:
        ValueError: the path does not end in ``.safetensors``, or a cache has a pending update.
        OSError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"a prompt cache file ends in .safetensors, unlike {target}")
    if any(c._pending is not None for c in _zero_merge(caches)):
        raise ValueError("a cache has tokens that were never attended; save it between two calls of the model")
    part = target.with_name(f".{target.stem}.{os.getpid()}.safetensors")
    try:
        checked = {**(metadata or {}), CHECKSUM: str(_checksum(caches))}
        mlx_lm_cache.save_prompt_cache(str(part), caches, checked)
        os.replace(part, target)
    except RuntimeError as error:  # how mlx reports that it cannot open the file
        raise OSError(f"cannot write {target}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def load_prompt_cache(path: str | os.PathLike[str], model: nn.Module) -> list[Any]:
    """Load caches that ``save_prompt_cache`` (or mlx-lm) saved, check that they fit, attach the hook.

    Generation continues from them with the tokens it would have continued with when they were saved.

    Raises:
        ValueError: the file is truncated, damaged, foreign, of another version, or of another model.
        UnsupportedModelError: the model cannot be served.
        OSError: the file cannot be read.
    """
    caches, _ = read(path)
    own = _zero_merge(caches)
    if not own:
        raise ValueError(f"{path} holds no ZeroMerge caches: it was made by mlx-lm alone, so use mlx-lm's own cache")
    attach(model)
    expected = probe(model)
    mine = replace_caches(mlx_lm_cache.make_prompt_cache(model), lambda _: ZeroMergeCache(64))
    if [type(c) for c in caches] != [type(c) for c in mine] or len(own) != len(expected):
        raise ValueError(f"{path} was saved for another model: its layers differ ({len(caches)} against {len(mine)})")
    for i, (cache, shape) in enumerate(zip(own, expected, strict=True)):
        found = _shape(cache)
        if found is not None and found != shape:
            raise ValueError(f"{path} was saved for another model: layer {i} holds {found}, the model needs {shape}")
        if not isinstance(cache.table, int) and len(cache.table) != shape.heads:
            raise ValueError(
                f"{path} was saved for another model: layer {i} has rows for {len(cache.table)} KV heads, "
                f"the model has {shape.heads}"
            )
    return caches


def read(path: str | os.PathLike[str]) -> tuple[list[Any], dict[str, str]]:
    """Caches and metadata of a file, as far as they can be checked without a model.

    Raises:
        ValueError, OSError: as for ``load_prompt_cache``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no prompt cache file at {path}")
    try:
        caches, metadata = mlx_lm_cache.load_prompt_cache(str(path), return_metadata=True)
    except Exception as error:  # the loader meets whatever the file holds
        raise ValueError(
            f"{path} is not a prompt cache that can be read here: it is truncated, damaged, "
            f"of another version or something else ({type(error).__name__}: {error})"
        ) from error
    metadata = dict(metadata or {})
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and int(expected) != _checksum(caches):
        raise ValueError(f"{path} is damaged: its contents do not match their checksum")
    return caches, metadata


def _zero_merge(caches: list[Any]) -> list[ZeroMergeCache]:
    flat = [c for cache in caches for c in getattr(cache, "caches", (cache,))]
    return [c for c in flat if isinstance(c, ZeroMergeCache)]


def _shape(cache: ZeroMergeCache) -> LayerShape | None:
    if cache.recent is None:
        return None
    keys, values, _ = cache.recent
    return LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype.size, str(keys.dtype))


def _checksum(caches: list[Any]) -> int:
    crc = 0
    for name, x in tree_flatten([c.state for c in caches]):
        crc = zlib.crc32(name.encode(), crc)
        if isinstance(x, mx.array):
            data = np.array(mx.contiguous(x).reshape(-1).view(mx.uint8)) if x.size else np.zeros(0, np.uint8)
            crc = zlib.crc32(f"{x.shape} {x.dtype}".encode() + data.tobytes(), crc)
        else:
            crc = zlib.crc32(str(x).encode(), crc)
    return crc
