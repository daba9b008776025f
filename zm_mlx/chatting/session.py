"""A model and the conversation that goes on with it: how one begins, and how it comes from and goes to a file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from .. import prompts
from ..drafting import Draft, renewed
from ..engine import Engine
from ..errors import UnsupportedModelError, UserError
from ..host import caches
from ..host.caches import CacheSet, Wish
from ..host.guard import Load, guard
from ..host.model_caches import zero_merge
from ..host.plan import Plan, context_of
from ..host.saved import load_prompt_cache, read, save_prompt_cache
from ..loading import Source
from ..saved_prompt import tokens_in
from ..terminal import warn
from .conversation import Conversation
from .standing import Standing

NOTED = "conversation"  # the metadata that tells a saved conversation from a saved prompt


class Session:
    """What the commands of a chat work on.

    Args:
        engine: the model.
        source: where it came from.
        wish: of the caches of new conversations.
        force: let no memory guard refuse a turn.

    Raises:
        UserError: the budget does not work.
        UnsupportedModelError: the model cannot be served.
    """

    def __init__(self, engine: Engine, source: Source, wish: Wish, *, force: bool = False) -> None:
        self.engine = engine
        self.source = source
        self.force = force
        self.context = context_of(engine.model)
        self.draft: Draft | None = None
        made = caches.fresh(engine.model, "zeromerge", wish, None, 0)
        self.plan = cast(Plan, made.plan)  # ZeroMerge's caches have one
        self.go_on(made, Standing(adapter=source.adapter))

    @property
    def plan_of_caches(self) -> Plan:
        """What the conversation's caches follow."""
        return self.conversation.caches.plan or self.plan

    @property
    def templated(self) -> bool:
        """Whether turns go through a chat template."""
        return prompts.uses_template(self.engine.tokenizer, prompts.Chat())

    def go_on(self, cache_set: CacheSet, standing: Standing, said: Sequence[int] = ()) -> None:
        """Take these caches for the conversation, whose plan may differ from that of new ones if they were saved.

        ``said`` are the tokens that they hold, where these are known.
        """
        if cache_set.plan is None:
            own = zero_merge(cache_set.every)
            layouts = tuple(c.layout for c in own)
            cache_set.plan = replace(self.plan, layouts=layouts, policy=own[0].policy, budget_reason="as it was saved")
        draft = None if self.draft is None else renewed(self.draft, cache_set)
        self.conversation = Conversation(self.engine, cache_set, standing, draft, said)
        self._told = False

    def speculate(self, draft: Draft) -> None:
        """Let this draft, made for the conversation's caches, propose tokens, in conversations to come as well."""
        self.draft = self.conversation.draft = draft

    def begin(self, system: str | None) -> None:
        """A new conversation; the last one is gone.

        Raises:
            UserError: there is a system prompt, and no chat template that takes it.
        """
        standing = Standing(system=system, adapter=self.source.adapter)
        prompts.encode(self.engine.tokenizer, prompts.QUERY, prompts.Chat(system))
        self.go_on(caches.zeromerge(self.engine.model, self.plan), standing)

    def save(self, file: str) -> str:
        """Save the conversation; a file that is there is replaced once the new one is complete.

        Returns:
            Where it is.

        Raises:
            UserError: nothing was said yet, or the file cannot be written.
        """
        conversation = self.conversation
        if not conversation.seen:
            raise UserError("/save: nothing was said yet")
        path = os.path.expanduser(file)
        metadata = {**self.source.metadata, NOTED: conversation.standing.text()}
        try:
            save_prompt_cache(path, conversation.caches.every, metadata)
        except (OSError, ValueError) as error:
            raise UserError(f"/save: {error}") from error
        return path

    def load(self, file: str) -> None:
        """Go on with a saved conversation or prompt; on any failure the present one stays.

        Raises:
            UserError: the file cannot be read, or is not of this model.
        """
        path = os.path.expanduser(file)
        try:
            _, metadata = read(path)
            standing = self.standing(metadata)
            every = load_prompt_cache(path, self.engine.model)
        except UnsupportedModelError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"/load: {error}") from error
        found = CacheSet("zeromerge", every, list(zero_merge(every)))
        self.go_on(found, standing, tokens_in(metadata, found.before))

    def standing(self, metadata: Mapping[str, str]) -> Standing:
        """Where a saved conversation stands; a saved prompt is the beginning of a user's message.

        Raises:
            ValueError: it was saved with another model or adapter, or is damaged.
        """
        model = metadata.get("model", self.source.name)
        if model != self.source.name:
            raise ValueError(f"it was saved with the model {model}, and this chat runs {self.source.name}")
        if NOTED not in metadata:
            return Standing("open", adapter=self.source.adapter)
        standing = Standing.of(metadata[NOTED])
        if standing.adapter != self.source.adapter:
            had, has = (x or "none" for x in (standing.adapter, self.source.adapter))
            raise ValueError(f"it was saved with another adapter than this chat runs ({had}, not {has})")
        return standing

    def guard(self, tokens: int, step: int, answer: int) -> None:
        """Refuse a turn of so many tokens, read ``step`` at a time, that this machine has no memory for.

        ``answer`` is how many tokens follow at most; -1 is no limit.

        Raises:
            MemoryGuardError: its message says what would fit.
        """
        found = self.conversation.caches
        load = Load(tokens, step, held=found.nbytes, seen=self.conversation.seen)
        draft = self.conversation.draft
        beside = None if draft is None else draft.beside(answer)
        guard(self.engine.model, self.plan_of_caches, load, self.force, beside)

    def warn_of_context(self, tokens: int = 0) -> None:
        """Say it once if the conversation, with so many more tokens, is longer than the model was trained for."""
        if self._told or self.context is None or self.conversation.seen + tokens <= self.context:
            return
        self._told = True
        warn(
            f"the conversation is longer than the {self.context:,} tokens that the model was trained on: "
            "from there on the text may suffer, with any cache"
        )
