"""What a request gets: rows per layer, the way its prompt is taken, and why; then the caches."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.nn as nn

from ..budget import Budget, Request, largest, total_bytes
from ..calibration.finding import Search
from ..calibration.table import Table
from ..ops.choose import Mode
from ..phases import PIECE, Prefill
from ..policies import Policy, ZeroMerge
from ..state.layout import FLOAT32, LayerShape, Layout
from . import agreeing, ranks
from .cache import ZeroMergeCache
from .heads import Sharing, Wanted, share_out
from .hook import replace_caches
from .memory import free_bytes
from .own_caches import own_caches
from .part import least, part_of
from .probe import probe
from .turning import turns

HeadRows = Sequence[Sequence[int]]
AS_ASKED = "as asked"


@dataclass(frozen=True)
class Plan:
    """Resolved settings for one model and one request; ``caches(model)`` makes what it describes."""

    layouts: tuple[Layout, ...]
    shapes: tuple[LayerShape, ...]
    policy: Policy
    prefill: Prefill
    prompt_length: int | None
    budget_reason: str
    prefill_reason: str
    heads_reason: str  # where the rows of each head come from
    complaints: tuple[str, ...] = ()  # tables that were found and do not work
    other_bytes: int = 0  # that the model's own bounded caches will hold
    on_ranks: tuple[int, ...] = ()  # where the model is split: ``nbytes`` of each rank

    @property
    def nbytes(self) -> int:
        """Bytes of all ZeroMerge caches of one sequence."""
        return total_bytes(self.layouts, self.shapes)

    @property
    def capacity(self) -> int:
        """Tokens up to which nothing is compressed."""
        return min(a.capacity for a in self.layouts)

    @property
    def piece_bytes(self) -> int:
        """Bytes that a streaming cache holds beyond its budget while a prompt is read: a piece of it and its queries.

        At most; 0 where the policy does not replay.
        """
        if not self.policy.replays:
            return 0
        numbers = sum(s.heads * (1 + a.reading) for a, s in zip(self.layouts, self.shapes, strict=True))
        return self.full_bytes(PIECE) + PIECE * (numbers * FLOAT32 + sum(s.query_bytes for s in self.shapes))

    @property
    def prompt_bytes(self) -> int:
        """Bytes that caches hold beyond the budget while a prompt is read: a piece of it, or all of it."""
        return self.full_bytes(self.prompt_length or 0) if self.prefill == "exact" else self.piece_bytes

    @property
    def least(self) -> int:
        """Bytes that one sequence takes while its prompt is read, whatever the model's own arithmetic takes."""
        return self.nbytes + self.other_bytes + self.prompt_bytes

    def full_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens in these layers."""
        return tokens * sum(s.token_bytes for s in self.shapes)

    def own_bytes(self, tokens: int) -> int:
        """Bytes that mlx-lm's caches of the same layers would hold for ``tokens`` tokens."""
        return tokens * sum(s.own_bytes for s in self.shapes)

    def caches(self, model: nn.Module, kernels: Mode | None = None) -> list[Any]:
        """One cache per layer of the model, for its ``cache`` or mlx-lm's ``prompt_cache`` argument."""

        known = turns(model, self.shapes, PIECE) if self.policy.replays else [None] * len(self.shapes)

        def make(i: int) -> ZeroMergeCache:
            return ZeroMergeCache(
                self.layouts[i],
                policy=self.policy,
                prefill=self.prefill,
                prompt_length=self.prompt_length,
                kernels=kernels,
                turn=known[i],
            )

        return replace_caches(own_caches(model), make)


def plan_cache(
    model: nn.Module,
    kv_budget: str | int | float | Budget | None = "auto",
    *,
    prompt_length: int | None = None,
    prefill: Literal["auto", "exact", "streaming"] = "auto",
    max_tokens: int = 0,
    head_rows: HeadRows | Wanted = "auto",
    policy: Policy | None = None,
    kv_bits: int | None = None,
    kv_group_size: int | None = None,
    room: bool = True,
) -> Plan:
    """Probe a model and resolve a budget for it; arguments and errors are those of ``make_prompt_cache``.

    With ``room=False`` a plan that this machine cannot hold is made too, for ``guard`` to judge. The plan of a model
    that is split is agreed on by its ranks, which all call this; bytes are those of each rank.
    """
    if prefill not in ("auto", "exact", "streaming"):
        raise ValueError(f"prefill must be 'auto', 'exact' or 'streaming', not {prefill!r}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an mlx-lm model, as mlx_lm.load returns it, not {model!r}")
    if policy is not None and not isinstance(policy, Policy):
        raise ValueError(f"policy must be a zm_mlx.Policy, not {policy!r}")
    if prompt_length is not None and not (isinstance(prompt_length, int) and prompt_length >= 1):
        raise ValueError(f"prompt_length must be 1 token or more, not {prompt_length!r}")
    if not (isinstance(max_tokens, int) and max_tokens >= 0):
        raise ValueError(f"max_tokens must be 0 tokens or more, not {max_tokens!r}")
    if prefill == "exact" and prompt_length is None:
        raise ValueError("prefill='exact' ends with the prompt: give prompt_length, or take prefill='streaming'")
    policy = policy or ZeroMerge()
    if (kv_bits, kv_group_size) != (None, None):
        policy = replace(policy, kv_bits=kv_bits, kv_group_size=kv_group_size)
    shapes = probe(model)
    policy = policy.coded_for([d for s in shapes for d in s.dims])
    other = _other_bytes(model, shapes[0])
    free = free_bytes()
    budget, wanted = _asked(kv_budget, head_rows)
    request = Request(prompt_length, max_tokens, context_of(model), free, other)
    part = part_of(model)
    whole = shapes if part is None else part.whole

    def share(uniform: tuple[Layout, ...]) -> Sharing:
        return share_out(model, wanted, policy, uniform, whole, request)

    heads, reason = agreeing.shared(part, budget, shapes, policy, request, share)
    draft = Plan(
        layouts=heads.layouts if part is None else part.of(heads.layouts),
        shapes=tuple(shapes),
        policy=policy,
        prefill="streaming",
        prompt_length=prompt_length,
        budget_reason=reason,
        prefill_reason=AS_ASKED,
        heads_reason=heads.reason,
        complaints=heads.complaints,
        other_bytes=other,
    )
    if part is not None:
        draft = replace(draft, on_ranks=tuple(ranks.together(lambda: draft.nbytes)))
    if room:
        _require_room(draft, prefill)
    fits = prompt_length is not None and prompt_length <= (least(model, draft.capacity) or 0)
    need, free = agreeing.tightest(part, replace(draft, prefill="exact").least, free)
    taken, why = _choose_prefill(draft, prefill, fits, need, free)
    return replace(draft, prefill=taken, prefill_reason=why)


def _asked(kv_budget: str | int | float | Budget | None, head_rows: HeadRows | Wanted) -> tuple[Budget, Wanted]:
    """The budget, and by which table it is shared out."""
    if head_rows is None or isinstance(head_rows, str | os.PathLike | Table | Search):
        if kv_budget is None:
            raise ValueError("kv_budget must be given unless head_rows says the rows of every head")
        return Budget.parse(kv_budget), head_rows
    if kv_budget is not None:
        raise ValueError("head_rows says the rows of every head: give kv_budget=None with it")
    return Budget.of_heads(head_rows), None


def make_prompt_cache(
    model: nn.Module,
    kv_budget: str | int | float | Budget | None = "auto",
    *,
    prompt_length: int | None = None,
    prefill: Literal["auto", "exact", "streaming"] = "auto",
    max_tokens: int = 0,
    head_rows: HeadRows | Wanted = "auto",
    policy: Policy | None = None,
    kv_bits: int | None = None,
    kv_group_size: int | None = None,
    kernels: Mode | None = None,
) -> list[Any]:
    """Caches of fixed size for any mlx-lm model, one per layer; attaches the attention hook for them.

    Pass the result as ``prompt_cache=`` to ``mlx_lm.generate`` or ``stream_generate``. Sliding-window
    and recurrent layers keep mlx-lm's own caches. ``kv_bits`` and ``max_kv_size`` of mlx-lm's own functions do not go
    with these caches: the first raises at the first call, mlx-lm ignores the second.

    A batch takes one set of caches a prompt, whose budgets may differ, and gives each prompt the tokens that it gets
    alone::

        caches = [make_prompt_cache(model, 2048) for _ in prompts]
        mlx_lm.batch_generate(model, tokenizer, prompts, prompt_caches=caches)

    ``mlx_lm.generate.BatchGenerator`` takes them as ``caches=`` of its ``insert``.

    Args:
        model: any model that ``mlx_lm.load`` returns.
        kv_budget: rows per head (an integer: 2048), a fraction of the prompt (a float in (0, 1.0]:
            0.2), bytes for the whole model ("512MB"), or "auto": as much as the request needs and
            memory allows.
        prompt_length: tokens of the prompt to come. Needed for a fraction and for "exact".
        prefill: "exact" keeps the prompt whole and compacts it once, with memory for all of it;
            "streaming" never holds more than the budget and one chunk; "auto" is exact where the
            prompt's length is known and fits into memory.
        max_tokens: tokens to generate; a budget of "auto" and a table of rows per head use it.
        head_rows: how the budget's rows are shared out among KV heads: "auto" by the model's calibrated
            table where there is one (``python -m zm_mlx.calibrate`` makes it; a request that fits without
            compression stays uniform), ``None`` uniformly, or by the table of a file. With ``kv_budget=None``
            the rows of each KV head of each layer with full attention.
        policy: settings of the method; the defaults need no tuning.
        kv_bits: 8 or 4: rows are rounded to codes of so many bits when a compaction passes them, so that bytes hold
            about twice or three times as many. Those staged since, and residual ones, stay as they are.
        kv_group_size: numbers that share a scale and a bias, 64 or 32; without it 64, or 32 where head dims ask for it.
        kernels: "metal" or "ops"; without it Metal where there is a GPU (see ``zm_mlx.ops.choose``).

    Raises:
        ValueError: the budget, the rows or a setting does not work (the message says what does); a
            ``TableError`` where the table of a file is damaged or of another model.
        UnsupportedModelError: the model's attention cannot run on this cache.
    """
    plan = plan_cache(
        model,
        kv_budget,
        prompt_length=prompt_length,
        prefill=prefill,
        max_tokens=max_tokens,
        head_rows=head_rows,
        policy=policy,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
    )
    for complaint in plan.complaints:
        warnings.warn(complaint, stacklevel=2)
    return plan.caches(model, kernels)


def context_of(model: nn.Module) -> int | None:
    """The model's trained context in tokens, where its configuration says."""
    args = getattr(model, "args", None)
    for holder in (args, getattr(args, "text_config", None)):
        found = holder.get("max_position_embeddings") if isinstance(holder, dict) else None
        found = found or getattr(holder, "max_position_embeddings", None)
        if isinstance(found, int):
            return found
    return None


def positions_of(model: nn.Module) -> int | None:
    """Positions of a model that looks them up in a table; ``None`` for others, which compute them without end."""
    tables = (module for name, module in model.named_modules() if name.rpartition(".")[2] == "wpe")
    return next((int(table.weight.shape[0]) for table in tables), None)


def _require_room(draft: Plan, prefill: str) -> None:
    """Refuse what this machine cannot hold, before anything is allocated: the system would kill the process."""
    room = free_bytes(reserve=0)
    if room is None:
        return
    need, free = draft.nbytes + draft.other_bytes, f"{room / 1e9:.2f} GB are free here"
    if need > room:
        rows = largest(draft.shapes, draft.policy, room - draft.other_bytes)
        raise ValueError(f"the KV cache would take {need / 1e9:.2f} GB, and {free}: at most {rows} rows per head fit")
    whole = replace(draft, prefill="exact").least
    if prefill == "exact" and whole > room:
        raise ValueError(
            f"prefill='exact' holds the whole prompt, which takes {whole / 1e9:.2f} GB, and {free}: "
            "take prefill='streaming'"
        )


def _choose_prefill(draft: Plan, prefill: str, fits: bool, need: int, free: int | None) -> tuple[Prefill, str]:
    """How a prompt is taken, and why.

    Args:
        fits: whether nothing of it would be compressed.
        need: bytes that exact takes.
    """
    if prefill == "streaming":
        return "streaming", AS_ASKED
    if prefill == "exact":
        return "exact", AS_ASKED
    if draft.prompt_length is None:
        return "streaming", "the prompt's length is not known"
    if fits:
        return "streaming", "the prompt fits into the budget"
    if free is not None and need > free:
        return "streaming", f"the whole prompt would take {need / 1e9:.2f} GB of the {free / 1e9:.2f} GB that are free"
    return "exact", "the whole prompt fits into memory"


def _other_bytes(model: nn.Module, shape: LayerShape) -> int:
    """Bytes that the model's own bounded caches will hold (estimated from the full-attention layers)."""
    total = 0
    for cache in own_caches(model):
        for inner in getattr(cache, "caches", (cache,)):
            rows = getattr(inner, "max_size", None) or getattr(inner, "chunk_size", None) or 0
            total += rows * shape.token_bytes
    return total
