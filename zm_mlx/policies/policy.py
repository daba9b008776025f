"""A method's settings, and its behaviour: importance, selection, merging, compensation."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import mlx.core as mx

from ..state.coded import Coded
from ..state.coding import GROUPS, Coding, CodingError
from ..state.layout import Layout, smallest_rows
from ..state.rows import Dense
from ..state.state import Merged, Scores, State
from . import merging, ranking, selection

Score = Literal["attention", "replay", "reread"]
SCORES = ("attention", "replay", "reread")


@dataclass(frozen=True)
class Policy:
    """ZeroMerge with this package's defaults; another method is a subclass in a file of its own.

    A subclass replaces ``importance``, ``select``, ``merge``, ``log_mass`` or ``lift``; where it
    replaces what a Metal kernel computes, plain operations take the kernel's place. How rows are
    divided, and what else happens at a compaction, is no kernel's: ``layout`` to ``fitted``, ``compacted``.
    ``residual=0`` is plain eviction.

    Args:
        residual: R, rows per head that hold merged tokens.
        proximity: share of the rows that a compaction leaves which are the newest tokens (P / C).
        staging: S, tokens between two compactions; ``None`` derives it from the rows.
        alpha: weight of log(tokens behind a row) in the logits.
        kappa: cap, in nats, of the second-order term of a merged row's logit.
        decay: λ, what is left of a token's importance one query later, in (0, 1].
        pool: neighbouring rows over which importance is max-pooled for selection; odd.
        newest: proximity rows at least, as far as half of the rows go: what a share gives is too few where N is small.
        score: what importance is: "attention" alone, or united with what tokens are worth when the prompt is read
            again: by the queries it has, moved behind it ("replay"), or by the model's second reading ("reread").
        kv_bits: of a number in rows that a compaction has passed, 8 or 4; ``None`` leaves them as they came.
        kv_group_size: numbers that share a scale and a bias, 64 or 32; ``None`` is 64, see ``coded_for``.

    Raises:
        ValueError: a setting is outside its range.
    """

    residual: int = 4
    proximity: float = 0.5
    staging: int | None = None
    alpha: float = 1.0
    kappa: float = 3.0
    decay: float = 0.98
    pool: int = 13
    newest: int = 1
    score: Score = "attention"
    kv_bits: int | None = field(default=None, repr=False)  # which names results of evaluations: as without codes
    kv_group_size: int | None = field(default=None, repr=False)

    needs: ClassVar[str | None] = None  # what a cache alone does not know and importance is made of
    numbers: ClassVar[bool] = False  # whether importance is made of, or changes, keys or values themselves
    shared: ClassVar[bool] = True  # whether the model's table, where there is one, shares its rows out among heads

    def __post_init__(self) -> None:
        for name in ("residual", "pool", "newest", "staging"):
            value = getattr(self, name)
            if not (isinstance(value, int) or (name == "staging" and value is None)):
                raise ValueError(f"{name} must be a whole number, not {value!r}")
        for name in ("proximity", "alpha", "kappa", "decay"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number, not {value!r}")
        if self.residual < 0:
            raise ValueError(f"residual must be 0 or more rows, not {self.residual}")
        if not 0 < self.proximity < 1:
            raise ValueError(f"proximity must be a share between 0 and 1, not {self.proximity}")
        if self.staging is not None and self.staging < 1:
            raise ValueError(f"staging must be 1 token or more, not {self.staging}")
        if self.alpha < 0 or self.kappa < 0:
            raise ValueError(f"alpha and kappa must not be negative, not {self.alpha} and {self.kappa}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], not {self.decay}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be an odd number of rows, not {self.pool}")
        if self.newest < 1:
            raise ValueError(f"newest must be 1 row or more, not {self.newest!r}")
        if self.kv_bits is None and self.kv_group_size is not None:
            raise CodingError("kv_group_size needs kv_bits, without which no rows become codes")
        if self.coding is not None and self.numbers:
            raise CodingError(
                f"kv_bits does not go with the policy {type(self).__name__}, which computes with the numbers of all "
                "rows: leave kv_bits out, or take another policy"
            )
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, not {self.score!r}")

    # ---- rows

    def layout(self, rows: int | Sequence[int], heads: int) -> Layout:
        """How N rows per head (one number, or one for each head) are divided.

        Raises:
            ValueError: as ``Layout.of``.
        """
        return Layout.of(
            rows,
            heads,
            residual=self.residual,
            proximity=self.proximity,
            staging=self.staging,
            newest=self.newest,
            reading=self.reads,
            coding=self.coding,
        )

    def layouts(self, rows: int, heads: Sequence[int]) -> tuple[Layout, ...]:
        """Layouts of all layers with so many KV heads, for N rows per head on average.

        Raises:
            ValueError: as ``Layout.of``.
        """
        return tuple(self.layout(rows, h) for h in heads)

    def fitted(self, layouts: Sequence[Layout], importance: Sequence[mx.array]) -> tuple[Layout, ...]:
        """Layouts with as many rows, shared out for one prompt.

        Args:
            importance: in each layer, of the tokens that compete for context rows, [H, n] in the order of positions.
        """
        return tuple(layouts)

    @property
    def coding(self) -> Coding | None:
        """What rows become when a compaction passes them."""
        return None if self.kv_bits is None else Coding(self.kv_bits, self.kv_group_size or GROUPS[0])

    def coded_for(self, dims: Sequence[int]) -> "Policy":
        """The policy with the widest groups that divide vectors of these lengths, where rows become codes.

        Raises:
            CodingError: no groups do, or not those that it asks for.
        """
        if self.kv_bits is None:
            return self
        return replace(self, kv_group_size=Coding.fitting(self.kv_bits, self.kv_group_size, dims).group)

    @property
    def smallest(self) -> int:
        """The fewest rows per head that work."""
        return smallest_rows(self.residual, self.staging, self.coding is not None)

    # ---- behaviour

    @property
    def reads(self) -> bool:
        """Whether importance comes from ``State.reading`` too, so that rows must carry it."""
        return self.score != "attention"

    @property
    def replays(self) -> bool:
        """Whether ``State.reading`` is filled while a prompt is taken, by its own queries."""
        return self.score == "replay"

    @property
    def fits(self) -> bool:
        """Whether a residual row is fitted to a prompt's victims at its end (``ops.plain.fitting``), instead of merging
        at each compaction."""
        return False

    @property
    def window(self) -> int | None:
        """Queries at the end of an exact prefill that decide the scores; ``None`` is all of them.

        0.98 ** 512 is 3e-5: older queries no longer count.
        """
        return None if self.decay == 1 else 512

    def importance(self, state: State, layout: Layout) -> Scores:
        """What each row is worth when a compaction selects (method.md 3).

        The decayed sum of its attention, or that united with what it is worth when the prompt is read again.
        """
        return state.scores if self.score == "attention" else ranking.united(state, layout, self.pool)

    def select(self, importance: mx.array, count: int) -> tuple[mx.array, mx.array]:
        """Rows to keep and the others, of importance [B, h, n] in the order of positions (see ``selection.select``)."""
        return selection.select(importance, count, 1 + 2 * self.reach)

    @property
    def reach(self) -> int:
        """Rows on either side of a row over which ``select`` pools; ``importance`` of ranks has done it before."""
        return self.pool // 2 if self.score == "attention" else 0

    def merge(self, merged: Merged, victims: Dense | Coded, scores: mx.array, fresh: bool) -> Merged:
        """A group's residual rows with the victims in them (see ``merging.merge``)."""
        return merging.merge(merged, victims, scores, fresh)

    def compacted(self, before: State, after: State) -> State:
        """The state that a compaction leaves, where selection and merging made ``after`` of ``before``."""
        return after

    def log_mass(self, weight: mx.array) -> mx.array:
        """What the tokens behind a row add to its logit: α log w (method.md 2); -inf where there are none."""
        return mx.where(weight > 0, self.alpha * mx.log(weight), -mx.inf)

    def lift(self, spread: mx.array, queries: mx.array) -> mx.array | None:
        """The second-order term of residual rows: min(κ, ½ spread ‖q‖²) for scaled queries [..., D] (method.md 2)."""
        if not self.kappa:
            return None
        norms = (queries * queries).sum(axis=-1, keepdims=True)
        return mx.minimum(self.kappa, 0.5 * spread * norms)

    def as_dict(self) -> dict[str, Any]:
        """The settings; those of codes where there are any."""
        found = asdict(self)
        return {n: x for n, x in found.items() if x is not None or n not in ("kv_bits", "kv_group_size")}
