"""What would fit where a request does not: each remedy was tried before it is named."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..budget import largest
from .plan import Plan
from .predicting import Load

Need = Callable[[Plan, Load], int]  # bytes that are not held yet
Agree = Callable[[int], int]

SMALLEST_STEP = 64
TRIES = 6
SHARE = 0.97  # of what seems to be left for rows


def remedies(need: Need, plan: Plan, load: Load, room: int, agree: Agree = lambda rows: rows) -> list[str]:
    """Flags of which each would do alone; or several that do together, as one; or none.

    Args:
        need: what a plan and a load take.
        room: bytes that are free.
        agree: on rows that are tried, of the ranks of a model that is split.
    """
    found = [flags for flags, other, less in _changes(need, plan, load, room, agree) if need(other, less) <= room]
    if found or load.held:  # a budget that is there already stays
        return found
    least = replace(load, step=min(load.step, SMALLEST_STEP))
    rows = _rows(need, _streaming(plan), least, room, agree)
    if rows is None:
        return []
    flags = ["--prefill streaming"] if plan.prefill == "exact" else []
    if least.step < load.step:
        flags.append(f"--prefill-step-size {least.step}")
    return [" ".join([*flags, f"--kv-budget {rows}"])]


def _changes(need: Need, plan: Plan, load: Load, room: int, agree: Agree) -> Iterator[tuple[str, Plan, Load]]:
    """One change each, that may help."""
    if plan.prefill == "exact" and not load.held:
        yield "--prefill streaming", _streaming(plan), load
    step = _step(need, plan, load, room)
    if step is not None:
        yield f"--prefill-step-size {step}", plan, replace(load, step=step)
    rows = None if load.held else _rows(need, plan, load, room, agree)
    if rows is not None:
        yield f"--kv-budget {rows}", with_rows(plan, rows), load


def with_rows(plan: Plan, rows: int) -> Plan:
    """The plan with another budget, the same for all heads."""
    return replace(plan, layouts=plan.policy.layouts(rows, [s.heads for s in plan.shapes]))


def _streaming(plan: Plan) -> Plan:
    return replace(plan, prefill="streaming")


def shorter(step: int) -> int:
    """The largest power of 2 below a number of tokens; of 1 that itself."""
    return 1 << max(0, (step - 1).bit_length() - 1)


def _step(need: Need, plan: Plan, load: Load, room: int) -> int | None:
    """The largest power of 2 below the step (and the prompt) that fits."""
    step = shorter(load.whole_step)
    if step < SMALLEST_STEP or need(plan, replace(load, step=SMALLEST_STEP)) > room:
        return None
    while step > SMALLEST_STEP and need(plan, replace(load, step=step)) > room:
        step //= 2
    return step


def _rows(need: Need, plan: Plan, load: Load, room: int, agree: Agree) -> int | None:
    """As many rows per head as fit, fewer than there are; ``None`` where not even the fewest do."""
    smallest = plan.policy.smallest
    if need(with_rows(plan, smallest), load) > room:
        return None
    rows = agree(max(n for a in plan.layouts for n in a.rows))
    taken = need(plan, load)
    for _ in range(TRIES):
        own = load.sequences * with_rows(plan, rows).nbytes
        left = SHARE * (room - max(0, taken - own)) / load.sequences
        rows = agree(min(rows - 1, largest(plan.shapes, plan.policy, int(left))))
        if rows <= smallest:
            break
        taken = need(with_rows(plan, rows), load)
        if taken <= room:
            return rows
    return smallest
