"""A server on several ranks: rank 0 has the clients, and all ranks do what it decides between two steps."""

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import launching
import openai
import pytest
from served import serving

TEXT = "The people of the town went to the water, and there was a boat with a name on it. "
PROMPTS = [TEXT * 10, "Once " + TEXT * 5, "And then " + TEXT]
ROOM = ("--kv-budget", "64", "--max-kv-memory", "12MB")


def test_two_ranks_answer_as_one_process_reuse_alike_and_end_together(tmp_path):
    def text(server, prompt):
        return server.complete(prompt).choices[0].text

    with serving(tmp_path, *ROOM) as server:
        alone = [text(server, prompt) for prompt in PROMPTS]
        whole = server.kv["budget"]["bytes_per_sequence"]
    with launching.serving(tmp_path, *ROOM) as server:
        assert server.kv["budget"]["bytes_per_sequence"] == whole / 2
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda prompt: text(server, prompt), PROMPTS)) == alone
        again = server.complete(PROMPTS[0])
        assert again.choices[0].text == alone[0]
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
        with pytest.raises(openai.BadRequestError):
            server.complete(PROMPTS[0], max_tokens=-1)
        with server.raw({"prompt": PROMPTS[1], "max_tokens": 4000, "temperature": 1, "stream": True}) as leaving:
            leaving.recv(100)
        server.settle(sequences=0)
        assert text(server, PROMPTS[2]) == alone[2]
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
