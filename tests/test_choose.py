"""Who computes: the choice between kernels and plain ops is explicit, and never silent."""

import json
import sys

import mlx.core as mx
import pytest
import tiny

import zm_mlx
from zm_mlx import doctor
from zm_mlx.ops import check, choose
from zm_mlx.ops.kernels._common import kernel, metal_folder, serves


@pytest.fixture(autouse=True)
def fresh():
    choose._verified.cache_clear()
    yield
    choose._verified.cache_clear()


def test_argument_wins_over_environment_and_environment_over_the_default(monkeypatch):
    monkeypatch.delenv(choose.ENVIRONMENT, raising=False)
    assert choose.mode() == "auto"
    monkeypatch.setenv(choose.ENVIRONMENT, "ops")
    assert choose.mode() == "ops" and choose.mode("metal") == "metal"


def test_an_unknown_mode_names_the_variable_and_the_choices(monkeypatch):
    monkeypatch.setenv(choose.ENVIRONMENT, "cuda")
    with pytest.raises(ValueError, match=r"ZM_MLX_KERNELS must be one of auto, metal, ops, not 'cuda'"):
        choose.mode()
    with pytest.raises(ValueError, match="kernels must be one of"):
        tiny.cache(64, kernels="gpu")


def test_head_dims_without_a_kernel_take_the_plain_ops_and_say_so_once():
    assert not serves(72, 72, mx.float32)
    with pytest.warns(UserWarning, match="head dims 72 and 72") as caught:
        assert choose._verified("attend", 72, 72, mx.float32, 1) is False
        assert choose._verified("attend", 72, 72, mx.float32, 1) is False
    assert len(caught) == 1


def test_queries_of_another_dtype_than_the_rows_take_the_plain_ops(monkeypatch):
    monkeypatch.setattr(choose, "_verified", lambda *_: pytest.fail("a kernel was chosen"))
    given = check.problem("attend", check.Case(mx.float16, 64, 64, 2))
    call = given.call._replace(queries=given.call.queries.astype(mx.float32))
    out, _ = choose.Operations(given.layout, given.policy, "metal").attend(call, given.state)
    assert out.dtype == mx.float32 and mx.isfinite(out).all()


def test_a_loaded_cache_chooses_anew(monkeypatch):
    monkeypatch.delenv(choose.ENVIRONMENT, raising=False)
    cache = tiny.cache(64, kernels="metal")
    assert zm_mlx.ZeroMergeCache.from_state(cache.state).kernels == "auto"


def test_metal_sources_that_are_nowhere_name_both_places(monkeypatch, tmp_path):
    assert (metal_folder() / "common.h").is_file()
    elsewhere = tmp_path / "zm_mlx" / "ops" / "kernels" / "_common.py"
    monkeypatch.setattr("zm_mlx.ops.kernels._common.__file__", str(elsewhere))
    with pytest.raises(FileNotFoundError, match=r"zm_mlx.metal nor in .*metal"):
        metal_folder()


@pytest.mark.skipif(choose.has_metal(), reason="what the doctor says without a Metal GPU")
def test_doctor_without_a_gpu_says_that_nothing_was_run(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "No Metal GPU here" in out
    assert out.splitlines()[-1].startswith(f"zm_mlx {zm_mlx.__version__} | ") and "attend not run" in out
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metal"] is False


@pytest.mark.skipif(sys.platform != "linux", reason="the executor needs Linux")
def test_doctor_reports_each_kernel_and_names_a_wrong_one(monkeypatch, capsys):
    import metal_host

    few = {"dtypes": (mx.float16,), "head_dims": (64,), "groups": (1,)}
    with metal_host.installed():
        kernel.cache_clear()
        rows = doctor.examine(96, **few)
        right = check.kernel_of("score")
        monkeypatch.setattr("zm_mlx.ops.kernels.score.score", lambda *a, **k: [2 * x for x in right(*a, **k)])
        monkeypatch.setattr(doctor, "has_metal", lambda: True)
        monkeypatch.setattr(doctor, "examine", lambda count, real=doctor.examine: real(count, **few))
        code = doctor.main(["--rows", "96"])
    kernel.cache_clear()
    numbers = [r.kernel for r in rows if r.bits is None]
    assert numbers == list(check.NAMES) and not any(r.complaint for r in rows)
    assert [(r.kernel, r.bits) for r in rows if r.bits] == [("attend", 8), ("attend", 4)]
    assert all(r.kernel_ms > 0 and r.ops_ms > 0 for r in rows)
    out = capsys.readouterr().out
    assert code == 1
    assert "attend OK" in out.splitlines()[-1] and "score WRONG in 1 of 1" in out.splitlines()[-1]
    assert "times the tolerance" in out
