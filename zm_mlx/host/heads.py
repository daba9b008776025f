"""How a budget's context rows are shared out among the KV heads of a model: by its table, or uniformly."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.nn as nn

from ..budget import Request
from ..calibration.finding import Found, Search, find
from ..calibration.fingerprint import lineage
from ..calibration.table import Table, TableError
from ..policies import Policy
from ..state.layout import LayerShape, Layout

Wanted = Table | Search | str | os.PathLike[str] | None  # "auto" searches, "none" is uniform, other text a file


@dataclass(frozen=True)
class Sharing:
    """Layouts of all layers, where their heads' rows come from, and the tables that were passed over."""

    layouts: tuple[Layout, ...]
    reason: str
    complaints: tuple[str, ...] = ()


def share_out(
    model: nn.Module,
    wanted: Wanted,
    policy: Policy,
    uniform: tuple[Layout, ...],
    shapes: Sequence[LayerShape],
    request: Request,
) -> Sharing:
    """Uniform layouts, or those that a table makes of them.

    A request that fits uniformly stays so: with a table its smallest heads would compress, and nothing has to be.

    Raises:
        TableError: the table that is wanted is damaged or of another model, or the policy cannot follow any.
    """
    if wanted is None or wanted == "none":
        return Sharing(uniform, "uniform rows per head, as asked")
    heads = tuple(a.heads for a in uniform)
    search = Search() if wanted == "auto" else wanted
    if not isinstance(search, Search):  # before anything else: what is asked for must be right though it is not needed
        asked = search if isinstance(search, Table) else Table.read(search)
        asked.require_model(lineage(model))
        asked.require_heads(heads)
    tokens = None if request.prompt_tokens is None else request.prompt_tokens + request.new_tokens
    if tokens is not None and tokens <= min(a.capacity for a in uniform):
        return Sharing(uniform, "uniform rows per head: prompt and new tokens fit")
    if isinstance(search, Search) and not policy.shared:
        return Sharing(uniform, "rows per head as the policy shares them out")
    found = find(model, search, heads) if isinstance(search, Search) else Found(asked)
    if found.table is None:
        return Sharing(uniform, f"uniform rows per head: {found.reason}", found.complaints)
    layouts = found.table.layouts(uniform, shapes, tokens)
    try:
        for a in layouts:
            policy.layout(a.rows, a.heads)
    except ValueError as error:
        raise TableError(str(error)) from error
    return Sharing(layouts, f"rows per head by the {found.table.words}", found.complaints)
