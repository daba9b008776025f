"""scripts/bench_memory.py: what it predicts, what it measures, and what it does when a point or the run dies."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench_memory
import bench_memory_figure
import bench_memory_point as point
import mlx.core as mx
import numpy as np
import pytest
import tiny
from bench_memory_caches import Cache, epoch, has_veloxquant, stream

from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.host.probe import probe
from zm_mlx.state.layout import LayerShape

SCRIPTS = Path(bench_memory.__file__).parent
SHAPE = LayerShape(2, 32, 32, 4, "mlx.core.float32")
CACHES = ["full", "quantized:8", "quantized:4", "rotating:64", "rotating:0.5", "rotating:512"]
CACHES += ["zeromerge:64", "zeromerge:0.5", "zeromerge:512"]
CACHES += ["veloxquant:h2o:64", "veloxquant:snapkv:64"] if has_veloxquant() else []
RESULT = {"kv_bytes": 50, "peak_bytes": 60, "process_peak_bytes": None, "decode_tps": 2.0, "decode_spread": 0.1}
RESULT |= {"decode_tps_mean": 1.5, "weights_bytes": 7}


# ---- what a point measures


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("context", [300, 512])
def test_predicted_bytes_are_the_measured_ones(name, context):
    model = tiny.model(head_dim=32)
    shapes = probe(model)
    cache = Cache.parse(name)
    found = point.decode(model, shapes, cache, {"decode_tokens": 8, "context": context, "seed": 0})
    assert found["kv_bytes"] == cache.holds(shapes, context, 8 + point.WARM_UP)
    assert found["decode_tps_quartiles"][0] <= found["decode_tps"] <= found["decode_tps_quartiles"][1]


@pytest.mark.parametrize("name", ["full", "quantized:4", "rotating:64", "zeromerge:64"])
def test_prediction_of_a_prefill_covers_what_is_held_at_its_end(name):
    model = tiny.model(head_dim=32)
    shapes, cache = probe(model), Cache.parse(name)
    settings = {"context": 200, "prefill_step_size": 64, "prefill": "streaming", "seed": 0}
    found = point.prefill(model, shapes, cache, settings)
    assert 0 < found["kv_bytes"] <= cache.prefill_holds(shapes, 200, 64, "streaming")
    assert found["ttft_seconds"] > 0


def streamed(rows: int, tokens: int) -> ZeroMergeCache:
    """A cache that really saw the tokens."""
    cache = tiny.cache(rows, SHAPE.heads)
    tiny.give(cache, *tiny.tokens(0, tokens, dim=SHAPE.head_dim))
    return cache


def raw(cache: ZeroMergeCache, head: int) -> list[int]:
    return [p for p in tiny.held(cache, head).position.tolist() if p >= 0]


@pytest.mark.parametrize("rows", [16, 64, 100])
@pytest.mark.parametrize("tokens", [1, 3, 40, 63, 64, 65, 71, 72, 73, 150, 211])
def test_filled_cache_is_in_the_state_that_streaming_leaves(rows, tokens):
    real, made = streamed(rows, tokens), tiny.cache(rows, SHAPE.heads)
    stream(made, SHAPE, tokens)
    assert made.state[-1] == real.state[-1]  # layout, policy, prompt and clocks
    assert [(x.shape, x.dtype) for x in made.layer.arrays()] == [(x.shape, x.dtype) for x in real.layer.arrays()]
    assert made.nbytes == real.nbytes
    for head in range(SHAPE.heads):
        a, b = tiny.held(made, head), tiny.held(real, head)
        assert a.weight.sum().item() == b.weight.sum().item() == tokens
        assert len(raw(made, head)) == len(raw(real, head))
        assert raw(made, head) == sorted(set(raw(made, head))) and raw(made, head)[-1] == tokens - 1
        if len(raw(real, head)) == tokens:
            assert a.position.tolist() == b.position.tolist()
    (group,) = made.layout.groups
    if made.layer.departed > group.rows:
        residual, sums = made.layer.kept.of(group).first(made.layout.residual), made.layer.residuals
        means = sums.key_sum / mx.maximum(residual.weight[..., None], 1)
        np.testing.assert_allclose(tiny.f64(means), tiny.f64(residual.rows.keys), atol=1e-6)


@pytest.mark.parametrize(("rows", "tokens"), [(64, 20), (64, 64), (64, 1000), (16, 333)])
def test_decoding_goes_on_from_a_filled_cache_over_several_compactions(rows, tokens):
    cache = tiny.cache(rows, SHAPE.heads)
    stream(cache, SHAPE, tokens)
    bytes_before, compactions, before = cache.nbytes, 0, epoch(cache)
    more = 3 * cache.layout.staging + rows
    q, k, v = tiny.tokens(1, more, dim=SHAPE.head_dim)
    for i in range(more):
        out = tiny.give(cache, q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1])
        assert mx.isfinite(out).all().item()
        compactions, before = compactions + (epoch(cache) != before), epoch(cache)
        assert cache.offset == tokens + i + 1
    assert compactions >= 3 and cache.nbytes == bytes_before
    for head in range(SHAPE.heads):
        assert tiny.held(cache, head).weight.sum().item() == tokens + more
        assert raw(cache, head) == sorted(set(raw(cache, head)))


def test_rare_work_of_a_cache_is_in_the_mean_even_if_no_timed_token_does_it():
    model = tiny.model(head_dim=32)
    shapes = probe(model)
    for name, period in (("zeromerge:300", 37), ("full", 256)):  # compactions, growth: not in 4 tokens from 501 on
        settings = {"decode_tokens": 4, "context": 505, "seed": 0}
        found = point.decode(model, shapes, Cache.parse(name), settings)
        assert found["rare_token_period"] == period and found["rare_tokens"] == 1
        assert found["rare_token_seconds"] > 0
    assert point.decode(model, shapes, Cache.parse("rotating:64"), settings)["rare_tokens"] == 0


def test_memory_of_the_process_is_read_and_says_what_it_is():
    block = np.ones(2**24)
    now, peak, kind = point.process_memory()
    assert kind.startswith("phys_footprint" if sys.platform == "darwin" else "RSS")
    assert block.nbytes < now < 2**36 and 0.9 * now < peak < 2**36


RUSAGE = """user_time system_time pkg_idle_wkups interrupt_wkups pageins wired_size resident_size phys_footprint
proc_start_abstime proc_exit_abstime child_user_time child_system_time child_pkg_idle_wkups child_interrupt_wkups
child_pageins child_elapsed_abstime diskio_bytesread diskio_byteswritten cpu_time_qos_default
cpu_time_qos_maintenance cpu_time_qos_background cpu_time_qos_utility cpu_time_qos_legacy
cpu_time_qos_user_initiated cpu_time_qos_user_interactive billed_system_time serviced_system_time logical_writes
lifetime_max_phys_footprint instructions cycles billed_energy serviced_energy interval_max_phys_footprint
runnable_time""".split()


def test_footprint_is_read_from_the_documented_struct_of_macos(monkeypatch):
    class Usage(ctypes.Structure):  # struct rusage_info_v4 of macOS's <sys/resource.h>
        _fields_ = [("uuid", ctypes.c_uint8 * 16), *((name, ctypes.c_uint64) for name in RUSAGE)]

    class System:
        def proc_pid_rusage(self, pid, flavour, buffer):
            usage = Usage(**{name: 100 + i for i, name in enumerate(RUSAGE)})
            usage.phys_footprint, usage.lifetime_max_phys_footprint = 5, 9
            assert pid == os.getpid() and flavour == 4 and ctypes.sizeof(usage) <= ctypes.sizeof(buffer._obj)
            ctypes.memmove(buffer, ctypes.byref(usage), ctypes.sizeof(usage))
            return 0

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: System())
    assert point.process_memory()[:2] == (5, 9) and "phys_footprint" in point.process_memory()[2]


# ---- a whole run; processes of points are replaced by a script where they are not what is tested


def run(capsys, folder: Path, *argv: str) -> tuple[int, str, str]:
    code = bench_memory.main(["--output", str(folder / "out.jsonl"), "--no-figure", *argv])
    return code, *capsys.readouterr()


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Points that log their start and do what is asked; returns how to ask, and the log."""

    def make(body: str = "") -> Path:
        script = tmp_path / "point.py"
        script.write_text(
            "import json, os, signal, sys, time\np = json.loads(sys.argv[1])\n"
            f"open({str(tmp_path / 'log')!r}, 'a').write(p['cache'] + '\\n')\n{body}\nprint({json.dumps(RESULT)!r})\n"
        )
        monkeypatch.setattr(bench_memory, "POINT", script)
        return script

    make.log = lambda: (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []
    return make


FEW = ("--contexts", "1K", "--prefill-lengths", "--caches", "full", "rotating:64", "zeromerge:64")


def test_real_run_ends_in_one_json_document_whose_ratios_follow_from_its_points(capsys, tmp_path):
    flags = ("--model", DEFAULT_MODEL, "--contexts", "128", "--prefill-lengths", "64", "--decode-tokens", "4")
    code, out, _ = run(capsys, tmp_path, *flags, "--caches", "full", "zeromerge:64")
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and told["counts"] == {"ok": 4}
    assert told["points"] == records(tmp_path)
    assert len(told["ratios"]) == 4
    points = {(p["kind"], p["context"], p["cache"]): p for p in told["points"]}
    for ratio in told["ratios"]:
        mine = points[ratio["kind"], ratio["context"], ratio["cache"]]
        full = points[ratio["kind"], ratio["context"], "full"]
        for key in set(ratio) - {"model", "kind", "context", "cache"}:
            assert ratio[key] == pytest.approx(mine[key] / full[key], abs=1e-4)
    for p in told["points"]:
        assert p["weights_bytes"] < p["active_bytes"] <= p["peak_bytes"] and p["seed"] == 0
        assert p["kind"] == "prefill" or p["kv_bytes"] == p["predicted_kv_bytes"]
    assert "KV cache, and ratio to full" in out and "time to first token" in out


def test_killed_run_resumes_and_repeats_no_finished_point(tmp_path, fake):
    script = fake("time.sleep(0.5)")
    main = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import bench_memory; bench_memory.POINT = {str(script)!r}"
    )
    flags = ["--output", str(tmp_path / "out.jsonl"), "--no-figure", *FEW]
    command = [sys.executable, "-c", f"{main}; sys.exit(bench_memory.main({flags!r}))"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(fake.log()) < 2:
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = [r["cache"] for r in records(tmp_path)]
    assert done == ["full"]

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(fake.log()) < 4:  # rotating again, and zeromerge begins
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "1 of 3 points are done" in out and "the same command resumes" in out
    assert json.loads(out.splitlines()[-1])["interrupted"] is True
    assert [r["cache"] for r in records(tmp_path)] == ["full", "rotating:64"]
    assert fake.log() == ["full", "rotating:64", "rotating:64", "zeromerge:64"]


def test_torn_last_line_costs_one_point_only(capsys, tmp_path, fake):
    fake()
    run(capsys, tmp_path, *FEW)
    path = tmp_path / "out.jsonl"
    path.write_text(path.read_text()[:-20])
    code, out, _ = run(capsys, tmp_path, *FEW)
    assert code == 0 and "2 of 3 points are done" in out and "1 lines are no records" in out
    assert fake.log()[3:] == ["zeromerge:64"]
    assert json.loads(path.read_text().splitlines()[-1])["cache"] == "zeromerge:64"


@pytest.mark.parametrize(
    "death",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "raise RuntimeError('[metal::malloc] Unable to allocate 18874368000 bytes.')",
        "sys.stderr.write('[METAL] Command buffer execution failed: Insufficient Memory'); os.abort()",
    ],
)
def test_point_that_runs_out_of_memory_is_recorded_and_the_run_goes_on(capsys, tmp_path, fake, death):
    fake(f"if p['cache'] == 'full': {death}")
    code, out, _ = run(capsys, tmp_path, *FEW)
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and told["counts"] == {"out of memory": 1, "ok": 2} and told["ratios"] == []
    assert told["points"][0]["status"] == "out of memory" and told["points"][0]["measured"] is True
    assert "out of memory" in out
    run(capsys, tmp_path, *FEW)
    assert len(fake.log()) == 3  # it is not tried again


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce a limit of the address space")
def test_real_point_that_meets_the_limit_of_its_address_space_is_out_of_memory(tmp_path):
    flags = ["--output", str(tmp_path / "out.jsonl"), "--no-figure", "--contexts", "64K", "--prefill-lengths"]
    command = f"ulimit -v 1200000; exec {sys.executable} {SCRIPTS / 'bench_memory.py'} {' '.join(flags)} --caches full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and told["counts"] == {"out of memory": 1}, done.stderr


def test_point_that_cannot_fit_is_not_started(capsys, tmp_path, fake, monkeypatch):
    fake()
    monkeypatch.setattr(bench_memory, "free_bytes", lambda: 60_000_000)
    code, out, _ = run(capsys, tmp_path, *FEW)
    full, rotating, _ = json.loads(out.splitlines()[-1])["points"]
    assert code == 0 and fake.log() == ["rotating:64", "zeromerge:64"] and rotating["status"] == "ok"
    assert (full["status"], full["measured"], full["free_bytes"]) == ("out of memory", False, 60_000_000)
    assert full["predicted_need_bytes"] > 60_000_000 and "no room" in out


def test_failed_point_is_named_and_tried_again(capsys, tmp_path, fake):
    fake("if p['cache'] == 'full': raise ValueError('no such thing')")
    code, out, err = run(capsys, tmp_path, *FEW)
    assert code == 1 and "ValueError: no such thing" in err
    assert json.loads(out.splitlines()[-1])["counts"] == {"failed": 1, "ok": 2}
    fake()
    code, out, _ = run(capsys, tmp_path, *FEW)
    assert code == 0 and fake.log() == ["full", "rotating:64", "zeromerge:64", "full"]
    assert json.loads(out.splitlines()[-1])["counts"] == {"ok": 3}


@pytest.mark.parametrize("field", ["mlx", "machine", "blas", "zm_mlx"])
def test_records_of_another_machine_or_version_are_not_reused(capsys, tmp_path, fake, field):
    fake()
    run(capsys, tmp_path, *FEW)
    old = [{**r, field: "another", "kv_bytes": 1} for r in records(tmp_path)]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old))
    code, out, _ = run(capsys, tmp_path, *FEW)
    assert code == 0 and len(fake.log()) == 6 and out.count("3 records of another machine") == 1
    assert [p["kv_bytes"] for p in json.loads(out.splitlines()[-1])["points"]] == [50] * 3


def test_figure_has_text_and_marks_where_memory_ended(capsys, tmp_path, fake):
    fake("if p['cache'] == 'full' and p['context'] > 1024: os.kill(os.getpid(), signal.SIGKILL)")
    flags = ["--output", str(tmp_path / "out.jsonl"), "--contexts", "1K", "2K", "--prefill-lengths", "--caches"]
    assert bench_memory.main([*flags, "full", "zeromerge:64"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["figures"] == [str(tmp_path / "out.png"), str(tmp_path / "out.svg")]
    assert Path(told["figures"][0]).stat().st_size > 10_000
    svg = Path(told["figures"][1]).read_text()
    assert "<text" in svg and "ZeroMerge, 64 rows" in svg and "at 2K" in svg and "out of memory" in svg
    assert bench_memory_figure.main([str(tmp_path / "out.jsonl"), "--figure", str(tmp_path / "new" / "again.svg")]) == 0
    assert (tmp_path / "new" / "again.png").exists()


def test_without_matplotlib_everything_else_works_and_the_remedy_is_named(capsys, tmp_path, fake, monkeypatch):
    fake()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code = bench_memory.main(["--output", str(tmp_path / "out.jsonl"), *FEW])
    out = capsys.readouterr().out
    assert code == 0 and "pip install -e '.[bench]'" in out and json.loads(out.splitlines()[-1])["figures"] == []
    assert bench_memory_figure.main([str(tmp_path / "out.jsonl")]) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--caches", "fulll"], "--caches fulll: not a cache"),
        (["--caches", "quantized:5"], "--caches quantized:5: not a cache"),
        (["--caches", "zeromerge:1.5"], "--caches zeromerge:1.5: a budget of 1.5"),
        (["--caches", "rotating:1GB"], "--caches rotating:1GB: a budget of 1GB"),
        (["--caches", "zeromerge:2"], "--caches zeromerge:2: a budget of 2 rows per head is too small"),
        (["--contexts", "4X"], "--contexts: '4X' is not a number of tokens"),
        (["--contexts", "64"], "--contexts 64 is too short"),
        (["--contexts", "--prefill-lengths"], "--contexts and --prefill-lengths are both empty"),
        (["--decode-tokens", "0"], "--decode-tokens must be 1 or more"),
        (["--prefill-step-size", "0"], "--prefill-step-size must be 1 or more"),
        (["--model", "no-such/model"], "--model no-such/model: cannot be loaded"),
        (["--output", "no/such/folder.jsonl"], "--output no/such/folder.jsonl: No such file"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_flags_give_one_line_and_exit_code_2(capsys, monkeypatch, argv, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert bench_memory.main(argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("bench_memory: error:") and err.count("\n") == 1


@pytest.mark.skipif(has_veloxquant(), reason="VeloxQuant-MLX is installed")
def test_missing_veloxquant_is_named_with_the_remedy(capsys):
    assert bench_memory.main(["--caches", "veloxquant:h2o"]) == 2
    assert "pip install VeloxQuant-MLX" in capsys.readouterr().err


def test_card_needs_no_weights_and_measures_nothing(capsys, tmp_path):
    before = mx.get_active_memory()
    code, out, _ = run(capsys, tmp_path, "--llama2-7b-shape", "--card", "--caches", "full", "zeromerge:2048")
    assert "seeded random" in out
    assert code == 0 and not os.path.exists(tmp_path / "out.jsonl")
    assert "524.29 KB of keys and values a token" in out and "34.36 GB" in out
    assert mx.get_active_memory() < before + 2**20
