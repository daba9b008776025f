"""Whether a mask that a model passes to attention means "causal", which is what the caches do by themselves."""

from typing import Any

import mlx.core as mx

from ..errors import UnsupportedModelError


def require_causal(mask: Any, length: int) -> None:
    """Require that a mask for ``length`` new tokens means "causal" and nothing else, which is what the cache does.

    Raises:
        UnsupportedModelError: it means something else.
    """
    if isinstance(mask, mx.array):
        causal = _is_causal(mask, length)
    else:
        causal = mask == "causal" or (mask is None and length == 1)
    if not causal:
        raise UnsupportedModelError(
            "its attention has another mask than the causal one (a sliding window, a bias on the scores, or none)"
        )


def _is_causal(mask: mx.array, length: int) -> bool:
    """Whether an array mask over ``length`` new tokens means "causal" and nothing else."""
    if mask.shape[-1] != length:
        return False
    if length == 1:  # a bias on a single key changes nothing, and decoding must not wait for its value
        return True
    visible = mask if mask.dtype == mx.bool_ else mask == 0
    hidden = ~mask if mask.dtype == mx.bool_ else mask < -1e3
    causal = mx.tri(length).astype(mx.bool_)
    return bool(mx.all((visible == causal) & (hidden == ~causal)).item())
