"""Who computes: plain MLX operations (``ops.plain``) or the Metal kernels of ``ops.kernels``.

On a Mac with Metal the kernels are the default, elsewhere the plain operations; the environment
variable ``ZM_MLX_KERNELS`` (auto, metal, ops) and the argument ``kernels`` of a cache override that.
Before its first use with a dtype and shape class a kernel is compared with its twin on small data.
One that differs or does not compile is left out for the rest of the process, with a warning that
names it: the text is never wrong because a GPU or an operating system is new.
"""

import os
import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import mlx.core as mx

from ..policies.policy import Policy
from ..state.coding import Coding
from ..state.layout import Layout
from ..state.rows import Dense
from ..state.state import Bound, Call, Scores, State
from . import check
from .kernels import attend, attend_chunk, compact, score
from .kernels._common import serves
from .plain import attention, compaction, decode, fitting, half, replaying, rereading, uncompressed

ENVIRONMENT = "ZM_MLX_KERNELS"
MODES = ("auto", "metal", "ops")
CODED = ("attend",)  # kernels that read codes; for the others plain operations take their place

Mode = Literal["auto", "metal", "ops"]


@dataclass(frozen=True)
class Operations:
    """The operations of one layer's cache, for its layout and policy."""

    layout: Layout
    policy: Policy
    kernels: Mode = "auto"
    turn: mx.array | None = field(default=None, compare=False)  # see ``replaying.replay``; ``None`` where not known

    @property
    def replays(self) -> bool:
        """Whether a prompt's own queries are replayed: the policy asks for it, and the model's rotation is known."""
        return self.policy.replays and self.turn is not None

    def attend(self, call: Call, state: State) -> tuple[mx.array, Scores]:
        """``attention.attend``; one query a sequence takes the kernel ``attend``, more take ``attend_chunk``."""
        operation = half.attend if _in_half(state) else attention.attend
        if call.length == 1 and self._on_metal("attend", state, call):
            operation = attend.attend
        elif call.length > 1 and self._on_metal("attend_chunk", state, call):
            operation = attend_chunk.attend_chunk
        return operation(call, state, self.layout, self.policy)

    def attend_whole(self, call: Call, state: State) -> mx.array:
        """Attention alone: mlx's own as long as all rows are in the recent store; it has no soft cap, a kernel has."""
        kernel = call.cap is not None and self._on_metal("attend_chunk", state, call)
        if state.departed or state.closed or kernel:
            return self.attend(call, state)[0]
        return uncompressed.attend(call, state)

    def bind(self, call: Call, state: State, turned: bool = True) -> Bound:
        """``attend`` for one token after the other until the next compaction, as ``decode.bind``."""
        if self._on_metal("attend", state, call):
            return attend.bind(call, state, self.layout, self.policy)
        if call.queries.dtype == state.recent.dtype == mx.float32 and call.cap is None and self.layout.coding is None:
            return decode.bind(call, state, self.layout, self.policy, turned)

        def step(queries: mx.array, state: State) -> tuple[mx.array, Scores]:
            out, scores = self.attend(call._replace(queries=queries), state)
            return mx.depends(out, list(scores)), scores

        return Bound(step)

    def score(self, call: Call, state: State) -> Scores:
        """``attention.score``."""
        operation = score.score if self._on_metal("score", state, call) else attention.score
        return operation(call, state, self.layout, self.policy)

    def read_again(self, call: Call, new: Dense, state: State) -> tuple[mx.array, State]:
        """``rereading.read_again``."""
        return rereading.read_again(call, new, state, self.layout, self.policy)

    def replay(self, call: Call, state: State) -> State:
        """``replaying.replay``; the state as it is where the model's rotation is not known."""
        return state if self.turn is None else replaying.replay(call, state, self.layout, self.turn)

    def fit(self, before: State, left: State, call: Call) -> State:
        """``fitting.fit``."""
        return fitting.fit(before, left, call, self.layout)

    def compact(self, state: State) -> State:
        """``compaction.compact`` by the policy's importance."""
        operation = compact.compact if self._on_metal("compact", state) else compaction.compact
        importance = self.policy.importance(state, self.layout)
        return self.policy.compacted(state, operation(state, self.layout, self.policy, importance))

    def _on_metal(self, name: str, state: State, call: Call | None = None) -> bool:
        """Whether a kernel computes."""
        if self.kernels == "ops" or (self.kernels == "auto" and not has_metal()):
            return False
        if self.layout.coding is not None and name not in CODED:
            return False
        dtype, groups, capped = state.recent.dtype, 1, False
        if call is not None:
            groups = min(8, call.queries.shape[1] // self.layout.heads)
            capped = call.cap is not None
            if call.queries.dtype != dtype:  # the kernels take one dtype for queries and rows
                return False
        behaviour: tuple[str, ...] = ("log_mass", "lift")
        if name == "compact":
            behaviour = ("select",) if self.policy.fits else ("select", "merge")
        if any(getattr(type(self.policy), x) is not getattr(Policy, x) for x in behaviour):
            return False
        if name == "compact" and not compact.serves(state, self.layout, self.policy):
            return False
        return _verified(name, state.recent.head_dim, state.recent.value_dim, dtype, groups, capped, self.layout.coding)


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


def _in_half(state: State) -> bool:
    return state.recent.dtype != mx.float32 and mx.default_device() == mx.cpu


@cache
def _verified(
    name: str,
    head_dim: int,
    value_dim: int,
    dtype: mx.Dtype,
    groups: int,
    capped: bool = False,
    coding: Coding | None = None,
) -> bool:
    """Whether a kernel gives on this machine what its twin gives."""
    if not serves(head_dim, value_dim, dtype):
        warnings.warn(
            f"zm_mlx: the Metal kernels are not written for head dims {head_dim} and {value_dim} in {dtype}; "
            "plain MLX operations are used",
            stacklevel=2,
        )
        return False
    try:
        wrong = check.compare(
            name, check.Case(dtype, head_dim, value_dim, groups, capped=capped, coding=coding)
        ).complaint
    except Exception as error:  # a shader compiler may fail in any way
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(
            f"zm_mlx: the Metal kernel {name!r} is left out on this machine ({wrong}); plain MLX operations are used. "
            "Please report the last line of: python -m zm_mlx.doctor",
            stacklevel=2,
        )
        return False
    return True
