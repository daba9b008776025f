"""The limit up to which macOS keeps MLX's memory wired, which mlx-lm raises for each generation."""

import sys

import mlx_lm  # noqa: F401 - loads the first two modules

NAME = "maybe_set_recommended_wired_limit"
MODULES = ("mlx_lm.utils", "mlx_lm.generate", "mlx_lm.server")  # that are loaded; others take it from the first


def leave_wired_limit() -> None:
    """Keep mlx-lm from setting the wired limit, for the rest of the process: in generation, batches and its server.

    Without it panics of macOS under memory pressure ended (github.com/ml-explore/mlx/issues/3186).
    """
    for name in MODULES:
        if name in sys.modules:
            setattr(sys.modules[name], NAME, _nothing)


def _nothing() -> None:
    """In place of a limit that is to be restored."""
