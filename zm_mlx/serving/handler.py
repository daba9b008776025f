"""HTTP: mlx-lm's handler, with every failure answered, and clients that leave noticed."""

import json
import logging
import os
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from mlx_lm.server import APIHandler

from . import checks, status
from .refusal import ClientLeft, Refusal

BODY = 32 * 2**20  # bytes of a request at most
DISCARDED = 256 * 2**20  # bytes of a longer one that are read and dropped, so that its client hears why
BLOCK = 2**16


class Server(ThreadingHTTPServer):
    """Many clients may knock at the same time."""

    request_queue_size = 128
    daemon_threads = True


class Handler(APIHandler):  # type: ignore[misc]
    """One connection."""

    rfile: Any
    timeout = 60  # seconds that a client may keep this thread waiting
    _sent = False  # whether the head of an answer is on its way

    def do_POST(self) -> None:
        """Check a request's body, and give it to mlx-lm's handler in the form that this expects."""
        with self._answering():
            if self.path != checks.COMPLETIONS and self.path not in checks.CHATS:
                raise Refusal(404, f"there is no {self.path} here")
            body = json.dumps(checks.parse(self._body(), self.path)).encode()
            self.headers.replace_header("Content-Length", str(len(body)))
            own: Any = self.rfile
            self.rfile = BytesIO(body)
            try:
                super().do_POST()
            finally:
                self.rfile = own

    def do_GET(self) -> None:
        """mlx-lm's routes, and what the KV caches hold."""
        with self._answering():
            if self.path == "/v1/kv":
                self._json(200, status.kv(self.response_generator))
            elif self.path == "/health":
                self._json(*status.health(self.response_generator))
            elif self.path.startswith("/v1/models"):
                self.handle_models_request()
            else:
                raise Refusal(404, f"there is no {self.path} here")

    def handle_models_request(self) -> None:
        """mlx-lm's list of models, which it cannot make where nothing was ever downloaded."""
        if os.path.isdir(HF_HUB_CACHE):
            super().handle_models_request()
            return
        name = str(Path(self.response_generator.cli_args.model).resolve())
        self._json(200, {"object": "list", "data": [{"id": name, "object": "model", "created": self.created}]})

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """mlx-lm's; whoever waits for the answer can ask whether its client still does."""
        request.client_left = self._left
        super().handle_completion(request, stop_words)

    def end_headers(self) -> None:
        """mlx-lm's; from here on an error can no longer have a status of its own."""
        super().end_headers()
        self._sent = True

    def log_message(self, format: str, *args: Any) -> None:
        """Through logging, as everything else."""
        logging.info("%s %s", self.address_string(), format % args)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn whatever goes wrong into an answer, if anybody is there to hear it."""
        try:
            try:
                yield
            except Refusal as refusal:
                self._refuse(refusal)
            except (ClientLeft, ConnectionError, TimeoutError):
                raise
            except Exception as error:
                logging.exception("a request failed")
                self._refuse(Refusal(500, f"{type(error).__name__}: {error}"))
        except (ClientLeft, ConnectionError, TimeoutError):
            logging.info("%s left before its answer was complete", self.address_string())
            self.close_connection = True

    def _refuse(self, refusal: Refusal) -> None:
        if not self._sent:
            self._headers_buffer: list[bytes] = []  # mlx-lm may have begun an answer that cannot come
            self._json(refusal.status, refusal.body(), refusal.retry_after)
        elif getattr(self, "stream", False):
            self.wfile.write(f"data: {json.dumps(refusal.body())}\n\n".encode())
            self.wfile.flush()

    def _json(self, code: int, document: dict[str, Any], retry_after: int | None = None) -> None:
        body = json.dumps(document).encode()
        self._set_completion_headers(code)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _body(self) -> bytes:
        """The body of a request."""
        length = self.headers.get("Content-Length")
        if length is None:
            raise Refusal(411, "a request needs a Content-Length")
        if not (length.isascii() and length.isdecimal() and len(length) < 16):
            checks.refuse("the Content-Length is no number of bytes")
        count = int(length)
        if count > BODY:
            left = min(count, DISCARDED)
            while left > 0 and (block := self.rfile.read(min(left, BLOCK))):
                left -= len(block)
            raise Refusal(413, f"a request takes {BODY} bytes at most, not {count}", "request_too_large")
        body: bytes = self.rfile.read(count)
        if len(body) < count:
            raise ConnectionError("the client left in the middle of its request")
        return body

    def _left(self) -> bool:
        """Whether the client has closed its connection."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN | select.POLLHUP | select.POLLERR)
        events = poll.poll(0)
        if not events:
            return False
        if events[0][1] & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
            return True
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True
