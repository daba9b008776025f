"""The settings of the method, validated once."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Policy:
    """How importance is measured and how merged rows are compensated.

    ``kappa=0`` and ``pool=1`` give the paper's equations (arXiv 2503.10714), ``residual=0`` plain
    eviction.

    Args:
        residual: R, rows per head that hold merged tokens.
        proximity: share of the rows that a compaction leaves which are the newest tokens (P / C).
        staging: S, tokens between two compactions; ``None`` derives it from the rows.
        alpha: weight of log(tokens behind a row) in the logits.
        kappa: cap, in nats, of the second-order term of a merged row's logit.
        decay: λ, what is left of a token's importance one query later, in (0, 1].
        pool: neighbouring rows over which importance is max-pooled for selection; odd.

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

    def __post_init__(self) -> None:
        for name in ("residual", "pool", "staging"):
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

    @property
    def window(self) -> int | None:
        """Queries at the end of an exact prefill that decide the scores; ``None`` is all of them.

        0.98 ** 512 is 3e-5: older queries no longer count.
        """
        return None if self.decay == 1 else 512

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
