"""What all kernels share: where their Metal sources are, how they are built, which shapes they serve."""

from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
TILE = 8  # query heads that share one read of a row
SIMD = 32
MAX_THREADGROUP_BYTES = 32 * 1024


def metal_folder() -> Path:
    """The folder of the Metal sources: in the installed package, else beside it in a checkout.

    Raises:
        FileNotFoundError: naming both places.
    """
    package = Path(__file__).parents[2]
    places = (package / "metal", package.parent / "metal")
    for place in places:
        if (place / "common.h").is_file():
            return place
    raise FileNotFoundError(f"the Metal sources are neither in {places[0]} nor in {places[1]}")


@cache
def kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], coded: bool = False) -> Any:
    """The kernel of ``metal/<name>.metal``, for rows of codes if asked for; built by MLX when it is first launched."""
    folder = metal_folder()
    return mx.fast.metal_kernel(
        name=f"zm_{name}_coded" if coded else f"zm_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=(folder / f"{name}.metal").read_text(),
        header=("#define ZM_CODED\n" if coded else "") + (folder / "common.h").read_text(),
    )


def serves(head_dim: int, value_dim: int, dtype: mx.Dtype) -> bool:
    """Whether the kernels are written for these shapes."""
    return head_dim in HEAD_DIMS and value_dim in HEAD_DIMS and dtype in DTYPES


def addressable(x: mx.array) -> mx.array:
    """x, or its elements among more: MLX puts arrays of fewer than 8 where pointers of functions do not reach."""
    return x if x.size >= 8 else mx.pad(x.reshape(-1), (0, 8 - x.size))


def present(x: mx.array) -> mx.array:
    """x, or something in its place that has an address and is never read: no input may be without elements."""
    return x if x.size else mx.zeros((*[1] * (x.ndim - 1), 8), x.dtype)
