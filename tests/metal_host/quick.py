"""Short calls for tests: one launch of a kernel, and arrays to feed it with."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from . import metal_kernel


def run(
    source: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, tuple[Sequence[int], mx.Dtype]],
    grid: int | tuple[int, int, int],
    group: int | tuple[int, int, int],
    *,
    header: str = "",
    template: Sequence[tuple[str, Any]] | None = None,
    init_value: float | None = None,
    **kernel: Any,
) -> list[mx.array]:
    """The outputs of one launch; a number for grid or group is its x."""
    call = metal_kernel(
        name="planted",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        **kernel,
    )
    return call(
        inputs=list(inputs.values()),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        grid=grid if isinstance(grid, tuple) else (grid, 1, 1),
        threadgroup=group if isinstance(group, tuple) else (group, 1, 1),
        template=template,
        init_value=init_value,
    )


def values(array: mx.array) -> Any:
    """As float32."""
    return np.array(array.astype(mx.float32))


def ramp(n: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """0, 1, 2, ..."""
    return mx.arange(n).astype(dtype)
