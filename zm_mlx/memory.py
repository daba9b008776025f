"""How much memory caches may take on this machine."""

from pathlib import Path

import mlx.core as mx

RESERVE = 2**30  # bytes left to activations and to everything else on the machine
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def free_bytes() -> int | None:
    """Bytes that new caches may take, after RESERVE; ``None`` where the system does not say.

    On macOS the recommended working set of the GPU less what MLX holds, on Linux the smaller of
    the cgroup's room and MemAvailable (MLX reports no memory there).
    """
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended:
        return max(0, int(recommended) - mx.get_active_memory() - RESERVE)
    rooms = [r for r in (_available(), _cgroup_room()) if r is not None]
    return max(0, min(rooms) - RESERVE) if rooms else None


def _available() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_room() -> int | None:
    """Limit less use, of cgroup v2 or v1; ``None`` without a limit."""
    for limit, use in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((CGROUP / limit).read_text()) - int((CGROUP / use).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
    return None
