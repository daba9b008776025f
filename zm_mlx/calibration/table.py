"""A table of rows per KV head: which share of the context rows each head of each layer gets. Knows no arrays.

Heads differ in how many old tokens they attend to, and a model's heads differ alike on any text. So the
context rows of a budget are worth more where many tokens are important, and a table says where, for several
budgets. Residual rows, the newest tokens and staging stay the same for all heads.
"""

import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..state.layout import LayerShape, Layout

FORMAT = 1
DEFAULT_FRACTION = 0.1  # of the candidates, where the number of tokens to come is not known
# The part of the context rows that all heads share alike, by mean rows per head; linear in log rows between these.
UNIFORM = ((32, 1.0), (64, 0.5), (200, 0.2))
MAKER = "python -m zm_mlx.calibrate"

Shares = tuple[tuple[float, ...], ...]  # of each KV head, layer by layer; 1 on average


class TableError(ValueError):
    """A table that is damaged or of another model; the message names its file and what to do."""


@dataclass(frozen=True)
class Table:
    """Shares of the context rows at several fractions of kept tokens, for one model.

    Args:
        model: the model's lineage (``fingerprint.lineage``): the same for all its quantisations.
        name: what the model was called.
        made: how it was made, in words and numbers (``tokens``, ``texts``, ``importance``).
        points: fractions of kept tokens in (0, 1), ascending, and the shares at each.
        source: where it was read from; for messages.

    Raises:
        ValueError: the points are not what they should be.
    """

    model: str
    name: str
    made: Mapping[str, Any]
    points: tuple[tuple[float, Shares], ...]
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        fractions = [f for f, _ in self.points]
        if not fractions or fractions != sorted(set(fractions)) or not 0 < fractions[0] <= fractions[-1] < 1:
            raise ValueError(f"fractions of kept rows must ascend between 0 and 1, not {fractions}")
        for _, shares in self.points:
            flat = [x for layer in shares for x in layer]
            if not flat or self._form(shares) != self.heads:
                raise ValueError("the shares of all fractions must be of the same layers and heads")
            if not all(math.isfinite(x) and x >= 0 for x in flat) or abs(sum(flat) / len(flat) - 1) > 0.01:
                raise ValueError("shares must not be negative, and 1 on average")

    @staticmethod
    def _form(shares: Shares) -> tuple[int, ...]:
        return tuple(len(layer) for layer in shares)

    @property
    def heads(self) -> tuple[int, ...]:
        """KV heads of each layer."""
        return self._form(self.points[0][1])

    @property
    def words(self) -> str:
        """What it is, for people."""
        made = f"{self.made.get('texts', '?')} texts of {self.made.get('tokens', '?')} tokens"
        where = f", {self.source}" if self.source else ""
        return f"table of {self.name} ({self.made.get('importance', 'importance unknown')}, {made}{where})"

    # ---- use

    def layouts(
        self, uniform: Sequence[Layout], shapes: Sequence[LayerShape], tokens: int | None = None
    ) -> tuple[Layout, ...]:
        """Layouts with the context rows of uniform ones, shared out anew over all layers and heads.

        Layers whose rows cost the same bytes share a pool, so that the sum of rows and the bytes stay exactly
        what they were. All other regions stay.

        Args:
            uniform: of a budget, one for each layer.
            shapes: of the same layers.
            tokens: that the caches will see, where known.

        Raises:
            TableError: it is a table of other layers or heads.
        """
        self.require_heads(tuple(a.heads for a in uniform))
        mean = sum(sum(a.rows) for a in uniform) / sum(self.heads)
        part = uniform_part(mean)
        shares = self.shares(kept_fraction(uniform, tokens))
        pools: dict[int, list[int]] = {}
        for i, shape in enumerate(shapes):
            pools.setdefault((shape.head_dim + shape.value_dim) * shape.itemsize, []).append(i)
        found = list(uniform)
        for layers in pools.values():
            weights = [part + (1 - part) * x for i in layers for x in shares[i]]
            rows = iter(apportion(sum(sum(uniform[i].context) for i in layers), weights))
            for i in layers:
                found[i] = replace(uniform[i], context=tuple(next(rows) for _ in range(uniform[i].heads)))
        return tuple(found)

    def shares(self, fraction: float) -> Shares:
        """Shares where ``fraction`` of the candidates is kept: linear, in tokens kept, between the calibrated points.

        Where all are kept every head keeps all. So no head is given more rows than there are tokens, and
        none loses rows as a budget grows, as far as that holds at the points.
        """
        fraction = max(fraction, self.points[0][0])
        ones = tuple(tuple(1.0 for _ in layer) for layer in self.points[0][1])
        points = [*self.points, (1.0, ones)]
        at = min(len(points) - 1, bisect_right(points, fraction, key=lambda point: point[0]))
        (low, less), (high, more) = points[at - 1], points[at]
        t = (fraction - low) / (high - low)

        def share(a: float, b: float) -> float:
            return ((1 - t) * low * a + t * high * b) / ((1 - t) * low + t * high)

        return tuple(tuple(map(share, a, b)) for a, b in zip(less, more, strict=True))

    def require_model(self, lineage: str) -> "Table":
        """The table itself, if it is of the trained model with this lineage.

        Raises:
            TableError: it is of another one.
        """
        if self.model != lineage:
            raise TableError(f"{self._named} was made for another model ({self.name}); {MAKER} makes one for this")
        return self

    def require_heads(self, heads: tuple[int, ...]) -> None:
        """Raise ``TableError`` unless the table is for so many KV heads in each layer."""
        if heads != self.heads:
            raise TableError(
                f"{self._named} has {_described(self.heads)}, the model {_described(heads)}: "
                f"it is damaged, or of another model; {MAKER} makes one"
            )

    # ---- files

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Table":
        """The table of a file.

        Raises:
            TableError: it cannot be read, or is no table.
        """
        try:
            found = json.loads(Path(path).read_bytes())
            if found["format"] != FORMAT:
                raise ValueError(f"it is of format {found['format']!r}, this version reads {FORMAT}")
            points = sorted((float(f), tuple(tuple(map(float, x)) for x in s)) for f, s in found["shares"].items())
            return cls(str(found["model"]), str(found["name"]), dict(found["made"]), tuple(points), str(path))
        except OSError as error:
            raise TableError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise TableError(f"{path} is no table of rows per head ({reason}); {MAKER} makes one") from error

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, which is complete or not there at all.

        Raises:
            OSError: it cannot be written.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(self.text())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def text(self) -> str:
        """The file's contents: JSON, a line for each layer."""
        points = ",\n".join(
            f'  "{fraction}": [\n' + ",\n".join(f"   {json.dumps(layer)}" for layer in shares) + "\n  ]"
            for fraction, shares in self.points
        )
        facts = {"format": FORMAT, "model": self.model, "name": self.name, "made": dict(self.made)}
        lines = [f' "{name}": {json.dumps(value)}' for name, value in facts.items()]
        return "{\n" + ",\n".join(lines) + ',\n "shares": {\n' + points + "\n }\n}\n"

    @property
    def _named(self) -> str:
        return self.source or f"the table of {self.name}"


def kept_fraction(uniform: Sequence[Layout], tokens: int | None) -> float:
    """Context rows for each token that competes for them: all but those that the other rows hold anyway.

    It is 1 where a budget holds all tokens.
    """
    heads = sum(a.heads for a in uniform)
    context = sum(sum(a.context) for a in uniform) / heads
    others = sum(sum(a.rows) for a in uniform) / heads - context
    if tokens is None:
        return DEFAULT_FRACTION
    return 1.0 if tokens <= others + context else context / (tokens - others)


def uniform_part(rows: float) -> float:
    """The part of the context rows that all heads share alike, for mean rows per head: the fewer, the more.

    With few rows recency is nearly all that counts, and it counts in all heads.
    """
    if rows <= UNIFORM[0][0]:
        return UNIFORM[0][1]
    for (less, high), (more, low) in pairwise(UNIFORM):
        if rows < more:
            return high + (low - high) * math.log(rows / less) / math.log(more / less)
    return UNIFORM[-1][1]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to weights whose sum is ``total`` exactly (largest remainders; ties: the first).

    Without any weight all get the same.
    """
    whole = [round(w * 2**40) for w in weights]  # rounding must not lose a row
    if not sum(whole):
        whole = [1] * len(weights)
    rows, rests = zip(*(divmod(total * w, sum(whole)) for w in whole), strict=True)
    found = list(rows)
    for i in sorted(range(len(rests)), key=lambda i: -rests[i])[: total - sum(rows)]:
        found[i] += 1
    return found


def _described(heads: Sequence[int]) -> str:
    return f"{len(heads)} layers of {' or '.join(map(str, sorted(set(heads))))} KV heads"
