"""The kernels on a real Metal GPU, where there is one that runs them."""

import mlx.core as mx
import pytest
from conftest import gpu_runs_kernels

from zm_mlx.ops import check
from zm_mlx.ops.kernels._common import DTYPES, HEAD_DIMS

if not gpu_runs_kernels():
    pytest.skip("no Metal GPU that runs custom kernels", allow_module_level=True)


@pytest.mark.parametrize("name", check.NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("groups", [1, 4, 7])
def test_kernels_equal_the_plain_ops_on_the_gpu(name: str, dtype: mx.Dtype, dim: int, groups: int) -> None:
    assert check.compare(name, check.Case(dtype, dim, dim, groups)).complaint == ""
