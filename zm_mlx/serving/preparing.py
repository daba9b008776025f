"""From a request to tokens, in the thread of its client: a long prompt's tokens stop nobody's answer."""

from threading import Lock
from typing import Any

import mlx.core as mx
from mlx_lm.server import GenerationContext

from ..sampling import random_state
from . import checks
from .job import Job, Prompt
from .provider import Served
from .refusal import Refusal
from .reuse import Kind

CHARACTERS = 64  # a token on average at most; longer texts are refused before they are tokenised


class Preparing:
    """Tokenises with mlx-lm's own functions, which one thread at a time may use.

    Args:
        generator: mlx-lm's ``ResponseGenerator``.
    """

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._lock = Lock()

    def __call__(self, job: Job, served: Served) -> Prompt:
        """The prompt of a request to a model.

        Raises:
            Refusal: it cannot be served by this model.
        """
        request, args, tokenizer = job.request, job.args, served.tokenizer
        chat = request.request_type == "chat"
        if chat and not tokenizer.has_chat_template and not request.role_mapping:
            checks.refuse(
                "this model has no chat template, so it takes no messages: send text to /v1/completions, "
                "or start the server with --chat-template",
                "no_chat_template",
            )
        checks.check_vocabulary(args.logits.logit_bias, args.sampling.top_k, served.vocabulary)
        if served.context is not None and _characters(request) > CHARACTERS * served.context:
            checks.check_length(_characters(request) // CHARACTERS, served.context)
        try:
            with self._lock:
                tokens, segments, kinds, state, _ = self._generator._tokenize(tokenizer, request, args)
                stop, text = self._generator._make_state_machine(served.key, tokenizer, args.stop_words)
        except Exception as error:  # a chat template is a program, and refuses in its own words
            raise Refusal(400, f"the prompt cannot be read: {type(error).__name__}: {error}") from error
        if not tokens:
            checks.refuse("prompt is empty: the model's tokenizer makes no tokens of it")
        checks.check_length(len(tokens), served.context)
        context = GenerationContext(
            has_tool_calling=tokenizer.has_tool_calling,
            has_thinking=tokenizer.has_thinking,
            tool_parser=tokenizer.tool_parser,
            text_sm=text,
            initial_state=state,
            prompt=tokens,
        )
        return Prompt(
            key=served.key,
            tokens=list(tokens),
            marks=_marks(tokens, segments, kinds),
            context=context,
            stop=stop,
            user_turn=not chat or request.messages[-1]["role"] == "user",
            keeps_answer=not (chat and served.rewrites),
        )


def seeded(sampler: Any, seed: int) -> Any:
    """A sampler that draws as if ``mx.random.seed(seed)`` had come before its first token, whatever others draw."""
    own = seed

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal own
        others = random_state()
        mx.random.seed(own)
        try:
            return sampler(logprobs)  # type: ignore[no-any-return]
        finally:
            own = random_state()
            mx.random.seed(others)

    return draw


def _marks(tokens: list[int], segments: list[list[int]], kinds: list[str]) -> dict[int, Kind]:
    """Where snapshots are taken: at the end of the system prompt, and at that of the prompt.

    Args:
        segments: of the tokens, as mlx-lm cuts them: system prompt, conversation, a tail that opens the thinking.
        kinds: of the segments: "system", "user", "assistant".
    """
    tail = len(segments[-1]) if kinds[-1] == "assistant" and len(segments) > 1 else 1
    marks: dict[int, Kind] = {len(tokens) - tail: "prompt"}
    if kinds[0] == "system" and len(segments) > 1:
        marks[len(segments[0])] = "system"
    return {mark: kind for mark, kind in marks.items() if mark > 0}


def _characters(request: Any) -> int:
    contents = (m.get("content") or "" for m in request.messages)
    texts = (c if isinstance(c, str) else "".join(p["text"] for p in c) for c in contents)
    return len(request.prompt) + sum(map(len, texts))
