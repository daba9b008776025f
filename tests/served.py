"""A server in a process of its own, as its users run it, and what it says of its KV caches."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from functools import cached_property
from pathlib import Path

import openai


class Served:
    """A running server.

    Args:
        url: its address, without a path.
        process: the server itself.
        log: the file with all it has printed.
    """

    def __init__(self, port, process, log):
        self.port, self.url, self.process, self.log = port, f"http://127.0.0.1:{port}", process, log

    @cached_property
    def client(self):
        """The client of OpenAI, which here does not try again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def complete(self, prompt, max_tokens=12, **more):
        """The answer to a prompt, greedy."""
        return self.client.completions.create(
            model="default_model", prompt=prompt, max_tokens=max_tokens, temperature=0, **more
        )

    def get(self, path):
        """Status and JSON of a route."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    @property
    def kv(self):
        return self.get("/v1/kv")[1]

    def post(self, path, body):
        """Status, headers and text of the answer to a body of bytes, whatever it holds."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def raw(self, body, path="/v1/completions"):
        """A connection on which a request was sent, and nothing read."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection

    def settle(self, **wanted):
        """Wait until ``/v1/kv`` says these numbers, half a minute at most; what it said last."""
        end = time.monotonic() + 30
        while time.monotonic() < end and any((kv := self.kv)[name] != value for name, value in wanted.items()):
            time.sleep(0.05)
        assert {name: kv[name] for name in wanted} == wanted
        return kv


@contextlib.contextmanager
def serving(folder, *args, command=("-m", "zm_mlx.server")):
    """A server with these flags, until the end of the block; it must end by itself when it is asked to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(folder) / f"server-{port}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port), *args], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        server = Served(port, process, log)
        end = time.monotonic() + 120
        while not answers(server):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield server
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def answers(server):
    """Whether a server is there."""
    try:
        return server.get("/health")[0] == 200
    except OSError:
        return False


@contextlib.contextmanager
def watched(server):
    """What the server says of its KV caches all the while: a list that grows."""
    seen, over = [], threading.Event()

    def watch():
        while not over.is_set():
            seen.append(server.kv)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
