"""Speculative decoding for a command: what proposes tokens, loaded and checked, and how many at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn

from .errors import UnsupportedModelError, UserError
from .host import caches
from .host.beside import Beside
from .host.caches import CacheSet, Wish
from .host.model_caches import zero_merge
from .host.rollback import require_trimmable
from .loading import Source, Vocabulary, load_model, load_vocabulary

MODEL_TOKENS = 3  # proposed at a time: mlx-lm's own number
LOOKUP_TOKENS = 8  # which cost nothing to propose

LOOKUP = "prompt lookup"


@dataclass(frozen=True)
class Draft:
    """What proposes up to ``count`` tokens at a time: a model with caches of its own, or without one prompt lookup.

    ``before`` are tokens that came before the prompt: prompt lookup finds them too, and a model reads them first if it
    has read nothing yet.
    """

    count: int
    name: str = LOOKUP
    model: nn.Module | None = None
    caches: CacheSet | None = None
    before: Sequence[int] = ()

    @property
    def every(self) -> list[Any]:
        """The model's caches, one a layer."""
        return [] if self.caches is None else self.caches.every

    def beside(self, answer: int) -> Beside:
        """What the memory guard takes into account, for an answer of so many tokens at most, or -1 without a limit."""
        limit = None if answer < 0 else answer
        if self.caches is None:
            return Beside(None, None, self.count, answer=limit)
        return Beside(self.model, self.caches.plan, self.count, self.caches.nbytes, limit)


@dataclass(frozen=True)
class Asked:
    """What a command is asked for."""

    model: str | None = None
    lookup: bool = False
    count: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.model is not None and self.lookup:
            raise UserError("--draft-model and --prompt-lookup: give one of them")
        if self.count is not None and not self:
            raise UserError("--num-draft-tokens needs --draft-model or --prompt-lookup")

    def __bool__(self) -> bool:
        return self.lookup or self.model is not None

    @property
    def flag(self) -> str:
        return "--prompt-lookup" if self.lookup else "--draft-model"

    @property
    def source(self) -> Source | None:
        """Where the draft model comes from."""
        if self.model is None:
            return None
        return Source(self.model, "--draft-model", trust_remote_code=self.trust_remote_code)

    @property
    def tokens(self) -> int:
        """How many are proposed at a time, at most."""
        return self.count or (LOOKUP_TOKENS if self.lookup else MODEL_TOKENS)


def require_same_tokens(draft: Source, main: Vocabulary, name: str) -> None:
    """Refuse a draft model whose tokens are not those of the main model, which is called ``name``.

    Raises:
        UserError: they differ, or there is no such draft model.
    """
    its, tokenizer = load_vocabulary(draft).tokenizer, main.tokenizer
    theirs, ours = its.get_vocab(), tokenizer.get_vocab()
    both = ours.keys() & theirs.keys()
    same = sum(theirs[text] == ours[text] for text in both)
    if its.vocab_size == tokenizer.vocab_size and 0 < same == len(both):  # special tokens may have other names
        return
    raise UserError(
        f"{draft.words}: its tokenizer is another one than that of --model {name} ({same} of {len(ours)} tokens are "
        "the same): a draft model must have the same tokens"
    )


def load(asked: Asked, main: CacheSet, before: Sequence[int] = ()) -> Draft | None:
    """What was asked for, beside the main model's caches; ``None`` if nothing was.

    Args:
        asked: by a command's flags.
        main: the main model's caches.
        before: tokens that these hold already, where they are known.

    Raises:
        UserError: the model cannot be loaded, or caches do not give rejected tokens back.
    """
    if not asked:
        return None
    try:
        require_trimmable(main.every)
    except UnsupportedModelError as error:
        raise UserError(f"{asked.flag} does not go with this model: {error}") from error
    if asked.source is None:
        return Draft(asked.tokens, before=before)
    model = load_model(asked.source)
    return Draft(asked.tokens, asked.source.name, model, caches_for(model, asked.source.name, main), before)


def renewed(draft: Draft, main: CacheSet) -> Draft:
    """The same draft beside other caches of the main model; its own ones are empty."""
    if draft.model is None:
        return draft
    return replace(draft, caches=caches_for(draft.model, draft.name, main))


def caches_for(draft: nn.Module, name: str, main: CacheSet) -> CacheSet:
    """Caches of a draft model: with as many rows per head as the main model's on average, where they are bounded.

    A draft model that this package does not serve gets full ones.

    Raises:
        UserError: it has caches that do not give rejected tokens back.
    """
    own = zero_merge(main.every)
    made = _bounded(draft, own) if own else caches.full(draft)
    try:
        require_trimmable(made.every)
    except UnsupportedModelError as error:
        raise UserError(f"--draft-model {name}: {error}") from error
    return made


def _bounded(draft: nn.Module, own: Sequence[Any]) -> CacheSet:
    rows = [n for c in own for n in c.layout.rows]
    wish = Wish(str(sum(rows) // len(rows)), prefill="streaming", room=False)
    try:
        return caches.fresh(draft, "zeromerge", wish, None, 0)
    except UnsupportedModelError:
        return caches.full(draft)
