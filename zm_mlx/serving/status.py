"""What the server says of itself: whether it can generate, and what its KV caches hold."""

import time
from typing import Any

from .provider import Served
from .reuse import Snapshots

STALLED = 300.0  # seconds in one step, after which the server no longer calls itself healthy


def report(served: Served, snapshots: Snapshots, batch: Any, running: int) -> dict[str, Any]:
    """Sequences, snapshots, bytes and the budget, in the thread that generates.

    ``bytes`` counts a snapshot and a sequence that began with it twice, though they share what neither has written.
    What is held besides to take drafts back has its room in ``bytes_while_reading``, and is not counted.
    """
    slots, plan = served.slots, served.plan
    rows = [n for layout in plan.layouts for n in layout.rows]
    return {
        "time": time.monotonic(),
        "model": served.key[0],
        "draft_model": served.key[2],
        "sequences": running,
        "snapshots": len(snapshots),
        "slots": slots.total,
        "bytes": batch.prompt_cache_nbytes + snapshots.nbytes,
        "max_bytes": slots.memory,
        "budget": {
            "rows_per_head": sum(rows) / len(rows),
            "bytes_per_sequence": slots.cost.sequence,
            "bytes_while_reading": slots.cost.piece,
            "prompts_at_a_time": slots.prompts,
            "reason": plan.budget_reason,
        },
    }


def kv(generator: Any) -> dict[str, Any]:
    """What ``/v1/kv`` answers."""
    shown = {name: value for name, value in generator.report.items() if name != "time"}
    return {**shown, "waiting": len(generator.waiting)}


def health(generator: Any) -> tuple[int, dict[str, Any]]:
    """What ``/health`` answers, and its HTTP status."""
    if not generator.is_healthy:
        return 503, {"status": "unavailable"}
    if time.monotonic() - generator.beat > STALLED:
        return 503, {"status": "stalled"}
    return 200, {"status": "ok"}
