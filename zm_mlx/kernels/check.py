"""Each kernel against its twin in ``compress`` on small random data: at first use, and in the doctor."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx

from .. import compress
from ..layout import Layout
from ..policy import Policy
from ..stores import Kept, Recent

NAMES = ("attend", "attend_chunk", "score", "compact")
TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
SCORE_TOLERANCE = 1e-4
CHUNK = 19  # queries, no multiple of a tile


@dataclass(frozen=True)
class Case:
    """One combination of dtype and shapes; ``rows`` is the mean number of rows per KV head."""

    dtype: mx.Dtype
    head_dim: int
    value_dim: int
    groups: int
    rows: int = 90
    heads: int = 2
    batch: int = 2

    @property
    def layout(self) -> Layout:
        """Unequal heads: the first has twice the context of the others."""
        residual, recent = 4, max(CHUNK + 2, self.rows // 2)
        context = max(1, self.rows - recent - residual)
        return Layout(residual, (2 * context, *[context] * (self.heads - 1)), recent - recent // 5, recent // 5)


@dataclass(frozen=True)
class Outcome:
    """Largest absolute error of a kernel's results, each relative to its tolerance (1 is the limit)."""

    name: str
    error: float

    @property
    def complaint(self) -> str:
        """What is wrong, or nothing."""
        return "" if self.error <= 1 else f"results differ from the plain ops by {self.error:.1f} times the tolerance"


def compare(name: str, case: Case, seed: int = 0) -> Outcome:
    """Run a kernel and its twin on the same data.

    Raises:
        Exception: whatever compiling or launching the kernel raises.
    """
    arguments, how = inputs(name, case, seed)
    ours = kernel_of(name)(*arguments, **how)
    twin = twin_of(name)(*arguments, **how)
    errors = [_error(a, b) for a, b in zip(ours, twin, strict=True)]
    return Outcome(name, max(errors))


def kernel_of(name: str) -> Callable[..., Any]:
    """The wrapper of a kernel."""
    return getattr(import_module(f"{__package__}.{name}"), name)  # type: ignore[no-any-return]


def twin_of(name: str) -> Callable[..., Any]:
    """The plain-ops function with the signature of a kernel."""
    return getattr(compress, "attend" if name == "attend_chunk" else name)  # type: ignore[no-any-return]


def inputs(name: str, case: Case, seed: int = 0) -> tuple[list[Any], dict[str, Any]]:
    """Random arguments for a kernel: residual rows merged, recent store nearly full."""
    layout = case.layout
    live, left = layout.recent - 1, layout.starts[-1] + 100
    kept, recent = stores(case, layout, mx.random.key(seed))
    how: dict[str, Any] = {"left": left, "layout": layout, "policy": Policy()}
    if name == "compact":
        return [kept, recent], how | {"leaving": layout.staging}
    length = 1 if name == "attend" else CHUNK
    shape = (case.batch, layout.heads * case.groups, length, case.head_dim)
    queries = mx.random.normal(shape, key=mx.random.key(seed + 1)).astype(case.dtype)
    how |= {"live": live, "scale": case.head_dim**-0.5}
    return [queries, kept, recent], how | ({"tokens": length} if name == "score" else {})


def stores(case: Case, layout: Layout, key: mx.array) -> tuple[Kept, Recent]:
    keys = iter(mx.random.split(key, 12))

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(keys))

    def uniform(*shape: int) -> mx.array:
        return mx.random.uniform(shape=shape, key=next(keys))

    batch, heads, rows, residual = case.batch, layout.heads, layout.starts[-1], layout.residual
    recent = Recent(
        normal(batch, heads, layout.recent, case.head_dim).astype(case.dtype),
        normal(batch, heads, layout.recent, case.value_dim).astype(case.dtype),
        uniform(batch, heads, layout.recent),
    )
    kept = Kept.empty(batch, layout, case.head_dim, case.value_dim, case.dtype)
    merged = [mx.arange(rows) - start for start in layout.starts[:-1]]
    is_residual = mx.any(mx.stack([(r >= 0) & (r < residual) for r in merged]), axis=0)
    weight = mx.broadcast_to(mx.where(is_residual, 7.0, 1.0), (batch, rows))
    position = mx.broadcast_to(mx.where(is_residual, -1, mx.arange(rows)), (batch, rows)).astype(mx.int32)
    sums = 7 * normal(batch, heads, residual, case.head_dim)
    kept = kept._replace(
        keys=normal(batch, rows, case.head_dim).astype(case.dtype),
        values=normal(batch, rows, case.value_dim).astype(case.dtype),
        weight=weight,
        score=uniform(batch, rows),
        position=position,
        spread=uniform(batch, heads, residual),
        key_sum=sums,
        value_sum=7 * normal(batch, heads, residual, case.value_dim),
        square_sum=(sums * sums).sum(axis=-1) / 7 + 7,
    )
    return kept, recent


def _error(ours: mx.array, twin: mx.array) -> float:
    if ours.shape != twin.shape or ours.dtype != twin.dtype:
        return float("inf")
    limit = SCORE_TOLERANCE if twin.dtype == mx.float32 else TOLERANCE.get(twin.dtype, 0.0)
    a, b = ours.astype(mx.float32), twin.astype(mx.float32)
    if twin.dtype == mx.int32:
        return 0.0 if mx.array_equal(ours, twin).item() else float("inf")
    worst = float(mx.max(mx.abs(a - b) / (1 + mx.abs(b)))) if twin.size else 0.0
    return float("inf") if worst != worst else worst / limit
