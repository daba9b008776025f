"""--no-wired-limit: mlx-lm wires nothing, in any of the ways it generates; without the flag it does as always."""

import importlib
import sys

import mlx.core as mx
import pytest
import tiny
from commands import run
from mlx_lm.generate import BatchGenerator

from zm_mlx import cache_prompt, generate
from zm_mlx.host import wired
from zm_mlx.host.wired import leave_wired_limit

LIMIT = 10**12


@pytest.fixture
def limits(monkeypatch):
    """The wired limits that are set, on a machine that recommends one; mlx-lm is as it was afterwards."""
    found = []
    info = mx.device_info()
    monkeypatch.setattr(mx, "device_info", lambda *_: {**info, "max_recommended_working_set_size": LIMIT})
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: found.append(limit) or 0)
    for name in wired.MODULES:
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], wired.NAME, getattr(sys.modules[name], wired.NAME))
    return found


def test_generation_sets_the_recommended_limit_without_the_flag(limits, capsys):
    assert run(generate.main, capsys, "--prompt", "x", "-m", "1")[0] == 0
    assert LIMIT in limits


@pytest.mark.parametrize("how", [[], ["--compare"], ["--score", "reread", "--kv-budget", "64"]], ids=" ".join)
def test_generation_sets_none_with_it(limits, capsys, how):
    assert run(generate.main, capsys, "--prompt", "x y " * 60, "-m", "1", "--no-wired-limit", *how)[0] == 0
    assert limits == []


def test_saving_a_prompt_sets_none_with_it(limits, capsys, tmp_path):
    file = str(tmp_path / "p.safetensors")
    flags = ["--prompt", "x", "--prompt-cache-file", file, "--no-wired-limit"]
    assert run(cache_prompt.main, capsys, *flags)[0] == 0
    assert limits == []


def test_a_batch_sets_none(limits):
    BatchGenerator(tiny.model()).close()
    assert limits == [LIMIT, 0]
    leave_wired_limit()
    BatchGenerator(tiny.model()).close()
    assert limits == [LIMIT, 0]


def test_what_mlx_lm_loads_later_sets_none_either(limits, monkeypatch):
    """Its server takes the function from where it is defined, when it is first imported."""
    monkeypatch.delitem(sys.modules, "mlx_lm.server", raising=False)
    leave_wired_limit()
    server = importlib.import_module("mlx_lm.server")
    server.maybe_set_recommended_wired_limit()
    assert limits == []


def test_a_server_that_is_loaded_sets_none(limits, monkeypatch):
    server = importlib.import_module("mlx_lm.server")
    monkeypatch.setattr(server, wired.NAME, getattr(server, wired.NAME))
    leave_wired_limit()
    server.maybe_set_recommended_wired_limit()
    assert limits == []
