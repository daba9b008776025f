"""python -m zm_mlx.server under OpenAI's own client: many at once, some that leave, repeats, and what is wrong."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from mlx_lm.utils import load_tokenizer
from served import serving, watched

from zm_mlx import plan_cache
from zm_mlx.engine import Engine, Settings
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.loading import Source, load_model, widen

TEXT = (Path(__file__).parent.parent / "zm_mlx" / "state" / "layout.py").read_text()
PROMPTS = [TEXT[31 * i :][:length] for i, length in enumerate([1, 9, 20, 33, 61, 90, 120, 150, 200, 260, 330, 410] * 2)]
LONG = TEXT * 3
ROWS = 64


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), "--kv-budget", str(ROWS), "--max-kv-memory", "16MB") as running:
        yield running


def at_once(server, prompts, **more):
    with ThreadPoolExecutor(len(prompts)) as threads:
        return [x.choices[0].text for x in threads.map(lambda p: server.complete(p, **more), prompts)]


def alone(prompt, max_tokens=12):
    """What the package generates without a server."""
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    model = load_model(Source(DEFAULT_MODEL))
    widen(model)
    caches = plan_cache(model, ROWS, prefill="streaming").caches(model)
    engine = Engine(model, tokenizer, DEFAULT_MODEL)
    return "".join(r.text for r in engine.generate(tokenizer.encode(prompt), caches, Settings(max_tokens)))


def test_sixteen_at_once_are_answered_as_one_by_one_and_as_without_a_server(server):
    together = at_once(server, PROMPTS[:16])
    assert together == [server.complete(p).choices[0].text for p in PROMPTS[:16]]
    assert together[11] == alone(PROMPTS[11])


def test_the_cap_holds_at_every_moment_and_what_is_full_is_full_of_snapshots(server):
    with watched(server) as seen:
        at_once(server, [LONG[40 * i :][:1500] for i in range(4)] + PROMPTS[:12])
    assert all(kv["bytes"] <= kv["max_bytes"] == 16_000_000 for kv in seen)
    assert all(kv["sequences"] + kv["snapshots"] <= kv["slots"] for kv in seen)
    assert max(kv["sequences"] for kv in seen) > 1
    last = server.settle(sequences=0, waiting=0)
    assert last["bytes"] == last["snapshots"] * last["budget"]["bytes_per_sequence"]


def test_a_repeat_of_a_prompt_reuses_all_but_its_last_token(server):
    first, second = (server.complete("for name in sorted(names):\n") for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    usage = second.usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    assert server.complete("f").choices[0].text == server.complete("f").choices[0].text  # whose last token is its first


def test_a_stream_says_the_same_as_an_answer_at_once(server):
    stream = server.complete("import os\n\ndef f(", stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    whole = server.complete("import os\n\ndef f(")
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 12


def test_a_seed_decides_whatever_runs_beside_it(server):
    def draw(seed):
        return server.client.completions.create(
            model="default_model", prompt="class A:\n", max_tokens=10, temperature=1.0, seed=seed
        )

    with ThreadPoolExecutor(4) as threads:
        texts = [x.choices[0].text for x in threads.map(draw, [5, 5, 6, 5])]
    assert texts[0] == texts[1] == texts[3] != texts[2]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_mid_answer_gives_its_slot_back(server, stream):
    connection = server.raw({"prompt": "import", "max_tokens": 100_000, "stream": stream})
    server.settle(sequences=1)
    assert server.complete("def f(").choices[0].finish_reason  # beside it
    connection.close()
    server.settle(sequences=0)


def test_a_client_that_leaves_while_its_prompt_is_read_gives_its_slot_back(server):
    for _ in range(3):
        connection = server.raw({"prompt": LONG[:9000], "max_tokens": 100_000})
        server.settle(sequences=1)
        connection.close()
    server.settle(sequences=0, waiting=0)


WRONG = {
    "no body": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "no UTF-8": b"\xff\xfe",
    "too deep": b"[" * 100_000,
    "not a number": b'{"prompt": "a", "temperature": NaN}',
    "two prompts": b'{"prompt": ["a", "b"]}',
    "no prompt": b"{}",
    "an empty prompt": b'{"prompt": ""}',
    "no text": b'{"prompt": "\\ud800"}',
    "an oversized prompt": json.dumps({"prompt": "word " * 20_000}).encode(),
    "an oversized text": json.dumps({"prompt": "a" * 2_000_000}).encode(),
    "no tokens": b'{"prompt": "a", "max_tokens": 0}',
    "top_k": b'{"prompt": "a", "top_k": 10000000}',
    "a seed": b'{"prompt": "a", "seed": -1}',
    "a bias of no token": b'{"prompt": "a", "logit_bias": {"999999": 1}}',
    "a bias of no number": b'{"prompt": "a", "logit_bias": {"1": {}}}',
    "an empty stop": b'{"prompt": "a", "stop": ""}',
    "stream options": b'{"prompt": "a", "stream": true, "stream_options": 5}',
    "a draft": b'{"prompt": "a", "draft_model": "x"}',
    "a penalty": b'{"prompt": "a", "presence_penalty": "x"}',
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_answered_with_400_and_disturbs_nobody(server, what):
    status, _, text = server.post("/v1/completions", WRONG[what])
    error = json.loads(text)["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and error["message"]
    assert server.get("/health") == (200, {"status": "ok"})
    assert server.kv["sequences"] == server.kv["waiting"] == 0


def test_the_client_of_openai_reads_the_reason(server):
    with pytest.raises(openai.BadRequestError, match="several prompts as several requests"):
        server.complete(["a", "b"])
    with pytest.raises(openai.BadRequestError, match="trained on 4096 at most"):
        server.complete("word " * 20_000)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        server.client.chat.completions.create(model="default_model", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.NotFoundError, match="nobody/nothing"):
        server.client.completions.create(model="nobody/nothing", prompt="a")
    assert server.complete("def f(").choices[0].text


def test_a_request_that_does_not_come_keeps_nobody_waiting(server):
    silent = server.raw({"prompt": "a"}, path="/nowhere")
    half = server.raw({"prompt": "a"})
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
    assert server.complete("def f(").choices[0].text
    silent.close()
    half.close()


def test_the_served_model_is_listed_and_may_be_named(server):
    (model,) = server.client.models.list().data
    assert server.client.completions.create(model=model.id, prompt="def f(", max_tokens=2).choices[0].text
    assert server.kv["model"] == model.id


def test_logprobs_come_for_each_token(server):
    body = {"prompt": "def f(", "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "temperature": 0}
    _, _, text = server.post("/v1/completions", json.dumps(body).encode())
    content = json.loads(text)["choices"][0]["logprobs"]["content"]
    assert len(content) == 3 and all(c["logprob"] <= 0 and len(c["top_logprobs"]) == 2 for c in content)


def test_a_hundred_requests_leave_nothing_behind(server):
    prompts = [f"x{i} = " for i in range(100)]
    with ThreadPoolExecutor(16) as threads:
        texts = list(threads.map(lambda p: server.complete(p, max_tokens=2).choices[0].text, prompts))
    assert len(texts) == 100
    kv = server.settle(sequences=0, waiting=0)
    assert kv["snapshots"] <= 32
    assert kv["bytes"] == kv["snapshots"] * kv["budget"]["bytes_per_sequence"]
