"""What this package does by default."""

from dataclasses import dataclass

from .policy import Policy, Score


@dataclass(frozen=True)
class ZeroMerge(Policy):
    """Half of the context rows by attention so far, half by the prompt's own queries moved behind it (method.md 3).

    The settings were chosen on tuning texts with SmolLM2-135M-Instruct, under the cap; method.md 9 has the
    numbers, and what was tried besides.
    """

    residual: int = 0
    proximity: float = 0.2
    kappa: float = 0.0
    pool: int = 1
    newest: int = 32
    score: Score = "replay"
