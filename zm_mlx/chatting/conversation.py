"""One conversation: which tokens a turn feeds, what the caches hold of it, and what still waits."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from .. import prompts
from ..drafting import Draft
from ..engine import Engine, Settings
from ..errors import UserError
from ..host.caches import CacheSet
from ..host.model_caches import zero_merge
from ..host.plan import positions_of
from ..host.prefill import Progress
from .standing import Standing

QUOTABLE = 8192  # newest tokens of a conversation in which prompt lookup looks


class Interrupted(Exception):
    """The reading of a turn was ended between two calls of the model."""


class Conversation:
    """Caches and where they stand. No text is kept: what was said is in the caches alone, which do not grow.

    Between two turns the caches hold all tokens of the conversation but ``standing.pending``. With a draft the newest
    tokens are kept besides, as far as prompt lookup looks back; ``said`` are those that the caches hold at first.
    """

    def __init__(
        self,
        engine: Engine,
        caches: CacheSet,
        standing: Standing,
        draft: Draft | None = None,
        said: Sequence[int] = (),
    ) -> None:
        self.engine = engine
        self.caches = caches
        self.standing = standing
        self.draft = draft
        self._said: deque[int] = deque(said, QUOTABLE)

    @property
    def seen(self) -> int:
        """Tokens that the caches have taken."""
        return self.caches.seen or 0

    def encode(self, text: str) -> list[int]:
        """The tokens with which a user's text goes on from here: those that wait, then those of the turn.

        Raises:
            UserError: the text has no tokens, the chat template refuses it, or the model has no positions for it.
        """
        standing, tokenizer = self.standing, self.engine.tokenizer
        if standing.place == "empty":
            turn = prompts.encode(tokenizer, text, prompts.Chat(standing.system))
        elif standing.place == "open":
            turn = prompts.encode_rest(tokenizer, text, prompts.Chat())
        else:
            turn = prompts.encode_next(tokenizer, text, prompts.Chat(), standing.stop)
        tokens = [*standing.pending, *turn]
        room = self._room(len(tokens))
        if room is not None and room < 1:
            raise UserError(
                f"this model has {positions_of(self.engine.model)} positions, of which {self.seen} are taken: "
                f"{len(tokens)} tokens and an answer do not fit; /reset begins a new conversation"
            )
        return tokens

    def answer(
        self, tokens: list[int], settings: Settings, stopped: Callable[[], bool], progress: Progress | None = None
    ) -> Iterator[Any]:
        """mlx-lm's responses to a turn, one a token; ends early where ``stopped`` says so, between two tokens.

        Args:
            tokens: of the turn, as ``encode`` gave them.
            settings: ``max_tokens`` is lowered where the model's positions end.
            stopped: asked after each call of the model, so that all layers hold the same tokens at the end.
            progress: called with the tokens of the turn that were read, and their number.
        """
        room = self._room(len(tokens))
        if room is not None:
            limit = room if settings.max_tokens < 0 else min(room, settings.max_tokens)
            settings = replace(settings, max_tokens=limit)
        turns = self.standing.turns + 1
        self.standing = replace(self.standing, place="answered", turns=turns, pending=tuple(tokens), stop=None)

        def read(done: int, total: int) -> None:
            if progress:
                progress(done, total)
            if done < total:  # with the last one a token of the answer was taken too, which nobody has seen yet
                self.standing = replace(self.standing, pending=tuple(tokens[done:]))
                if stopped():
                    raise Interrupted

        draft = None if self.draft is None else replace(self.draft, before=tuple(self._said))
        responses: Any = self.engine.generate(tokens, self.caches.every, settings, read, draft)
        given: list[int] = []
        try:
            for response in responses:  # mlx-lm runs one token ahead, so the caches hold the token that it gives
                given.append(response.token)
                ended = response.token if response.finish_reason == "stop" else None
                self.standing = replace(self.standing, pending=(), stop=ended)
                yield response
                if stopped():
                    return
        except Interrupted:
            for cache in zero_merge(self.caches.every):
                if cache.prefill == "exact":  # a piece that was to be read a second time
                    cache.finish_prompt()
        finally:
            responses.close()
            if draft is not None and given:
                self._said.extend([*tokens, *given])

    def _room(self, tokens: int) -> int | None:
        """Positions that are left after so many tokens; ``None`` without an end."""
        positions = positions_of(self.engine.model)
        return None if positions is None else positions - self.seen - tokens
