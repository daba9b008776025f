"""``python -m zm_mlx.doctor``: every Metal kernel against the plain ops on this machine.

Prints a table of errors and times, which tables of rows per KV head are here, and ends with one line for a bug
report: chip, system, versions, each kernel OK or not. Exit code 1 if a kernel is wrong.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from . import __version__
from .calibration import finding
from .calibration.table import MAKER, Table, TableError
from .ops import check
from .ops.choose import CODED, has_metal
from .ops.kernels._common import DTYPES, HEAD_DIMS, metal_folder
from .state.coding import BITS, Coding, CodingError

GROUPS = (1, 4, 7)
REPEATS = 5


@dataclass(frozen=True)
class Row:
    """One kernel on one combination of dtype, bits of a code (none: rows are numbers) and shapes; milliseconds."""

    kernel: str
    dtype: str
    bits: int | None
    head_dim: int
    groups: int
    rows: int
    error: float
    kernel_ms: float
    ops_ms: float
    complaint: str


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m zm_mlx.doctor",
        description="Check the Metal kernels on this machine against plain MLX operations",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON document instead of the table")
    parser.add_argument("--rows", type=int, default=1024, help="Rows per KV head (default: 1024)")
    args = parser.parse_args(argv)
    if args.rows < 64:
        parser.error(f"--rows must be 64 or more, not {args.rows}")
    rows = examine(args.rows) if has_metal() else []
    if args.json:
        facts = {"machine": machine(), "metal": has_metal(), "rows": [asdict(r) for r in rows], "tables": head_tables()}
        print(json.dumps(facts))
    else:
        print(table(rows))
        print("\n".join(head_tables() or [f"No tables of rows per KV head here: {MAKER} makes one for a model."]))
    print(summary(rows), file=sys.stderr if args.json else sys.stdout)
    return 1 if any(r.complaint for r in rows) else 0


def examine(
    count: int,
    dtypes: Sequence[mx.Dtype] = DTYPES,
    head_dims: Sequence[int] = HEAD_DIMS,
    groups: Sequence[int] = GROUPS,
) -> list[Row]:
    """All kernels over all combinations, ``count`` rows per head."""
    found = []
    cases = [
        (name, check.Case(dtype, dim, dim, group, rows=count, coding=coding))
        for name, dtype, dim, group in product(check.NAMES, dtypes, head_dims, groups)
        for coding in (None, *(_codings(dim) if name in CODED else ()))
    ]
    for name, case in tqdm(cases, unit="case", leave=False):
        try:
            outcome = check.compare(name, case)
            error, complaint = outcome.error, outcome.complaint
            times = _times(name, case)
        except Exception as failure:  # whatever a shader compiler says belongs into the report
            error, complaint, times = float("inf"), f"{type(failure).__name__}: {failure}", (0.0, 0.0)
        dtype, bits = str(case.dtype).rpartition(".")[2], case.coding and case.coding.bits
        found.append(Row(name, dtype, bits, case.head_dim, case.groups, count, error, *times, complaint))
    return found


def _codings(dim: int) -> list[Coding]:
    """In which rows of this head dim are stored, besides as numbers."""
    try:
        return [Coding.fitting(bits, None, (dim,)) for bits in BITS]
    except CodingError:
        return []


def _times(name: str, case: check.Case) -> tuple[float, float]:
    given = check.problem(name, case)
    mx.eval(given.call.queries, given.state, given.importance)
    return _milliseconds(name, check.kernel_of(name), given), _milliseconds(name, check.twin_of(name), given)


def _milliseconds(name: str, operation: Callable[..., Any], given: check.Problem) -> float:
    taken = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        mx.eval(check.results(name, operation, given))
        taken.append(1e3 * (time.perf_counter() - begin))
    return median(taken)


def table(rows: list[Row]) -> str:
    if not rows:
        return f"No Metal GPU here: the kernels in {metal_folder()} were not run, plain MLX operations compute."
    lines = [
        f"{'kernel':<14}{'dtype':<10}{'bits':>4}{'D':>5}{'G':>4}{'rows':>7}{'error':>9}{'kernel ms':>11}{'ops ms':>9}  "
    ]
    for r in rows:
        verdict = "OK" if not r.complaint else r.complaint
        lines.append(
            f"{r.kernel:<14}{r.dtype:<10}{r.bits or '':>4}{r.head_dim:>5}{r.groups:>4}{r.rows:>7}{r.error:>9.2g}"
            f"{r.kernel_ms:>11.3f}{r.ops_ms:>9.3f}  {verdict}"
        )
    return "\n".join([*lines, "(error: largest difference from the plain ops, 1 is the limit)"])


def head_tables() -> list[str]:
    """Each table of rows per KV head that models may find here, and what is wrong with it."""

    def words(path: Path) -> str:
        try:
            return f"Rows per KV head: {Table.read(path).words}"
        except TableError as error:
            return f"Rows per KV head, NOT USED: {error}"

    return [words(path) for path in finding.tables()]


def machine() -> dict[str, str]:
    """Chip, system and versions."""
    chip = mx.device_info().get("device_name", platform.processor() or platform.machine())
    mac = platform.mac_ver()[0]
    return {
        "zm_mlx": __version__,
        "chip": str(chip),
        "system": f"macOS {mac}" if mac else platform.platform(terse=True),
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
    }


def summary(rows: list[Row]) -> str:
    """The line for a bug report."""
    facts = machine()
    words = [
        f"zm_mlx {facts['zm_mlx']}",
        facts["chip"],
        facts["system"],
        f"mlx {facts['mlx']}",
        f"mlx-lm {facts['mlx-lm']}",
    ]
    for name in check.NAMES:
        mine = [r for r in rows if r.kernel == name]
        bad = [r for r in mine if r.complaint]
        words.append(f"{name} {'not run' if not mine else 'OK' if not bad else f'WRONG in {len(bad)} of {len(mine)}'}")
    return " | ".join(words)


if __name__ == "__main__":
    sys.exit(main())
