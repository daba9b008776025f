"""The memory guard judges a draft model with the model: both caches, both readings, and what is held to take back."""

import re

import mlx.core as mx
import pytest
import tiny
from test_speculative import speculated

import zm_mlx
from zm_mlx import plan_cache
from zm_mlx.errors import MemoryGuardError
from zm_mlx.host import guard
from zm_mlx.host.beside import Beside, log_bytes
from zm_mlx.host.guard import Load
from zm_mlx.host.predicting import predict

TOKENS, STEP, K = 1200, 64, 4


def planned(model, rows):
    return plan_cache(model, rows, prefill="streaming", head_rows=None, room=False)


def test_what_fits_alone_and_not_with_a_draft_is_refused_with_a_budget_that_fits_both(monkeypatch):
    model, draft = tiny.model(), tiny.model()
    plan, load = planned(model, 4000), Load(TOKENS, STEP)
    beside = Beside(draft, planned(draft, 4000), K)
    mx.clear_cache()
    alone, both = predict(model, plan, load).new, beside.together(predict, model, plan, load).new
    assert both > alone + beside.plan.nbytes
    monkeypatch.setattr(guard, "free_bytes", lambda reserve=0: (alone + both) // 2)
    guard.guard(model, plan, load)
    with pytest.raises(MemoryGuardError) as refused:
        guard.guard(model, plan, load, beside=beside)
    rows = int(re.search(r"--kv-budget (\d+)", str(refused.value))[1])
    guard.guard(model, planned(model, rows), load, beside=Beside(draft, planned(draft, rows), K))


def test_the_peak_of_a_run_with_a_draft_is_no_more_than_was_predicted():
    model, draft = tiny.model(), tiny.model()
    plan, other = planned(model, 512), planned(draft, 512)
    text = tiny.prompt(TOKENS)[0]
    mx.eval(text, model.parameters(), draft.parameters())
    mx.clear_cache()
    found = Beside(draft, other, K).together(predict, model, plan, Load(TOKENS, STEP))
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    caches = [*plan.caches(model), *other.caches(draft)]
    with zm_mlx.rollback(caches, K):
        speculated(model, text, caches, 200, draft, K, prefill_step_size=STEP)  # several compactions
    peak = mx.get_peak_memory() - before
    assert 0.5 * found.new < peak <= 1.1 * found.new


def test_nothing_is_held_to_take_back_where_all_tokens_fit():
    model = tiny.model()
    plan = planned(model, 512)
    few, many = (Beside(None, None, K, answer=n) for n in (10, 10_000))
    assert few._log(plan, Load(100, STEP)) == 0
    assert many._log(plan, Load(100, STEP)) == log_bytes(plan, K) == plan.nbytes
    assert log_bytes(plan, 64) > plan.nbytes
