"""Which module computes: plain ops (``compress``, ``decode`` for one token) or the Metal kernels of ``kernels``.

The functions here have the signatures of ``compress``; ``bind`` is ``attend`` for one token after the
other. On a Mac with Metal the kernels are the default, elsewhere the plain ops; the environment
variable ``ZM_MLX_KERNELS`` (auto, metal, ops) and the argument ``kernels`` of a cache override that.
Before its first use with a dtype and shape class a kernel is compared with its twin on small data.
One that differs or does not compile is left out for the rest of the process, with a warning that
names it: the text is never wrong because a GPU or an operating system is new.
"""

import os
import warnings
from functools import cache
from typing import Any, Literal

import mlx.core as mx

from . import compress, decode
from .stores import Kept, Recent

ENVIRONMENT = "ZM_MLX_KERNELS"
MODES = ("auto", "metal", "ops")

Mode = Literal["auto", "metal", "ops"]


def attend(
    queries: mx.array, kept: Kept, recent: Recent, *, kernels: Mode | None = None, **how: Any
) -> tuple[mx.array, mx.array, mx.array]:
    """``compress.attend``; one query a sequence takes the kernel ``attend``, more take ``attend_chunk``."""
    name = "attend" if queries.shape[2] == 1 else "attend_chunk"
    chosen = _kernel(name, kernels, recent, queries, how["layout"].heads)
    return (chosen or compress.attend)(queries, kept, recent, **how)


def bind(queries: mx.array, kept: Kept, recent: Recent, *, kernels: Mode | None = None, **how: Any) -> decode.Step:
    """``attend`` for one token after the other until the next compaction, as ``decode.bind``.

    Args:
        queries, recent: like those to come, in shape and dtype.
    """
    if _kernel("attend", kernels, recent, queries, how["layout"].heads):
        from .kernels.attend import bind

        return bind(kept, **how)
    if queries.dtype == recent.keys.dtype == mx.float32:
        return decode.bind(kept, **how)

    def step(queries: mx.array, kept_score: mx.array, recent: Recent, live: int) -> decode.Result:
        # Rows of 16 bits are converted in tiles, which compress does.
        out, *scores = compress.attend(queries, kept._replace(score=kept_score), recent, live=live, **how)
        return mx.depends(out, scores), *scores

    return step


def score(
    queries: mx.array, kept: Kept, recent: Recent, *, kernels: Mode | None = None, **how: Any
) -> tuple[mx.array, mx.array]:
    """``compress.score``."""
    chosen = _kernel("score", kernels, recent, queries, how["layout"].heads)
    return (chosen or compress.score)(queries, kept, recent, **how)


def compact(kept: Kept, recent: Recent, *, kernels: Mode | None = None, **how: Any) -> Kept:
    """``compress.compact``."""
    return (_kernel("compact", kernels, recent) or compress.compact)(kept, recent, **how)


def mode(kernels: Mode | None = None) -> Mode:
    """The mode in force: the argument, else the environment, else auto.

    Raises:
        ValueError: it is none of auto, metal, ops.
    """
    found = kernels or os.environ.get(ENVIRONMENT) or "auto"
    if found not in MODES:
        where = "kernels" if kernels else ENVIRONMENT
        raise ValueError(f"{where} must be one of {', '.join(MODES)}, not {found!r}")
    return found  # type: ignore[return-value]


def has_metal() -> bool:
    """Whether MLX computes on a Metal GPU here."""
    return bool(mx.metal.is_available() and mx.default_device() == mx.gpu)


def _kernel(name: str, kernels: Mode | None, recent: Recent, queries: mx.array | None = None, heads: int = 1) -> Any:
    """The kernel's wrapper, or ``None`` where the plain ops compute."""
    asked = mode(kernels)
    if asked == "ops" or (asked == "auto" and not has_metal()):
        return None
    dtype, groups = recent.keys.dtype, 1 if queries is None else queries.shape[1] // heads
    if queries is not None and queries.dtype != dtype:  # the kernels take one dtype for queries and rows
        return None
    return _verified(name, recent.keys.shape[-1], recent.values.shape[-1], dtype, min(groups, 8))


@cache
def _verified(name: str, head_dim: int, value_dim: int, dtype: mx.Dtype, groups: int) -> Any:
    from .kernels._common import serves
    from .kernels.check import Case, compare, kernel_of

    if not serves(head_dim, value_dim, dtype):
        warnings.warn(
            f"zm_mlx: the Metal kernels are not written for head dims {head_dim} and {value_dim} in {dtype}; "
            "plain MLX operations are used",
            stacklevel=2,
        )
        return None
    try:
        wrong = compare(name, Case(dtype, head_dim, value_dim, groups)).complaint
    except Exception as error:  # a shader compiler may fail in any way
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(
            f"zm_mlx: the Metal kernel {name!r} is left out on this machine ({wrong}); plain MLX operations are used. "
            "Please report the last line of: python -m zm_mlx.doctor",
            stacklevel=2,
        )
        return None
    return kernel_of(name)
