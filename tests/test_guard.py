"""The memory guard: what does not fit is refused before anything is allocated, what is named instead is accepted."""

import gc
import re
from dataclasses import replace

import mlx.core as mx
import pytest
import tiny
from commands import document, run

from zm_mlx import cache_prompt, generate, plan_cache
from zm_mlx.errors import MemoryGuardError
from zm_mlx.host import caches, guard
from zm_mlx.host.caches import Wish
from zm_mlx.host.guard import Load, settled
from zm_mlx.host.predicting import bound, caches_alone, predict
from zm_mlx.policies import name_of, named

PROMPT = "import os\n" * 120
FLAGS = ["-m", "2", "--verbose", "False"]


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free, as far as the guard knows."""

    def set_to(room):
        monkeypatch.setattr(guard, "free_bytes", lambda reserve=0: room)

    gc.collect()  # what an earlier test left would end in the middle of measuring
    set_to(None)
    return set_to


@pytest.fixture
def peaks(monkeypatch):
    """The peaks of memory that measuring took, which it resets."""
    found = []
    reset = mx.reset_peak_memory

    def noting():
        found.append(mx.get_peak_memory())
        reset()

    monkeypatch.setattr(mx, "reset_peak_memory", noting)
    return found


def planned(rows, tokens, prefill="streaming", model=None, **more):
    model = model or tiny.model()
    return model, plan_cache(model, rows, prompt_length=tokens, prefill=prefill, room=False, **more)


def needed(model, plan, load):
    mx.clear_cache()
    return predict(model, plan, load).new


# ---- refusals


@pytest.mark.parametrize(
    ("rows", "tokens", "prefill", "step", "part", "remedy"),
    [
        (20_000, 2, "streaming", 512, 0.5, r"--kv-budget \d+"),
        (64, 4000, "exact", 64, 0.85, "--prefill streaming"),
        (64, 600, "exact", 600, 0.9, r"--prefill-step-size \d+"),
        (20_000, 1000, "exact", 1000, 0.5, r"--prefill streaming --prefill-step-size 64 --kv-budget \d+"),
    ],
)
def test_each_remedy_that_is_named_is_accepted(free, rows, tokens, prefill, step, part, remedy):
    model, plan = planned(rows, tokens, prefill)
    load = Load(tokens, step)
    free(int(part * needed(model, plan, load)))
    with pytest.raises(MemoryGuardError, match="--force tries it all the same") as refused:
        guard.guard(model, plan, load)
    named_flags = re.search("what fits: (.*); --force", str(refused.value))[1].split(" or ")
    assert any(re.fullmatch(remedy, flags) for flags in named_flags)
    for flags in named_flags:
        asked = dict(re.findall(r"--([a-z-]+) (\S+)", flags))
        again = planned(
            int(asked.get("kv-budget", rows)), tokens, asked.get("prefill", prefill), model, head_rows=None
        )[1]
        guard.guard(model, again, replace(load, step=int(asked.get("prefill-step-size", step))))


def test_a_refusal_allocates_nothing_and_measuring_stays_within_what_is_free(free, peaks):
    model, plan = planned(256, 700, "exact")
    mx.clear_cache()
    held, load = mx.get_active_memory(), Load(700, 700)
    room = int(0.8 * needed(model, plan, load))
    free(room)
    peaks.clear()
    with pytest.raises(MemoryGuardError):
        guard.guard(model, plan, load)
    assert peaks and max(peaks) <= held + 1.1 * room  # what is read whole takes 1.25 times as much
    mx.clear_cache()
    assert mx.get_active_memory() <= held + 20_000


def test_caches_beyond_memory_are_refused_unmeasured(free, peaks):
    model, plan = planned(10**7, 2)
    free(10**8)
    with pytest.raises(MemoryGuardError, match="for the KV cache"):
        guard.guard(model, plan, Load(2, 512))
    assert all(peak < 10**8 for peak in peaks)


def test_where_nothing_fits_the_message_says_so(free):
    model, plan = planned(64, 500)
    free(1000)
    with pytest.raises(MemoryGuardError, match="no smaller budget or step fits either"):
        guard.guard(model, plan, Load(500, 512))


def test_a_saved_prompts_budget_is_not_to_be_changed(free):
    model, plan = planned(300, 500)
    free(needed(model, plan, Load(500, 512)) // 2)
    with pytest.raises(MemoryGuardError) as refused:
        guard.guard(model, plan, Load(500, 512, held=plan.nbytes // 8, seen=100))
    assert "--kv-budget" not in str(refused.value)


def test_sequences_and_prompts_count(free):
    model, plan = planned(128, 400)
    one = needed(model, plan, Load(400, 128))
    many = needed(model, plan, Load(400, 128, sequences=9))
    assert many == pytest.approx(one + 8 * plan.nbytes, rel=0.02)
    assert needed(model, plan, Load(400, 128, sequences=9, prompts=4)) > many
    free(int(1.2 * one))
    guard.guard(model, plan, Load(400, 128))
    with pytest.raises(MemoryGuardError, match="99 sequences would take"):
        guard.guard(model, plan, Load(400, 128, sequences=99))


@pytest.mark.parametrize("wrong", [(0, 1), (1, 0), (1, 1, 0), (1, 1, 1, 2), (1, 1, 1, 1, -1)])
def test_a_load_without_meaning_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|more than"):
        Load(*wrong)


# ---- what fits


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "tokens", "prefill", "step"),
    [(64, 2, "streaming", 512), (64, 300, "streaming", 64), (64, 300, "exact", 512), (200, 300, "streaming", 2048)],
)
def test_what_fits_twice_is_never_refused(free, dtype, rows, tokens, prefill, step):
    model, plan = planned(rows, tokens, prefill, tiny.model(dtype=dtype))
    load = Load(tokens, step)
    need = needed(model, plan, load)
    assert caches_alone(plan, load).new <= 1.05 * need  # measured caches may be smaller by what is not used yet
    free(2 * need)
    guard.guard(model, plan, load)


@pytest.mark.parametrize("policy", [named("zeromerge"), named("zeromerge", "reread"), named("paper")], ids=name_of)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_a_bound_is_no_less_than_the_peak(policy, dtype):
    """In 16 bits on a CPU each query has a copy of all rows."""
    model, plan = planned(80, 300, policy=policy, model=tiny.model(dtype=dtype))
    for step in (64, 512):
        assert bound(model, plan, Load(300, step)).new >= predict(model, plan, Load(300, step)).new


def test_nothing_is_measured_where_far_more_is_free_or_nobody_knows(free, peaks):
    model, plan = planned(64, 500)
    for room in (10**12, None):
        free(room)
        assert not guard.guard(model, plan, Load(500, 512)).measured
    assert not peaks


def test_random_numbers_memory_and_caches_are_left_as_they_were(free):
    model = tiny.model()
    cache_set = caches.fresh(model, "zeromerge", Wish("64", room=False), 500, 10)
    need = needed(model, cache_set.plan, Load(500, 512))
    free(int(1.2 * need))
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.clear_cache()
    mx.random.seed(5)
    held = mx.get_active_memory()
    found = settled(model, cache_set, 500, 512)
    mx.clear_cache()
    assert found.predicted is not None and found.seen == 0 and mx.get_active_memory() <= held + 20_000
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_a_prompt_that_cannot_be_held_whole_streams_where_nobody_asked_for_exact(free):
    model = tiny.model()
    made = {how: caches.fresh(model, "zeromerge", Wish("64", how, room=False), 3000, 10) for how in ("auto", "exact")}
    assert made["auto"].plan.prefill == "exact"
    whole = needed(model, made["auto"].plan, Load(3000, 64))
    assert needed(model, replace(made["auto"].plan, prefill="streaming"), Load(3000, 64)) < 0.8 * whole
    free(int(0.9 * whole))
    found = settled(model, made["auto"], 3000, 64)
    assert found.plan.prefill == "streaming" and "enough memory" in found.plan.prefill_reason
    assert all(c.prefill == "streaming" for c in found.growing)
    with pytest.raises(MemoryGuardError, match="what fits: --prefill streaming"):
        settled(model, made["exact"], 3000, 64)


def test_mlx_lms_own_caches_are_not_judged(free):
    free(0)
    model = tiny.model()
    for kind in ("full", "rotating"):
        made = caches.fresh(model, kind, Wish("64"), 500, 10)
        assert settled(model, made, 500, 512) is made


# ---- commands


def test_generate_refuses_in_one_line_what_it_then_accepts_and_force_goes_on(free, capsys):
    free(13 * 10**6)
    asked = ["--prompt", PROMPT, "--kv-budget", "512", *FLAGS]
    code, out, err = run(generate.main, capsys, *asked)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and "0.013 GB are free here; what fits: " in err
    flags = re.search("what fits: (.*?)( or .*)?; --force", err)[1].split()
    code, out, _ = run(generate.main, capsys, *asked, *flags, "--json")
    assert code == 0 and document(out)["prompt_tokens_done"] > 300
    assert run(generate.main, capsys, *asked, "--force")[0] == 0


def test_what_was_predicted_is_shown_beside_the_peak(free, capsys):
    free(4 * 10**7)
    asked = ["--prompt", PROMPT, "--kv-budget", "256", "-m", "2", "--json"]
    code, out, _ = run(generate.main, capsys, *asked)
    found = document(out)
    assert code == 0 and re.search(r"Peak memory: \d\.\d+ GB \(\d\.\d+ GB predicted\)", out)
    assert 0.9 < found["predicted_memory_bytes"] / found["peak_memory_bytes"] < 1.1
    free(None)
    assert document(run(generate.main, capsys, *asked)[1])["predicted_memory_bytes"] is None


def test_cache_prompt_and_a_continued_prompt_are_guarded(free, capsys, tmp_path):
    file = str(tmp_path / "p.safetensors")
    save = ["--prompt", PROMPT, "--prompt-cache-file", file, "--kv-budget", "512"]
    free(3 * 10**6)
    code, _, err = run(cache_prompt.main, capsys, *save)
    assert code == 2 and "free here" in err and not (tmp_path / "p.safetensors").exists()
    free(13 * 10**6)
    flags = re.search("what fits: (.*?)( or .*)?; --force", run(cache_prompt.main, capsys, *save)[2])[1].split()
    assert run(cache_prompt.main, capsys, *save, *flags)[0] == 0
    free(3 * 10**6)
    assert run(cache_prompt.main, capsys, *save, "--force")[0] == 0
    go_on = ["--prompt", PROMPT, "--prompt-cache-file", file, *FLAGS]
    code, out, err = run(generate.main, capsys, *go_on)
    assert code == 2 and out == "" and "--kv-budget" not in err
    assert run(generate.main, capsys, *go_on, "--force")[0] == 0
    free(10**9)
    assert run(generate.main, capsys, *go_on)[0] == 0
