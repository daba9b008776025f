"""A server on several ranks: rank 0 has the clients, and all ranks do what it decides between two steps."""

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import launching
import mlx.core as mx
import mlx_lm
import openai
import pytest

from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.host.plan import plan_cache

TEXT = "The people of the town went to the water, and there was a boat with a name on it. "
PROMPTS = [TEXT * 10, "Once " + TEXT * 5, "And then " + TEXT]
ROOM = ("--kv-budget", "64", "--max-kv-memory", "12MB")


def alone():
    """What the prompts give in one process, each by itself, and the bytes of their caches."""
    model, tokenizer = mlx_lm.load(DEFAULT_MODEL)
    model.set_dtype(mx.float32)
    plan = plan_cache(model, 64, prefill="streaming")
    texts = [
        mlx_lm.batch_generate(model, tokenizer, [tokens], [plan.caches(model)], max_tokens=12).texts[0].strip()
        for tokens in map(tokenizer.encode, PROMPTS)
    ]
    return texts, plan.nbytes


def test_two_ranks_answer_as_one_process_reuse_alike_and_end_together(tmp_path):
    texts, whole = alone()
    with launching.serving(tmp_path, *ROOM) as server:
        assert server.kv["budget"]["bytes_per_sequence"] == whole / 2
        with ThreadPoolExecutor(3) as pool:
            answers = pool.map(server.complete, PROMPTS)
            assert [answer.choices[0].text.strip() for answer in answers] == texts
        again = server.complete(PROMPTS[0])
        assert again.choices[0].text.strip() == texts[0]
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
        with pytest.raises(openai.BadRequestError):
            server.complete(PROMPTS[0], max_tokens=-1)
        with server.raw({"prompt": PROMPTS[1], "max_tokens": 4000, "temperature": 1, "stream": True}) as leaving:
            leaving.recv(100)
        server.settle(sequences=0)
        assert server.complete(PROMPTS[2]).choices[0].text.strip() == texts[2]
        os.killpg(server.process.pid, signal.SIGINT)  # as Ctrl-C does
        server.process.wait(timeout=30)
        assert "zm_mlx.server" not in server.log.read_text()
    assert (tmp_path / "served.out").read_text().count("Serving: ") == 1


@pytest.mark.exhaustive
def test_a_rank_of_a_server_that_dies_ends_it(tmp_path):
    with launching.serving(tmp_path, *ROOM) as server:
        server.complete(PROMPTS[2])
        found = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True)
        os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
        server.process.wait(timeout=30)
    assert "error: " in Path(tmp_path / "served.err").read_text()
