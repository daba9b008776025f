"""What a generation did, in numbers: for people as lines, for programs as one JSON document."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from .drafting import Draft
from .host.caches import CacheSet
from .host.plan import Plan
from .phases import PIECE
from .policies import Policy, name_of
from .state.layout import Layout

SHOWN = 32  # characters of a text in a table


@dataclass
class Run:
    """One generation, as far as it came."""

    cache: str
    prompt_tokens: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_done: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    kv_bytes: int = 0
    full_bytes: int | None = None
    seen: int = 0
    state: str | None = None
    peak_memory: int = 0
    predicted_memory: int | None = None
    draft: str | None = None  # what proposed tokens
    accepted: int = 0  # of the tokens, how many were proposed
    finish_reason: str | None = None
    started: float = field(default_factory=time.perf_counter)

    def prefilled(self, done: int, _total: int) -> None:
        """mlx-lm's progress of the prompt."""
        self.prompt_done, self.prompt_seconds = done, time.perf_counter() - self.started

    def add(self, response: Any) -> None:
        """One response of mlx-lm."""
        self.tokens.append(response.token)
        self.accepted += response.from_draft
        self.text += response.text
        self.finish_reason = response.finish_reason

    def close(self, caches: CacheSet) -> None:
        """Note what the caches hold at the end, and what full ones would.

        An interrupt falls between two reports of progress, so what was taken is counted from the caches.
        """
        elapsed = time.perf_counter() - self.started
        seen = caches.seen
        if not self.tokens:
            self.prompt_seconds = elapsed
            if seen is not None:
                self.prompt_done = min(self.prompt_tokens, max(0, seen - caches.before))
        self.generation_seconds = max(0.0, elapsed - self.prompt_seconds)
        self.kv_bytes, self.full_bytes = caches.nbytes, caches.full_bytes
        self.seen = self.prompt_done + max(0, len(self.tokens) - 1) if seen is None else seen
        self.state = caches.state
        if self.prompt_done < self.prompt_tokens and self.state is not None:
            self.state = self.state.replace(", everything fits", " so far")
        self.peak_memory, self.predicted_memory = mx.get_peak_memory(), caches.predicted

    @property
    def prompt_tps(self) -> float:
        return self.prompt_done / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_tps(self) -> float:
        return len(self.tokens) / self.generation_seconds if self.generation_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        drafted = {} if self.draft is None else {"draft": {"by": self.draft, "accepted_tokens": self.accepted}}
        return {
            "cache": self.cache,
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_done": self.prompt_done,
            "prompt_tps": round(self.prompt_tps, 3),
            "generation_tokens": len(self.tokens),
            "generation_tps": round(self.generation_tps, 3),
            "kv_bytes": self.kv_bytes,
            "full_kv_bytes": self.full_bytes,
            "peak_memory_bytes": self.peak_memory,
            "predicted_memory_bytes": self.predicted_memory,
            **drafted,
            "finish_reason": self.finish_reason,
            "text": self.text,
        }


def describe(layers: Sequence[Layout]) -> str:
    """The rows of layers that differ in nothing but the context rows of their heads, in words."""
    rows, first = [n for a in layers for n in a.rows], layers[0]
    context = span([n for a in layers for n in a.context])
    average = f", {sum(rows) / len(rows):.0f} on average" if len(set(rows)) > 1 else ""
    return (
        f"{span(rows)} rows per head{average} ({first.residual} residual, {context} context, "
        f"{first.proximity} proximity, {first.staging} staging) x {first.heads} KV heads"
    )


def span(numbers: Sequence[int]) -> str:
    """One number, or the smallest and the largest."""
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


def plan_lines(plan: Plan, unmoved: int = 0) -> list[str]:
    """The effective budget of each run of layers that are alike but for single heads, and how the prompt is taken.

    Args:
        unmoved: layers whose queries cannot be replayed.
    """
    lines = []
    begin = 0
    kinds = [(replace(a, context=()), a.heads, s) for a, s in zip(plan.layouts, plan.shapes, strict=True)]
    for i, kind in enumerate(kinds):
        if i + 1 < len(kinds) and kinds[i + 1] == kind:
            continue
        name = f"layer {begin}" if begin == i else f"layers {begin} to {i}"
        layers = plan.layouts[begin : i + 1]
        taken = [a.nbytes(plan.shapes[i]) for a in layers]
        each = size(taken[0]) if len(set(taken)) == 1 else f"{size(min(taken))} to {size(max(taken))}"
        lines.append(f"Budget: {name}: {describe(layers)}, {each} a layer")
        begin = i + 1
    lines.append(f"Budget: {plan.heads_reason}")
    lines.append(f"Budget: {size(plan.nbytes)} in all ({plan.budget_reason})")
    if plan.on_ranks:
        each = " and ".join(map(size, dict.fromkeys(plan.on_ranks)))
        lines.append(f"Budget: {len(plan.on_ranks)} ranks, {each} each; what follows is of rank 0")
    lines.append(f"Prefill: {plan.prefill} ({plan.prefill_reason})")
    if plan.prefill == "streaming" and plan.piece_bytes:
        lines.append(f"Prefill: a piece of up to {PIECE} tokens beside the budget meanwhile, {size(plan.piece_bytes)}")
    lines.append(f"Policy: {name_of(plan.policy)}")
    if plan.policy.coding is not None:
        bits, group = plan.policy.coding.bits, plan.policy.coding.group
        lines.append(f"Rows: codes of {bits} bits in groups of {group} once a compaction has passed them")
    if type(plan.policy).importance is Policy.importance:
        lines.append(f"Score: {_score(plan, unmoved)}")
    return lines


def draft_lines(draft: Draft) -> list[str]:
    """What proposes tokens, and what its caches take."""
    lines = [f"Draft: {draft.name}, up to {draft.count} tokens at a time"]
    plan = None if draft.caches is None else draft.caches.plan
    if plan is not None:
        lines.append(f"Draft: {span([n for a in plan.layouts for n in a.rows])} rows per head, {size(plan.nbytes)}")
    elif draft.caches is not None:
        lines.append("Draft: in full caches, which grow with every token")
    return lines


def _score(plan: Plan, unmoved: int) -> str:
    """What importance is, in words."""
    score = plan.policy.score
    if score == "reread":
        fits = plan.prompt_length is not None and plan.prompt_length <= plan.capacity
        how = "the prompt fits and is read once" if fits else f"pieces of up to {PIECE} tokens are read twice"
        return f"{score} ({how})"
    if unmoved:
        return f"{score} (attention alone in {unmoved} of {len(plan.layouts)} layers, whose rotation is not known)"
    return score


def run_lines(run: Run) -> list[str]:
    """The closing statistics."""
    lines = [
        f"Prompt: {run.prompt_done} of {run.prompt_tokens} tokens, {run.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {len(run.tokens)} tokens, {run.generation_tps:.3f} tokens-per-sec",
    ]
    if run.draft is not None:
        lines.append(f"Draft: {run.accepted} of {len(run.tokens)} tokens came from it")
    kv = f"KV cache: {size(run.kv_bytes)} now"
    if run.full_bytes and run.cache != "full":
        kv += f", {size(run.full_bytes)} in a full cache ({run.kv_bytes / run.full_bytes:.2f} x)"
    lines.append(kv)
    if run.state is not None:
        lines.append(f"Seen: {run.seen} tokens, {run.state}")
    lines.append(peak_line(run.peak_memory, run.predicted_memory))
    return lines


def peak_line(measured: int, predicted: int | None) -> str:
    """The peak of memory, and what was said of it before."""
    said = "" if predicted is None else f" ({predicted / 1e9:.3f} GB predicted)"
    return f"Peak memory: {measured / 1e9:.3f} GB{said}"


def comparison(runs: Sequence[Run], decode: Any) -> list[str]:
    """Runs of one prompt one below the other, and where the others' texts first differ from the first one's."""
    first = runs[0]
    lines = [f"{'cache':<11}{'KV cache':>18}{'prefill tokens/s':>18}{'decode tokens/s':>17}{'peak memory':>13}  text"]
    for run in runs:
        kv = f"{size(run.kv_bytes)}{_ratio(run.kv_bytes, first.kv_bytes):>8}"
        text = run.text if len(run.text) <= SHOWN else run.text[:SHOWN] + "…"
        speeds = f"{run.prompt_tps:>18.1f}{run.generation_tps:>17.1f}"
        lines.append(f"{run.cache:<11}{kv:>18}{speeds}{size(run.peak_memory):>13}  {text!r}")
    for run, at in zip(runs[1:], differences(runs).values(), strict=True):
        if at is None:
            lines.append(f"{run.cache}: the text of {first.cache} ({len(run.tokens)} tokens).")
            continue
        theirs, its = (decode(r.tokens[at - 1 : at]) if at <= len(r.tokens) else "(end)" for r in (first, run))
        lines.append(f"{run.cache}: first differs from {first.cache} at token {at}: {its!r}, not {theirs!r}.")
    return lines


def differences(runs: Sequence[Run]) -> dict[str, int | None]:
    """At which token, from 1, the text of each run but the first differs from that one's; ``None``: nowhere."""
    found = {run.cache: first_difference(runs[0].tokens, run.tokens) for run in runs[1:]}
    return {name: None if at is None else at + 1 for name, at in found.items()}


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Index of the first token that differs, ``None`` if none does."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(other) else min(len(one), len(other))


def size(count: float) -> str:
    """Bytes in decimal units, as mlx-lm prints them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f} x" if b else "-"
