"""Where a model's table is looked for: beside the model, in the user's cache folder, in the package."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from .fingerprint import lineage
from .table import MAKER, Table, TableError

BESIDE = "zm_mlx_table.json"  # the name of a table in its model's folder
SHIPPED = Path(__file__).parent.parent / "tables"
NONE_FOUND = f"no table for this model, {MAKER} makes one"


@dataclass(frozen=True)
class Search:
    """Look for a model's table, first in the folder that the model came from, where there is one."""

    folder: Path | None = None


@dataclass(frozen=True)
class Found:
    """A table or none, why none, and the tables that were passed over."""

    table: Table | None
    reason: str = ""
    complaints: tuple[str, ...] = ()


def user_folder() -> Path:
    """Where a user's own tables lie, one for each trained model, named by its lineage."""
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(usual)) / "zm_mlx" / "tables"


def find(model: nn.Module, search: Search, heads: tuple[int, ...]) -> Found:
    """The first table of a model that works.

    Args:
        heads: KV heads of each layer that the table is for.
    """
    complaints = []
    name = lineage(model)
    for path in _places(name, search.folder):
        try:
            table = Table.read(path).require_model(name)
            table.require_heads(heads)
        except TableError as error:
            complaints.append(f"{error} (not used)")
            continue
        return Found(table, complaints=tuple(complaints))
    return Found(None, NONE_FOUND, tuple(complaints))


def tables() -> list[Path]:
    """All tables of the user and of the package."""
    return [path for folder in (user_folder(), SHIPPED) for path in sorted(folder.glob("*.json"))]


def _places(name: str, folder: Path | None) -> Iterator[Path]:
    beside = [] if folder is None else [folder / BESIDE]
    for path in (*beside, user_folder() / f"{name}.json", SHIPPED / f"{name}.json"):
        if os.path.isfile(path):
            yield path
