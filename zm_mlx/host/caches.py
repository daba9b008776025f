"""The KV caches of one generation, by name: this package's, mlx-lm's own ones, or saved ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from ..budget import Budget
from ..calibration.table import TableError
from ..errors import UnsupportedModelError, UserError
from ..policies import DEFAULT, Policy, name_of, named
from ..policies.policy import Score
from ..state.coding import CodingError
from .cache import ZeroMergeCache
from .heads import Wanted
from .hook import replace_caches
from .model_caches import members, zero_merge
from .own_caches import own_caches
from .plan import Plan, context_of, plan_cache
from .saved import load_prompt_cache

ROTATING_KEEP = 4  # first tokens that mlx-lm's rotating cache never overwrites, mlx-lm's own number

Kind = Literal["zeromerge", "full", "rotating", "quantized"]
Taking = Literal["auto", "exact", "streaming"]


@dataclass(frozen=True)
class Wish:
    """What is asked of the caches: a budget, how the prompt is taken, a table, and by which policy tokens stay.

    ``None`` is the default; of ``score`` the policy's own. ``room=False`` leaves it to ``host.guard`` whether this
    machine can hold the caches.
    """

    budget: str | None = None
    prefill: Taking = "auto"
    head_rows: Wanted = "auto"
    score: Score | None = None
    policy: str | None = None
    kv_bits: int | None = None
    kv_group_size: int | None = None
    room: bool = True

    @property
    def method(self) -> Policy:
        """The policy.

        Raises:
            ValueError: it takes no score, or its rows cannot become codes.
        """
        found = named(self.policy or DEFAULT, self.score)
        return replace(found, kv_bits=self.kv_bits, kv_group_size=self.kv_group_size)


@dataclass
class CacheSet:
    """All caches of a model (``every``, one a layer) and those that grow in mlx-lm (``growing``, or in their place)."""

    kind: Kind
    every: list[Any]
    growing: list[Any]
    plan: Plan | None = None
    predicted: int | None = None  # bytes at the peak, where the memory guard measured them
    before: int = field(init=False)  # tokens held when it was made

    def __post_init__(self) -> None:
        self.before = self.seen or 0

    @property
    def complaints(self) -> tuple[str, ...]:
        """Tables of rows per head that were found and do not work."""
        return () if self.plan is None else self.plan.complaints

    @property
    def unmoved(self) -> int:
        """Layers whose queries cannot be replayed though the policy would: their rotation is not known."""
        return sum(c.policy.replays and not c.operations.replays for c in zero_merge(self.every))

    @property
    def seen(self) -> int | None:
        """Tokens that all layers have taken; ``None`` where no cache counts them."""
        return min((int(c.offset) for c in self.growing), default=None)

    @property
    def nbytes(self) -> int:
        """Bytes that all caches hold now."""
        return _nbytes(list(members(self.every)))

    @property
    def full_bytes(self) -> int | None:
        """Bytes that full caches would hold of the same tokens, and the bounded caches; ``None`` if unknown."""
        if self.kind == "full":
            return self.nbytes
        if self.plan is None or self.seen is None:
            return None
        return self.plan.own_bytes(self.seen) + self.nbytes - _nbytes(self.growing)

    @property
    def state(self) -> str | None:
        """What has become of the tokens so far; ``None`` for caches of mlx-lm."""
        own = [c for c in self.growing if isinstance(c, ZeroMergeCache)]
        if not own or self.seen is None:
            return None
        if any(c.prefill == "exact" for c in own):
            return "held whole, to be compressed at the prompt's end"
        if any(c.offset > c.layout.capacity for c in own):
            return "compressed"
        return "not compressed, everything fits"


def fresh(model: nn.Module, kind: Kind, wish: Wish, prompt_tokens: int | None, max_tokens: int) -> CacheSet:
    """Empty caches for a prompt, or for one of unknown length; the plan is ZeroMerge's, also for the other kinds.

    Raises:
        UserError: the budget does not work.
        UnsupportedModelError: the model cannot be served (with ``full`` it can).
    """
    context = context_of(model)
    unlimited = max(0, (context or 0) - (prompt_tokens or 0))
    try:
        plan = plan_cache(
            model,
            wish.budget or "auto",
            prompt_length=prompt_tokens,
            prefill=wish.prefill,
            max_tokens=max_tokens if max_tokens > 0 else unlimited,
            head_rows=wish.head_rows if kind == "zeromerge" else None,
            policy=wish.method,
            room=wish.room,
        )
    except UnsupportedModelError:
        if kind != "full":
            raise
        plan = None
    except TableError as error:
        raise UserError(f"--head-rows: {error}") from error
    except CodingError as error:
        raise UserError(f"--kv-bits: {error}") from error
    except (ValueError, OverflowError) as error:
        raise UserError(f"--kv-budget: {error}") from error
    if kind == "full" or plan is None:
        return full(model, plan)
    return zeromerge(model, plan) if kind == "zeromerge" else rotating(model, [a.capacity for a in plan.layouts], plan)


def zeromerge(model: nn.Module, plan: Plan) -> CacheSet:
    """This package's caches."""
    every = plan.caches(model)
    return CacheSet("zeromerge", every, list(zero_merge(every)), plan)


def full(model: nn.Module, plan: Plan | None = None) -> CacheSet:
    """mlx-lm's own caches."""
    every = own_caches(model)
    return CacheSet("full", every, [c for c in members(every) if type(c) is KVCache], plan)


def rotating(model: nn.Module, rows: Sequence[int], plan: Plan | None = None) -> CacheSet:
    """mlx-lm's caches of the newest tokens, with these rows in each layer."""
    return _instead("rotating", model, lambda i: RotatingKVCache(rows[i], keep=ROTATING_KEEP), plan)


def beside(model: nn.Module, name: str, plan: Plan | None) -> CacheSet:
    """mlx-lm's ``full`` or ``rotating`` cache to compare a plan's with; the latter has the plan's rows per head.

    Where heads differ, each gets the average: a rotating cache has as many rows in all of them.
    """
    if name == "full" or plan is None:
        return full(model, plan)
    rows = [n for layout in plan.layouts for n in layout.rows]
    return rotating(model, [sum(rows) // len(rows)] * len(plan.layouts), plan)


def quantized(model: nn.Module, bits: int, groups: Sequence[int]) -> CacheSet:
    """mlx-lm's caches of quantised numbers, as many of which share a scale as ``groups`` says of each layer."""
    return _instead("quantized", model, lambda i: QuantizedKVCache(groups[i], bits))


def continued(model: nn.Module, file: str, wish: Wish, prompt_tokens: int) -> CacheSet:
    """The caches of a saved prompt, whose budget holds.

    Raises:
        UserError: the file does not fit the model, or the wish does not fit the file.
    """
    try:
        every = load_prompt_cache(file, model)
    except UnsupportedModelError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"--prompt-cache-file: {error}") from error
    own = zero_merge(every)
    saved = [n for c in own for n in c.layout.rows]
    if wish.budget is not None and Budget.parse(wish.budget) != Budget("rows", sum(saved) / len(saved)):
        rows = (
            f"{saved[0]}"
            if len(set(saved)) == 1
            else f"{min(saved)} to {max(saved)}, {sum(saved) / len(saved):g} on average"
        )
        raise UserError(
            f"--kv-budget {wish.budget} differs from the budget that --prompt-cache-file {file} was saved with "
            f"({rows} rows per head): leave --kv-budget out"
        )
    for name, asked, found in (
        ("policy", wish.policy, {name_of(c.policy) for c in own}),
        ("score", wish.score, {c.policy.score for c in own}),
        ("kv-bits", wish.kv_bits, {c.policy.kv_bits for c in own}),
        ("kv-group-size", wish.kv_group_size, {c.policy.kv_group_size for c in own}),
    ):
        if asked is not None and found != {asked}:
            raise UserError(
                f"--{name} {asked} differs from the {name} that --prompt-cache-file {file} was saved with "
                f"({', '.join('none' if x is None else str(x) for x in found)}): leave --{name} out"
            )
    if wish.prefill == "exact":
        for cache in own:
            try:
                cache.begin_prompt(prompt_tokens)
            except ValueError as error:
                raise UserError(f"--prefill exact with --prompt-cache-file {file}: {error}") from error
    return CacheSet("zeromerge", every, list(own))


def _instead(kind: Kind, model: nn.Module, make: Callable[[int], Any], plan: Plan | None = None) -> CacheSet:
    """``make(i)`` in place of the i-th cache that grows in mlx-lm."""
    made: list[Any] = []

    def one(i: int) -> Any:
        made.append(make(i))
        return made[-1]

    return CacheSet(kind, replace_caches(own_caches(model), one), made, plan)


def _nbytes(caches: list[Any]) -> int:
    return sum(c.nbytes for c in caches if not _empty(c))


def _empty(cache: Any) -> bool:
    try:
        return bool(cache.empty())
    except (AttributeError, NotImplementedError):
        return False
