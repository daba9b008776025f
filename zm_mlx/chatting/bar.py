"""What a conversation holds, in rows and bytes, and as a bar."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..host.cache import ZeroMergeCache
from ..host.caches import CacheSet
from ..host.model_caches import zero_merge
from ..report import size

WIDTH = 48  # characters
MARKS = {"residual": "=", "context": "#", "recent": "+"}


@dataclass(frozen=True)
class Region:
    """Rows of one kind, averaged over the KV heads of all layers."""

    name: str
    used: float
    rows: float


def regions(caches: Sequence[ZeroMergeCache]) -> list[Region]:
    """Residual, context and recent rows, in use and in all.

    A row of the kept store is in use if there are tokens behind it. Before anything is merged all of them are
    raw tokens, which count as context also where residual rows will be.
    """
    heads = sum(c.layout.heads for c in caches)
    whole = [0, 0, 0]
    used = [0, 0, 0]
    for c in caches:
        parts = (c.layout.residual * c.layout.heads, sum(c.layout.context), c.layout.recent * c.layout.heads)
        whole = [a + b for a, b in zip(whole, parts, strict=True)]
        used = [a + b for a, b in zip(used, _used(c), strict=True)]
    spill = max(0, used[1] - whole[1])
    used[0], used[1] = used[0] + spill, used[1] - spill
    return [Region(name, used[i] / heads, whole[i] / heads) for i, name in enumerate(MARKS)]


def bar(found: Sequence[Region]) -> str:
    """The budget drawn to scale, each region filled as far as it is in use."""
    total = sum(r.rows for r in found)
    parts = []
    for region in found:
        width = max(1, round(WIDTH * region.rows / total)) if region.rows else 0
        filled = min(width, max(region.used > 0, round(width * region.used / region.rows))) if width else 0
        parts.append(MARKS[region.name] * filled + "." * (width - filled))
    return f"[{'|'.join(parts)}]"


def lines(caches: CacheSet, budget: int, turns: int, context: int | None) -> list[str]:
    """What ``/stats`` shows.

    Args:
        caches: of the conversation.
        budget: bytes that they take at most between two turns.
        turns: of the conversation so far.
        context: tokens that the model was trained on, where known.
    """
    own = zero_merge(caches.every)
    found = regions(own)
    used, rows = (sum(x) for x in zip(*((r.used, r.rows) for r in found), strict=True))
    each = (f"{MARKS[r.name]} {r.name} {r.used:,.0f} of {r.rows:,.0f}" for r in found)
    trained = "" if context is None else f"; the model was trained on {context:,}"
    kv = f"KV cache: {size(sum(c.nbytes for c in own))} of a budget of {size(budget)}"
    if caches.full_bytes is not None:
        kv += f"; a full cache would hold {size(caches.full_bytes)}"
    return [
        f"{bar(found)} {used:,.0f} of {rows:,.0f} rows per head",
        f"  {', '.join(each)}, . free",
        f"Seen: {caches.seen or 0:,} tokens in {turns:,} turns{trained}",
        kv,
        f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB",
    ]


def _used(cache: ZeroMergeCache) -> tuple[int, int, int]:
    """Rows of all heads in use, of each region."""
    state = cache.layer
    if state is None:
        return 0, 0, 0
    filled = state.kept.weight > 0
    merged = int((filled & (state.kept.position < 0)).sum())
    return merged, int(filled.sum()) - merged, state.filled * cache.layout.heads
