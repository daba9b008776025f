"""The server with a draft model: the text without one, whoever asks and leaves, in the same fixed memory."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.sample_utils import make_logits_processors
from served import serving, watched
from test_server import LONG, PROMPTS, alone
from test_speculative import Noisy
from tiny import assert_same_state, model, prompt

import zm_mlx
from zm_mlx import cache_prompt
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.serving.drafted import Drafted

QUOTED = "one two three four five six seven eight nine ten, " * 8 + "eleven"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A draft model, which is the small model in float32, and a prompt that was saved."""
    folder = tmp_path_factory.mktemp("draft")
    shutil.copytree(DEFAULT_MODEL, folder / "draft")
    for file in (folder / "draft").glob("*.safetensors"):
        weights = {name: x.astype(mx.float32) for name, x in mx.load(str(file)).items()}
        mx.eval(weights)
        mx.save_safetensors(str(file), weights)
    saved = str(folder / "saved.safetensors")
    flags = ["--prompt", QUOTED, "--prompt-cache-file", saved, "--kv-budget", "64", "--prefill", "streaming"]
    assert cache_prompt.main(flags) == 0
    return folder, str(folder / "draft"), saved


@pytest.fixture(scope="module")
def server(files):
    folder, draft, saved = files
    flags = ("--kv-budget", "64", "--max-kv-memory", "16MB", "--prompt-cache-file", saved, "--num-draft-tokens", "4")
    with serving(folder, "--draft-model", draft, *flags) as running:
        yield running


def test_several_clients_get_the_text_without_a_draft_one_after_the_other_within_the_cap(server):
    asked = [PROMPTS[4], PROMPTS[11], LONG[:1500]]
    with watched(server) as seen, ThreadPoolExecutor(3) as threads:
        texts = [x.choices[0].text for x in threads.map(lambda p: server.complete(p, 40), asked)]
    assert texts == [alone(p, 40) for p in asked]
    assert max(kv["sequences"] for kv in seen) == 1
    assert all(kv["bytes"] <= kv["max_bytes"] and kv["sequences"] + kv["snapshots"] <= kv["slots"] for kv in seen)
    last = server.settle(sequences=0, waiting=0)
    assert last["bytes"] == last["snapshots"] * last["budget"]["bytes_per_sequence"]
    assert last["draft_model"] and "up to 4 tokens" in server.log.read_text()


def test_a_repeat_reuses_its_prompt_and_a_follower_the_saved_one(server):
    first, second = (server.complete("for name in sorted(names):\n", 30) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    usage = second.usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    assert server.complete(QUOTED + " twelve").usage.prompt_tokens_details.cached_tokens > 50


def test_a_client_that_leaves_gives_the_next_one_its_place(server):
    connection = server.raw({"prompt": "import", "max_tokens": 100_000, "stream": True})
    server.settle(sequences=1)
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(server.complete, PROMPTS[5])
        server.settle(waiting=1)
        connection.close()
        assert waits.result().choices[0].text == alone(PROMPTS[5])
    server.settle(sequences=0)


def test_a_request_does_not_choose_the_draft(server):
    status, _, text = server.post("/v1/completions", b'{"prompt": "a", "draft_model": "x"}')
    assert status == 400 and "--draft-model" in text
    assert server.complete(PROMPTS[4]).choices[0].text


def test_another_model_that_a_request_names_answers_without_the_draft(server, files):
    other = files[1]
    answer = server.client.completions.create(model=other, prompt=PROMPTS[4], max_tokens=12, temperature=0)
    assert answer.choices[0].text == alone(PROMPTS[4])  # it is the same model in another place
    assert server.kv["model"] == other and server.kv["draft_model"] is None
    assert server.complete(PROMPTS[4]).choices[0].text == alone(PROMPTS[4])
    assert server.kv["draft_model"] == other


def test_a_draft_that_fits_with_the_model_no_more_is_refused_with_a_budget_that_works(files):
    _, draft, _ = files
    flags = ["--draft-model", draft, "--max-kv-memory", "9MB", "--kv-budget", "1024"]
    command = [sys.executable, "-m", "zm_mlx.server", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "the largest that works is --kv-budget " in done.stderr, done.stderr


# ---- one sequence, beside mlx-lm's batch of one


@pytest.fixture(scope="module")
def made():
    return model()


def answered(batch, caches, text, stop=(), processors=(), count=50):
    """The last response, after a prompt with a mark in its middle, and the snapshot of that mark."""
    (uid,) = batch.insert_segments(
        segments=[[text[:19], text[19:20], text[20:]]],
        max_tokens=[count],
        caches=[caches],
        all_tokens=[[]],
        samplers=[None],
        logits_processors=[list(processors)],
        stop_sequences=[StopSequences([list(stop)] if stop else None)],
    )
    snapshot = None
    while True:
        prompts, tokens = batch.next()
        if snapshot is None and any(r.progress[0] == 20 for r in prompts):
            snapshot = batch.extract_cache([uid])[uid]
        for response in tokens:
            if response.finish_reason is not None:
                return response, snapshot


def plain(made):
    return BatchGenerator(made, prefill_step_size=64, stream=mx.default_stream(mx.default_device()))


@pytest.mark.parametrize(("length", "k", "penalised"), [(30, 3, True), (300, 8, False)])
def test_a_sequence_ends_with_the_tokens_and_caches_of_mlx_lm_s_batch(made, length, k, penalised):
    """Also where a stop sequence ends it in the middle of what was drafted, and with processors of logits."""
    text = prompt(length)[0].tolist()
    processors = make_logits_processors(None, 1.4, 20) if penalised else []
    fresh = [zm_mlx.make_prompt_cache(made, 24) for _ in range(2)]
    expected, _ = answered(plain(made), fresh[0], text, processors=processors)
    for stop in ((), expected.all_tokens[length + 30 : length + 33]):
        expected, _ = answered(plain(made), fresh[0], text, stop, processors)
        found, (caches, held) = answered(
            Drafted(made, Noisy(made), k, 64), [*fresh[0], *fresh[1]], text, stop, processors
        )
        assert found.all_tokens == expected.all_tokens and found.finish_reason == expected.finish_reason
        assert {c.offset for c in found.prompt_cache} == {len(found.all_tokens)}
        assert held == text[:20] and {c.offset for c in caches} == {20}
        for a, b in zip(found.prompt_cache, expected.prompt_cache, strict=False):
            assert_same_state(a, b)
    assert not any(c.offset for caches in fresh for c in caches)  # they may be a snapshot's


def test_a_step_that_fails_leaves_a_batch_that_can_be_closed_and_a_model_that_answers_on(made, monkeypatch):
    text = prompt(40)[0].tolist()
    caches = [[*zm_mlx.make_prompt_cache(made, 24), *zm_mlx.make_prompt_cache(made, 24)] for _ in range(2)]
    expected, _ = answered(Drafted(made, made, 3, 64), caches[0], text)
    batch, attend, calls = Drafted(made, made, 3, 64), type(caches[0][0]).attend, iter(range(10**6))

    def fail(self, *args):
        if next(calls) == 25:  # in the middle of a call that verifies or drafts
            raise RuntimeError("injected")
        return attend(self, *args)

    monkeypatch.setattr(type(caches[0][0]), "attend", fail)
    with pytest.raises(RuntimeError, match="injected"):
        answered(batch, caches[0], text)
    batch.close()
    assert batch.prompt_cache_nbytes == 0 and batch.next() == ([], [])
    assert answered(batch, caches[1], text)[0].all_tokens == expected.all_tokens
