"""What memory a machine has: fake /proc and cgroup files, both versions."""

import pytest

from zm_mlx.host import memory

GB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without a GPU and without any file; returns a writer of files."""
    monkeypatch.setattr(memory.mx, "device_info", lambda *_: {"architecture": "x86_64"})
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def meminfo(gb):
    return f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable:   {gb * 2**20} kB\nBuffers: 5 kB\n"


def test_nothing_known_is_none(machine):
    assert memory.free_bytes() is None


def test_available_memory_less_the_reserve(machine):
    machine("meminfo", meminfo(12))
    assert memory.free_bytes() == 12 * GB - memory.RESERVE


def test_meminfo_without_the_line_is_none(machine):
    machine("meminfo", "MemTotal: 5 kB\n")
    assert memory.free_bytes() is None


@pytest.mark.parametrize(
    ("limit", "use"),
    [
        ("cgroup/memory.max", "cgroup/memory.current"),
        ("cgroup/memory/memory.limit_in_bytes", "cgroup/memory/memory.usage_in_bytes"),
    ],
    ids=["v2", "v1"],
)
def test_the_smaller_of_cgroup_and_available_counts(machine, limit, use):
    machine("meminfo", meminfo(12))
    machine(limit, f"{8 * GB}\n")
    machine(use, f"{3 * GB}\n")
    assert memory.free_bytes() == 5 * GB - memory.RESERVE
    machine("meminfo", meminfo(4))
    assert memory.free_bytes() == 4 * GB - memory.RESERVE


def test_an_unlimited_cgroup_v2_counts_for_nothing(machine):
    machine("meminfo", meminfo(12))
    machine("cgroup/memory.max", "max\n")
    machine("cgroup/memory.current", f"{3 * GB}\n")
    assert memory.free_bytes() == 12 * GB - memory.RESERVE


def test_an_unlimited_cgroup_v1_counts_for_nothing(machine):
    machine("meminfo", meminfo(12))
    machine("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    machine("cgroup/memory/memory.usage_in_bytes", f"{3 * GB}\n")
    assert memory.free_bytes() == 12 * GB - memory.RESERVE


def test_a_cgroup_alone_is_enough(machine):
    machine("cgroup/memory.max", f"{8 * GB}\n")
    machine("cgroup/memory.current", "0\n")
    assert memory.free_bytes() == 8 * GB - memory.RESERVE


def test_a_full_machine_has_nothing_left_rather_than_less(machine):
    machine("meminfo", meminfo(0))
    assert memory.free_bytes() == 0
    machine("cgroup/memory.max", f"{GB}\n")
    machine("cgroup/memory.current", f"{2 * GB}\n")
    assert memory.free_bytes() == 0


def test_macos_counts_the_working_set_less_what_mlx_holds(machine, monkeypatch):
    machine("meminfo", meminfo(1))
    monkeypatch.setattr(memory.mx, "device_info", lambda *_: {"max_recommended_working_set_size": 10 * GB})
    monkeypatch.setattr(memory.mx, "get_active_memory", lambda: 4 * GB)
    assert memory.free_bytes() == 6 * GB - memory.RESERVE
    monkeypatch.setattr(memory.mx, "get_active_memory", lambda: 40 * GB)
    assert memory.free_bytes() == 0


def test_a_limit_of_the_address_space_counts(machine, monkeypatch):
    machine("meminfo", meminfo(12))
    machine("statm", "262144 1 1 1 0 1 0\n")
    monkeypatch.setattr(memory, "STATM", memory.MEMINFO.parent / "statm")
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (6 * GB, 6 * GB))
    monkeypatch.setattr(memory.resource, "getpagesize", lambda: 4096)
    assert memory.free_bytes() == 5 * GB - memory.RESERVE
    assert memory.free_bytes(reserve=0) == 5 * GB
