"""Where the Metal kernels run in this test run; the first line of the report says it."""

import sys

import mlx.core as mx
import pytest

from zm_mlx.calibration import finding

# The executor of Metal source is written for Linux; elsewhere its tests are not collected, and the header says so.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_metal_host*.py", "test_kernel_*.py"]


@pytest.fixture(autouse=True, scope="session")
def tables(tmp_path_factory):
    """No table of whoever runs the tests is used in them; the folder in its place."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding, "user_folder", lambda: folder)
        yield folder


def gpu_runs_kernels() -> bool:
    """Whether a one-line custom kernel runs right on a Metal GPU (hosted Macs may lack a usable one)."""
    if not (mx.metal.is_available() and mx.default_device() == mx.gpu):
        return False
    try:
        kernel = mx.fast.metal_kernel(
            name="zm_probe",
            input_names=["a"],
            output_names=["b"],
            source="uint i = thread_position_in_grid.x; b[i] = 2 * a[i];",
        )
        (doubled,) = kernel(
            inputs=[mx.arange(8.0)],
            grid=(8, 1, 1),
            threadgroup=(8, 1, 1),
            output_shapes=[(8,)],
            output_dtypes=[mx.float32],
        )
        return doubled.tolist() == [2.0 * i for i in range(8)]
    except Exception:
        return False


def pytest_report_header() -> str:
    if gpu_runs_kernels():
        where = "on the Metal GPU"
        return f"Metal kernels: {where}" + ("" if not collect_ignore_glob else "; the executor's tests need Linux")
    if collect_ignore_glob:
        return "Metal kernels: NOT RUN, no usable Metal GPU here and the executor needs Linux"
    return "Metal kernels: from their own source on the CPU (tests/metal_host)"
