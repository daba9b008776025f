"""What the file of a saved prompt says before there is a model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError
from .flags import DEFAULT_MODEL
from .host.model_caches import zero_merge
from .host.saved import read
from .loading import Source, saved_source


@dataclass(frozen=True)
class Saved:
    """A prompt that ``--prompt-cache-file`` names, or none.

    Args:
        file: as it was given.
        tokens: how many the prompt has.
        metadata: what was noted with it.
        itemsize: bytes of a number in its rows.
    """

    file: str | None = None
    tokens: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    itemsize: int | None = None

    @classmethod
    def read(cls, file: str | None) -> "Saved":
        """What a file says; without one, that nothing is saved.

        Raises:
            UserError: the file cannot be read, or is no saved prompt.
        """
        if file is None:
            return cls()
        try:
            found, metadata = read(file)
        except (OSError, ValueError) as error:
            raise UserError(f"--prompt-cache-file: {error}") from error
        own = zero_merge(found)
        itemsize = next((c.shape.itemsize for c in own if c.shape is not None), None)
        return cls(file, max((int(c.offset) for c in own), default=0), metadata, itemsize)

    @property
    def said(self) -> list[int]:
        """The prompt's tokens; none where the file does not say them."""
        return tokens_in(self.metadata, self.tokens)

    def source(self, model: str | None, adapter: str | None, trust_remote_code: bool) -> Source:
        """The model that was asked for, else the one that the prompt was made with, else the small one.

        Raises:
            UserError: the prompt was made with another one.
        """
        saved, config = saved_source(self.metadata, self.file or "")
        if model is not None and saved not in (None, model):
            raise UserError(
                f"--model {model} differs from the model that --prompt-cache-file {self.file} was saved with ({saved})"
            )
        asked = "--model" if model is not None or saved is None else f"--prompt-cache-file {self.file} was made with"
        return Source(model or saved or DEFAULT_MODEL, asked, adapter, trust_remote_code, config)


def tokens_in(metadata: Mapping[str, Any], count: int) -> list[int]:
    """The ``count`` tokens of a saved prompt that were noted with it; none where they were not."""
    try:
        tokens = json.loads(metadata.get("tokens", ""))
    except (ValueError, RecursionError, TypeError):
        return []
    return tokens if isinstance(tokens, list) and len(tokens) == count and all(type(t) is int for t in tokens) else []
