"""What a client gets instead of an answer."""

from typing import Any


class Refusal(BaseException):
    """An HTTP status and a message for one client.

    No ``Exception``: mlx-lm's handler answers 404 to each of those, whatever it was.

    Args:
        status: 4xx if the request is at fault, 5xx if the server is.
        message: one line that says what to do.
        code: a short name for programs, as OpenAI gives them.
        retry_after: seconds after which to ask again.
    """

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """As OpenAI's API words an error."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class ClientLeft(BaseException):
    """Nobody waits for this answer any more. No ``Exception``, for the reason above."""
