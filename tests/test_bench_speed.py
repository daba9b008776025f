"""scripts/bench_speed.py, as far as it measures no time."""

import json
import sys

import bench_speed


def operations(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["bench_speed.py", *flags])
    assert bench_speed.main() == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_operations_of_a_decode_step_do_not_creep_up(monkeypatch, capsys):
    rotating, ours = (r["operations"] for r in operations(monkeypatch, capsys, "launches")["launches"])
    assert sum(rotating.values()) == 6, "mlx-lm's own path has changed: look at the figures in CHANGELOG.md again"
    assert sum(ours.values()) <= 12 and ours["SliceUpdate"] == 2


def test_decoding_allocates_nothing_of_the_size_of_the_cache(monkeypatch, capsys):
    (row,) = operations(monkeypatch, capsys, "memory")["memory"]
    low, high = row["active_bytes"]
    assert high - low < row["cache_bytes"] / 100  # MLX hands out buffers that are a little larger
    assert row["step_allocates_at_most"] < row["keys_of_one_head"]
