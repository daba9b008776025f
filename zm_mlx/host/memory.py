"""How much memory caches may take on this machine."""

import resource
from pathlib import Path

import mlx.core as mx

RESERVE = 2**30  # bytes left to activations and to everything else on the machine
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")


def free_bytes(reserve: int = RESERVE) -> int | None:
    """Bytes that new caches may take, less ``reserve``; ``None`` where the system does not say.

    On macOS the recommended working set of the GPU less what MLX holds, on Linux the smallest of
    the cgroup's room, MemAvailable and what a limit on the address space leaves (MLX reports no
    memory there).
    """
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended:
        return max(0, int(recommended) - mx.get_active_memory() - reserve)
    rooms = [r for r in (_available(), _cgroup_room(), _address_room()) if r is not None]
    return max(0, min(rooms) - reserve) if rooms else None


def _available() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _address_room() -> int | None:
    """What ``ulimit -v`` leaves; ``None`` without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        used = int(STATM.read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return None
    return limit - used


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
