"""Which of mlx-lm's architectures are served, and the list of them in the README, which this script writes.

python tests/model_list.py
"""

import textwrap
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import mlx.nn as nn
from mlx_lm.utils import MODEL_REMAPPING
from model_configs import METAL, architecture, architectures

from zm_mlx import UnsupportedModelError
from zm_mlx.host.hook import replace_caches
from zm_mlx.host.latent import is_latent
from zm_mlx.host.model_caches import members
from zm_mlx.host.own_caches import own_caches
from zm_mlx.host.probe import probe
from zm_mlx.host.sharing import OWNER

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- models: python tests/model_list.py -->\n", "<!-- end of models -->\n"
WIDTH = 120


class Outcome(NamedTuple):
    """How a model is served, or why it is not: ``refused`` is the reason."""

    kind: str
    refused: str = ""


PLAIN = "All layers"
PARTLY = "Full-attention layers; those with a sliding window or a recurrent state keep mlx-lm's caches"
LATENT = (
    "Latent attention (MLA): a row's key is a token's rotated key and latent vector, its value the latent vector once "
    "more (mlx-lm's full cache holds it once)"
)
SHARED = "Layers that share keys and values: later ones see what the earlier one's queries saw"
CAPPED = "Scores with a soft cap"
KINDS = (PLAIN, PARTLY, LATENT, SHARED, CAPPED)
REFUSED = "Refused"


@cache
def outcome(name: str) -> Outcome:
    """What a probe says of a small model of an architecture."""
    model = architecture(name)
    try:
        probe(model)
    except UnsupportedModelError as error:
        return Outcome(REFUSED, str(error).partition(": ")[2])
    return Outcome(_kind(model))


def _kind(model: nn.Module) -> str:
    modules = model.modules()
    if any(is_latent(m) for m in modules):
        return LATENT
    if any(hasattr(m, OWNER) for m in modules):
        return SHARED
    if any(getattr(m, "attn_logit_softcapping", None) and "q_proj" in m for m in modules):
        return CAPPED
    own = list(members(own_caches(model)))
    replaced = list(members(replace_caches(own, lambda i: None)))
    return PLAIN if all(type(c).__name__ == "KVCache" for c in replaced) else PARTLY


def listed() -> str:
    """The README's list."""
    found = {name: outcome(name) for name in architectures()}
    served = sum(x.kind != REFUSED for x in found.values())
    lines = [
        f"Of the {len(found)} architectures of mlx-lm {version('mlx-lm')}, {served} are served. These are the names of "
        "its modules, which a model's `config.json` gives as its `model_type`; each was probed with a small "
        "configuration, and your model is probed before anything is generated.",
        "",
    ]
    for kind in KINDS:
        lines.append(f"- **{kind}**: " + _names(name for name, x in found.items() if x.kind == kind) + ".")
    lines.append(f"- **{REFUSED}**, each with its reason:")
    reasons = sorted({x.refused for x in found.values() if x.refused})
    for reason in reasons:
        lines.append("  - " + _names(name for name, x in found.items() if x.refused == reason) + f": {reason}.")
    others = [f"`{x}` ({y})" for x, y in sorted(MODEL_REMAPPING.items())]
    lines += ["", "mlx-lm reads these types with the modules in brackets: " + ", ".join(others) + "."]
    lines += ["", f"Probed, but not run, because mlx-lm runs them on Metal alone: {_names(METAL)}."]
    return "\n".join(map(_wrapped, lines)) + "\n"


def _wrapped(line: str) -> str:
    marks = line[: len(line) - len(line.lstrip(" -"))]
    return textwrap.fill(
        line, WIDTH, subsequent_indent=" " * len(marks), break_long_words=False, break_on_hyphens=False
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{x}`" for x in names)


def written(readme: str) -> str:
    """A README with the list between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + listed() + END + after


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
