"""What a request must be before anything is computed for it; what is wrong is said in one line, with status 400."""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from ..sampling import RANGES
from .refusal import Refusal

COMPLETIONS = "/v1/completions"
STOPS = 32
CHATS = ("/v1/chat/completions", "/chat/completions")
# Of the API's names those that mlx-lm's sampling calls otherwise, or alike.
SAMPLING = {name: name for name in ("top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold", "seed")} | {
    "temperature": "temp"
}
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
TYPES: dict[str, tuple[type, str]] = {
    "stream": (bool, "true or false"),
    "stream_options": (dict, "an object"),
    "model": (str, "a string"),
    "adapters": (str, "a string"),
    "logit_bias": (dict, "an object of token ids and numbers"),
    "chat_template_kwargs": (dict, "an object"),
    "tools": (list, "a list"),
    "role_mapping": (dict, "an object"),
}


def refuse(message: str, code: str | None = None) -> NoReturn:
    raise Refusal(400, message, code)


def parse(raw: bytes, path: str) -> dict[str, Any]:
    """The request in a body, in the form that mlx-lm's handler takes.

    A value of null counts as not given, as in OpenAI's API, and one prompt in a list is that prompt.

    Raises:
        Refusal: it is no JSON object in UTF-8, or a value cannot be served.
    """
    try:
        body = json.loads(raw.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        refuse(f"the body is not JSON in UTF-8: {error}")
    if not isinstance(body, dict):
        refuse("the body must be a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    for name, (kind, words) in TYPES.items():
        if name in body and not isinstance(body[name], kind):
            refuse(f"{name} must be {words}")
    _check_numbers(body)
    _check_stop(body)
    _check_logit_bias(body.get("logit_bias", {}))
    if body.get("n", 1) != 1:
        refuse("n must be 1: one answer per request")
    if body.get("draft_model", "default_model") != "default_model":
        refuse("draft_model: requests take the one that the server was started with (--draft-model): leave it out")
    if "stream_options" in body:
        body["stream_options"] = {"include_usage": bool(body["stream_options"].get("include_usage"))}
    if path == COMPLETIONS:
        body["prompt"] = _prompt(body.get("prompt"))
    else:
        _check_messages(body.get("messages"))
    return body


def check_vocabulary(logit_bias: Mapping[int, float] | None, top_k: int, size: int) -> None:
    """Refuse token ids beyond the model's vocabulary, which MLX would not notice, and a top-k of all of it."""
    if top_k >= size:
        refuse(f"top_k must be below {size}, the size of the model's vocabulary")
    if wrong := [i for i in logit_bias or () if not 0 <= i < size]:
        refuse(f"logit_bias: token {wrong[0]} is not one of the model's {size} tokens")


def check_length(count: int, context: int | None) -> None:
    """Refuse a prompt that is longer than what the model was trained on."""
    if context is not None and count > context:
        refuse(
            f"the prompt is {count} tokens long, and the model was trained on {context} at most",
            "context_length_exceeded",
        )


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _check_numbers(body: dict[str, Any]) -> None:
    for name, setting in SAMPLING.items():
        if name not in body:
            continue
        try:
            RANGES[setting].check(body[name])
        except ValueError as error:
            refuse(f"{name} {error}")
        if RANGES[setting].kind is float:
            body[name] = float(body[name])  # mlx-lm takes a 0 for no number in some places
    for name in PENALTIES:
        if name in body and not _finite(body[name]):
            refuse(f"{name} must be a number")
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name, 1)
        if not _whole(value) or value < 1:
            refuse(f"{name} must be an integer from 1 up")


def _check_stop(body: dict[str, Any]) -> None:
    stop = body.get("stop", [])
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list) or not all(isinstance(x, str) and x for x in words):
        refuse("stop must be a string or a list of strings, none of them empty")
    if len(words) > STOPS:
        refuse(f"stop: {STOPS} strings at most")
    for word in words:
        _check_text("stop", word)


def _check_logit_bias(bias: dict[Any, Any]) -> None:
    for token, value in bias.items():
        if not token.removeprefix("-").isdecimal() or len(token) > 12 or not _finite(value):
            refuse("logit_bias must be an object of token ids and numbers")


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(prompt, list):
        refuse("prompt must be one string: send several prompts as several requests, they are served at the same time")
    if not isinstance(prompt, str):
        refuse("prompt must be a string")
    if not prompt:
        refuse("prompt is empty")
    _check_text("prompt", prompt)
    return prompt


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        refuse("messages must be a list of one message or more")
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            refuse(f"{name} must be an object with a role")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                refuse(f"{name}: content must be text, or a list of text parts")
            _check_text(name, part["text"])
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
            refuse(f"{name}: tool_calls must be a list of objects")


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse(f"{name}: half of a surrogate pair is no text")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value)) and abs(value) < 1e9
    except OverflowError:
        return False
