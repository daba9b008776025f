"""A saved prompt as the first snapshot of a server: requests that begin with its tokens go on from it."""

from typing import Any

import mlx.core as mx

from ..errors import UnsupportedModelError, UserError
from ..host.model_caches import zero_merge
from ..host.prefill import STEP
from ..host.saved import MAKER, load_prompt_cache
from ..host.speculating import fill
from ..saved_prompt import Saved
from .provider import Served
from .reuse import Snapshots


def tokens_of(saved: Saved) -> list[int]:
    """The tokens of a saved prompt.

    Raises:
        UserError: the file does not say them.
    """
    tokens = saved.said
    if not tokens:
        raise UserError(
            f"--prompt-cache-file {saved.file} does not say its tokens, which a server compares requests with: "
            f"make it anew with {MAKER}"
        )
    return tokens


def first_snapshot(saved: Saved, tokens: list[int], served: Served, snapshots: Snapshots) -> None:
    """Add a saved prompt's snapshot.

    Raises:
        UserError: the file does not fit the model, or takes more than a slot.
    """
    try:
        caches: list[Any] = load_prompt_cache(saved.file or "", served.model)
    except UnsupportedModelError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"--prompt-cache-file: {error}") from error
    own, drafts = zero_merge(caches), served.fresh()[len(caches) :]
    if served.draft is not None:
        fill([(served.draft.model, drafts)], mx.array(tokens), STEP)
    caches += drafts
    for cache in zero_merge(caches):
        cache.finish_prompt()
    mx.eval([c.state for c in caches])
    slot = zip(own, served.plan.layouts, served.plan.shapes, strict=True)
    if any(c.layout.nbytes(shape) > layout.nbytes(shape) for c, layout, shape in slot):
        rows = max(n for c in own for n in c.layout.rows)
        raise UserError(
            f"--prompt-cache-file {saved.file} was saved with {rows} rows per head, which is more than a sequence has "
            f"here: give --kv-budget {rows}"
        )
    if snapshots.limit < 1:
        raise UserError("--prompt-cache-file needs room for a snapshot: a larger --prompt-cache-size")
    snapshots.put(tokens, caches, "system", sum(c.nbytes for c in caches))
