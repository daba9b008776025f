"""Each kernel against its twin in plain operations on small random data: at first use, and in the doctor."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx

from ..policies.policy import Policy
from ..state.coded import Coded
from ..state.coding import Coding
from ..state.layout import Layout
from ..state.mixed import Held, Mixed, numbers_of
from ..state.rows import Dense
from ..state.state import Call, Kept, Residuals, Scores, State
from .plain import attention, compaction

NAMES = ("attend", "attend_chunk", "score", "compact")
TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
SCORE_TOLERANCE = 1e-4
CHUNK = 19  # queries, no multiple of a tile
WEIGHT = 7  # tokens behind a residual row


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
    capped: bool = False  # scores, by 1
    coding: Coding | None = None

    @property
    def layout(self) -> Layout:
        """Unequal heads: the first has twice the context of the others."""
        residual, recent = 4, max(CHUNK + 2, self.rows // 2)
        context = max(1, self.rows - recent - residual)
        context_of = (2 * context, *[context] * (self.heads - 1))
        return Layout(residual, context_of, recent - recent // 5, recent // 5, coding=self.coding)


@dataclass(frozen=True)
class Problem:
    """What an operation is given; ``importance`` is that of a compaction."""

    call: Call
    state: State
    layout: Layout
    policy: Policy
    importance: Scores


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
    given = problem(name, case, seed)
    pairs = zip(results(name, kernel_of(name), given), results(name, twin_of(name), given), strict=True)
    return Outcome(name, max(_error(a, b) for a, b in pairs))


def kernel_of(name: str) -> Callable[..., Any]:
    """The wrapper of a kernel."""
    return getattr(import_module(f"{__package__}.kernels.{name}"), name)  # type: ignore[no-any-return]


def twin_of(name: str) -> Callable[..., Any]:
    """The plain function with the signature of a kernel."""
    if name == "score":
        return attention.score
    return compaction.compact if name == "compact" else attention.attend


def results(name: str, operation: Callable[..., Any], given: Problem) -> list[mx.array]:
    """All arrays that a kernel or its twin computes."""
    if name == "compact":
        return operation(given.state, given.layout, given.policy, given.importance).arrays()  # type: ignore[no-any-return]
    found = operation(given.call, given.state, given.layout, given.policy)
    return list(found) if name == "score" else [found[0], *found[1]]


def problem(name: str, case: Case, seed: int = 0) -> Problem:
    """Random arguments for a kernel: residual rows merged, recent store nearly full."""
    layout, keys = case.layout, mx.random.split(mx.random.key(seed + 1), 3)
    state = random_state(case, layout, mx.random.key(seed))
    length = 1 if name == "attend" else CHUNK
    shape = (case.batch, layout.heads * case.groups, length, case.head_dim)
    queries = mx.random.normal(shape, key=keys[0]).astype(case.dtype)
    importance = Scores(*(mx.random.uniform(shape=x.shape, key=k) for x, k in zip(state.scores, keys[1:], strict=True)))
    return Problem(
        Call(queries, case.head_dim**-0.5, cap=1.0 if case.capped else None), state, layout, Policy(), importance
    )


def random_state(case: Case, layout: Layout, key: mx.array) -> State:
    """A state whose residual rows hold WEIGHT tokens each; one recent row is free."""
    keys = iter(mx.random.split(key, 12))

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(keys))

    def uniform(*shape: int) -> mx.array:
        return mx.random.uniform(shape=shape, key=next(keys))

    def rows(*shape: int) -> Dense:
        return Dense(*(normal(*shape, d).astype(case.dtype) for d in (case.head_dim, case.value_dim)))

    recent = (case.batch, layout.heads, layout.recent)
    kept, sums = (case.batch, layout.starts[-1]), (case.batch, layout.heads, layout.residual)
    within = mx.concatenate([mx.arange(b - a) for a, b in zip(layout.starts, layout.starts[1:], strict=False)])
    merged = mx.broadcast_to(within < layout.residual, kept)
    position = mx.where(merged, -1, mx.arange(kept[1])).astype(mx.int32)
    key_sum, value_sum = (WEIGHT * normal(*sums, d) for d in (case.head_dim, case.value_dim))
    square_sum = (key_sum * key_sum).sum(axis=-1) / WEIGHT + WEIGHT
    state = State(
        kept=Kept(rows(*kept), mx.where(merged, float(WEIGHT), 1.0), position),
        residuals=Residuals(uniform(*sums), key_sum, value_sum, square_sum),
        recent=rows(*recent),
        scores=(scores := Scores(uniform(*kept), uniform(*recent))),
        reading=Scores.none_like(scores),
        departed=kept[1] + 100,
        filled=layout.recent - 1,
        since_compaction=0,
    )
    if case.coding is None:
        return state
    return with_codes(state._replace(since_compaction=layout.staging - 1), layout, case.coding)


def with_codes(state: State, layout: Layout, coding: Coding) -> State:
    """A state of numbers, all merged, with the rows as codes that its last compaction passed."""
    held, recent = numbers_of(state.kept.rows), numbers_of(state.recent)
    first = mx.array([start + r for start in layout.starts[:-1] for r in range(layout.residual)], mx.int32)
    residual = held.map(lambda x: x[:, first].reshape(x.shape[0], layout.heads, layout.residual, x.shape[-1]))
    closed = state.filled - state.since_compaction
    coded = Coded.of(recent.cut(0, closed), coding)
    return state._replace(
        kept=state.kept._replace(rows=Held(residual, Coded.of(held, coding))),
        recent=Mixed(recent.cut(closed, state.recent_rows).map(mx.contiguous), coded, True),
    )


def _error(ours: mx.array, twin: mx.array) -> float:
    if ours.shape != twin.shape or ours.dtype != twin.dtype:
        return float("inf")
    limit = SCORE_TOLERANCE if twin.dtype == mx.float32 else TOLERANCE.get(twin.dtype, 0.0)
    a, b = ours.astype(mx.float32), twin.astype(mx.float32)
    if twin.dtype == mx.int32:
        return 0.0 if mx.array_equal(ours, twin).item() else float("inf")
    worst = float(mx.max(mx.abs(a - b) / (1 + mx.abs(b)))) if twin.size else 0.0
    return float("inf") if worst != worst else worst / limit
