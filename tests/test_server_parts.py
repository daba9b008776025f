"""Parts of the server by themselves: flags, what a sequence costs, where prompts are cut, seeds, wrong messages."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest
import tiny
from commands import run
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from zm_mlx import plan_cache, server
from zm_mlx.errors import UserError
from zm_mlx.host import guard
from zm_mlx.phases import PIECE
from zm_mlx.serving import checks
from zm_mlx.serving import slots as slots_module
from zm_mlx.serving.job import Job, Prompt
from zm_mlx.serving.preparing import _marks, seeded
from zm_mlx.serving.refusal import ClientLeft, Refusal
from zm_mlx.serving.slots import Cost, Slots, measure, require, require_memory
from zm_mlx.serving.waiting import QUEUE, Waiting

mlx_lm_server = importlib.import_module("mlx_lm.server")


def test_every_flag_of_mlx_lm_is_one_of_ours():
    theirs = {flag for a in server._theirs()._actions for flag in a.option_strings}
    ours = {flag for a in server.setup_arg_parser()._actions for flag in a.option_strings}
    assert theirs <= ours and {"--kv-budget", "--max-kv-memory", "--policy", "--score", "--head-rows"} <= ours
    assert "--decode-concurrency" in theirs  # or the wrong parser was caught


def test_the_server_listens_to_this_machine_alone_unless_it_is_told_to():
    assert server.setup_arg_parser().parse_args([]).host == "127.0.0.1"
    assert server._loopback("127.0.0.1") and server._loopback("localhost") and not server._loopback("0.0.0.0")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kv-budget", "0.2"], "rows per head"),
        (["--kv-budget", "0"], "holds nothing"),
        (["--max-kv-memory", "8"], "bytes with a unit"),
        (["--max-kv-memory", "0.5"], "bytes with a unit"),
        (["--score", "reread"], "use replay"),
        (["--max-tokens", "-1"], "from 1 up"),
        (["--decode-concurrency", "0"], "--decode-concurrency"),
        (["--num-draft-tokens", "2"], "needs --draft-model"),
        (["--draft-model", "x", "--num-draft-tokens", "0"], "--num-draft-tokens must be an integer from 1"),
        (["--kv-bits", "5"], "--kv-bits must be 8 or 4"),
        (["--chat-template-args", "[]"], "JSON object"),
        (["--prompt-cache-file", "nowhere.safetensors"], "no prompt cache file"),
        (["--nonsense"], "--help lists the flags"),
    ],
)
def test_flags_that_do_not_work_are_refused_with_a_remedy(capsys, flags, words):
    code, _, err = run(server.main, capsys, *flags)
    assert code == 2 and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-kv-memory", "5MB", "--kv-budget", "1024"], "the largest that works is --kv-budget "),
        (["--host", "256.0.0.1", "--kv-budget", "64"], "--host 256.0.0.1"),
    ],
)
def test_a_server_that_cannot_start_says_why_and_ends(flags, words):
    done = subprocess.run([sys.executable, "-m", "zm_mlx.server", *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("zm_mlx.server: error")]) == 1


# ---- slots


def planned(rows=64):
    model = tiny.model()
    plan = plan_cache(model, rows, prefill="streaming")
    return model, plan, measure(model, plan, plan.caches(model))


@pytest.mark.parametrize("rows", [64, 700])
@pytest.mark.parametrize("step", [100, PIECE])
def test_a_sequence_never_takes_more_than_it_was_said_to_cost(rows, step):
    model, plan, (cost, vocabulary) = planned(rows)
    caches = plan.caches(model)
    most = 0
    for chunk in tiny.chunks(1700, step):
        model(tiny.prompt(1700)[:, chunk], cache=caches)
        mx.eval([c.state for c in caches])
        most = max(most, sum(c.nbytes for c in caches))
    assert vocabulary == 96
    assert cost.sequence < most <= cost.sequence + cost.piece
    model(tiny.prompt(1), cache=caches)
    assert sum(c.nbytes for c in caches) == cost.sequence == plan.nbytes


def test_a_batch_of_the_servers_never_takes_more_than_its_slots():
    model, plan, (cost, _) = planned()
    batch = BatchGenerator(model, prefill_batch_size=2, prefill_step_size=200)
    batch.insert(
        [tiny.prompt(n, n)[0].tolist() for n in (700, 30, 401, 1)], [5] * 4, [plan.caches(model) for _ in range(4)]
    )
    most = 0
    while any(batch.next()):
        most = max(most, batch.prompt_cache_nbytes)
    assert 0 < most <= 4 * cost.sequence + 2 * cost.piece


def test_slots_are_what_memory_holds_beside_the_prompts_that_are_read():
    cost = Cost(sequence=100, piece=50, store=10)
    found = {memory: Slots.of(memory, cost, 4, 99) for memory in (1000, 320, 160, 159)}
    assert {memory: (x.total, x.prompts) for memory, x in found.items()} == {
        1000: (7, 4),
        320: (2, 2),
        160: (1, 1),
        159: (0, 1),
    }
    assert all(x.used <= memory for memory, x in found.items() if x.total)
    assert Slots.of(1000, cost, 4, 5).total == 5


def test_a_budget_that_does_not_fit_names_the_largest_that_does():
    model, plan, (cost, _) = planned(512)
    memory = cost.sequence + cost.piece + cost.store - 1
    with pytest.raises(UserError, match="the largest that works is --kv-budget ") as refused:
        require(plan, Slots.of(memory, cost, 4, 99))
    with pytest.raises(UserError, match="the smallest one takes"):
        require(plan, Slots.of(1000, cost, 4, 99))
    rows = int(str(refused.value).rsplit(" ", 1)[1])
    for tried, fits in ((rows, 1), (rows + 1, 0)):
        other = plan_cache(model, tried, prefill="streaming")
        assert (Slots.of(memory, measure(model, other, other.caches(model))[0], 4, 99).total >= 1) == bool(fits)


def test_what_the_machine_cannot_hold_is_refused_and_what_is_named_instead_fits(monkeypatch):
    model, plan, (cost, _) = planned()
    slots = Slots.of(60_000_000, cost, 4, 10**6)
    free = 40_000_000
    for module in (guard, slots_module):
        monkeypatch.setattr(module, "free_bytes", lambda reserve=0: free)
    require_memory(model, plan, slots, 64, force=True)
    with pytest.raises(UserError, match=r"--max-kv-memory \d+MB fits; --force") as refused:
        require_memory(model, plan, slots, 64, force=False)
    fits = int(str(refused.value).split("--max-kv-memory ")[1].split("MB")[0]) * 10**6
    require_memory(model, plan, Slots.of(fits, cost, 4, 10**6), 64, force=False)
    free = cost.sequence
    with pytest.raises(UserError, match="a smaller --prefill-step-size or --prompt-concurrency"):
        require_memory(model, plan, slots, 64, force=False)


# ---- prompts


def cut(tokens, marks, held):
    context = SimpleNamespace(_should_stop=False)
    return Prompt(None, list(range(tokens)), marks, context, None, True, True).segments(held)


def test_a_prompt_stops_at_every_mark_and_never_loses_a_token():
    marks = {4: "system", 9: "prompt"}
    assert [len(s) for s in cut(10, marks, 0)] == [3, 1, 5, 1]
    assert [len(s) for s in cut(10, marks, 4)] == [5, 1]
    assert [len(s) for s in cut(10, marks, 9)] == [1]
    for held in range(10):
        assert [t for s in cut(10, marks, held) for t in s] == list(range(held, 10))
        assert all(cut(10, marks, held))


def test_marks_are_the_ends_of_the_system_prompt_and_of_the_prompt():
    tokens = list(range(10))
    assert _marks(tokens, [tokens], ["assistant"]) == {9: "prompt"}
    assert _marks(tokens, [tokens[:4], tokens[4:]], ["system", "user"]) == {9: "prompt", 4: "system"}
    thinking = [tokens[:4], tokens[4:8], tokens[8:]]
    assert _marks(tokens, thinking, ["system", "user", "assistant"]) == {8: "prompt", 4: "system"}
    assert _marks([1], [[1]], ["assistant"]) == {}


def test_a_seed_draws_as_mlx_lms_own_and_leaves_others_alone():
    logprobs = mx.log(mx.softmax(mx.random.normal((1, 50), key=mx.random.key(3)), axis=-1))
    sampler = make_sampler(1.0)
    mx.random.seed(11)
    own = [sampler(logprobs).item() for _ in range(5)]
    mx.random.seed(7)
    undisturbed = [sampler(logprobs).item() for _ in range(5)]
    mx.random.seed(7)
    drawing = seeded(sampler, 11)
    pairs = [(drawing(logprobs).item(), sampler(logprobs).item()) for _ in range(5)]
    assert [a for a, _ in pairs] == own and [b for _, b in pairs] == undisturbed


# ---- jobs and their queue


def test_a_client_that_leaves_is_noticed_while_nothing_comes():
    job = Job(None, None, left=lambda: True)
    with pytest.raises(ClientLeft):
        next(job.items(lambda: None))
    assert job.abandoned


def test_an_answer_that_is_never_read_counts_as_abandoned():
    """Such as when a client leaves before the head of its answer is sent."""
    job = Job(None, None)
    job.put("context")
    items = job.items(lambda: None)
    assert next(items) == "context" and not job.abandoned
    del items
    assert job.abandoned


def test_what_is_put_arrives_in_order_and_a_refusal_ends_it():
    job = Job(None, None)
    for item in (1, (2, 3), Refusal(500, "broken")):
        job.put(item)
    items = job.items(lambda: None)
    assert [next(items), next(items)] == [1, (2, 3)]
    with pytest.raises(Refusal, match="broken"):
        next(items)


def test_only_one_takes_a_request_out_of_the_queue():
    waiting, job = Waiting(), Job(None, None)
    waiting.put(job)
    assert waiting.first() is job and waiting.take(job) and not waiting.take(job)
    for _ in range(QUEUE):
        waiting.put(Job(None, None))
    with pytest.raises(Refusal) as refused:
        waiting.put(job)
    assert refused.value.status == 503 and refused.value.retry_after


# ---- messages


def text(**more):
    return [{"role": "user", "content": "hi"} | more]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        [5],
        [{"content": "hi"}],
        text(role=5),
        text(content=5),
        text(content=[{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]),
        text(content=[{"type": "text", "text": None}]),
        text(content="\ud800"),
        text(tool_calls=5),
        text(tool_calls=["x"]),
    ],
)
def test_messages_that_no_template_takes_are_refused_before_anything_is_fetched(messages):
    with pytest.raises(Refusal) as refused:
        checks.parse(json.dumps({"messages": messages}).encode(), checks.CHATS[0])
    assert refused.value.status == 400


def test_null_is_as_good_as_nothing():
    body = checks.parse(b'{"prompt": ["a"], "stop": null, "seed": null, "max_tokens": null}', checks.COMPLETIONS)
    assert body == {"prompt": "a"}
