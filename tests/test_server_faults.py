"""A server that is full, or whose step fails: everybody hears what happened, and the next request is served."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from served import serving

FAULTY = str(Path(__file__).parent / "faulty_server.py")
ENDLESS = 100_000  # tokens of an answer that nobody waits for


@pytest.fixture(scope="module")
def fault(tmp_path_factory):
    """The file whose presence makes the next step fail."""
    return tmp_path_factory.mktemp("fault") / "now"


@pytest.fixture(scope="module")
def server(fault):
    """One sequence at a time, two that wait, for two seconds at most."""
    flags = ("--kv-budget", "64", "--max-kv-memory", "8MB", "--decode-concurrency", "1")
    with serving(fault.parent, *flags, command=(FAULTY, str(fault))) as running:
        yield running


def beside(server, threads, prompt, **more):
    return threads.submit(lambda: server.complete(prompt, **more).choices[0].text)


@pytest.mark.parametrize("stream", [True, False])
def test_a_step_that_fails_fails_its_own_requests_and_no_others(server, fault, stream):
    with ThreadPoolExecutor(1) as threads:
        hit = server.raw({"prompt": "import", "max_tokens": ENDLESS, "stream": stream})
        server.settle(sequences=1)
        waits = beside(server, threads, "def f(")
        server.settle(waiting=1)
        fault.touch()
        assert waits.result(60)
    answer = b""
    while block := hit.recv(65536):
        answer += block
    assert b"injected" in answer and b"server_error" in answer
    assert answer.startswith(b"HTTP/1.0 200" if stream else b"HTTP/1.0 500")
    assert server.get("/health") == (200, {"status": "ok"})
    server.settle(sequences=0, waiting=0)


def test_the_client_of_openai_hears_of_a_failure_in_mid_stream(server, fault):
    stream = server.complete("import", ENDLESS, stream=True)
    next(iter(stream))
    fault.touch()
    with pytest.raises(openai.APIError, match="injected"):
        list(stream)


def test_what_was_kept_outlives_a_failed_step(server, fault):
    prompt = "class Outliving:\n    def"
    text = server.complete(prompt).choices[0].text
    with pytest.raises(openai.InternalServerError, match="injected"):
        fault.touch()
        server.complete("other")
    again = server.complete(prompt)
    assert again.choices[0].text == text
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_a_full_server_says_when_to_come_again(server):
    endless = server.raw({"prompt": "import", "max_tokens": ENDLESS})
    server.settle(sequences=1)
    begin = time.monotonic()
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    with ThreadPoolExecutor(5) as threads:
        answers = list(
            threads.map(lambda _: (server.post("/v1/completions", body), time.monotonic() - begin), range(5))
        )
    assert all(status == 503 and int(headers["Retry-After"]) > 0 for (status, headers, _), _ in answers)
    words = [json.loads(text)["error"]["message"] for (_, _, text), _ in answers]
    assert sum("wait already" in w for w in words) == 3 and sum("no slot came free" in w for w in words) == 2
    assert server.get("/health")[0] == 200
    endless.close()
    server.settle(sequences=0, waiting=0)
    assert server.complete("a").choices[0].text


def test_a_client_that_leaves_while_it_waits_leaves_the_queue(server):
    endless = server.raw({"prompt": "import", "max_tokens": ENDLESS})
    server.settle(sequences=1)
    with ThreadPoolExecutor(1) as threads:
        gone = server.raw({"prompt": "b"})
        server.settle(waiting=1)
        gone.close()
        time.sleep(0.6)
        endless.close()
        assert beside(server, threads, "def f(").result(60)
    server.settle(sequences=0, waiting=0)


def test_the_default_client_of_openai_tries_again_until_it_is_served(server):
    endless = server.raw({"prompt": "import", "max_tokens": ENDLESS})
    server.settle(sequences=1)
    with ThreadPoolExecutor(1) as threads:
        client = server.client.with_options(max_retries=3)
        answer = threads.submit(lambda: client.completions.create(model="default_model", prompt="a", max_tokens=2))
        time.sleep(3)
        endless.close()
        assert answer.result(60).choices[0].text
