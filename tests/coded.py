"""States whose rows are codes, and what these codes stand for."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
from states import random_state
from tiny import f64

from zm_mlx.ops.check import with_codes
from zm_mlx.state.coded import Coded
from zm_mlx.state.coding import Coding
from zm_mlx.state.layout import Layout
from zm_mlx.state.state import State


def coded_state(layout: Layout, coding: Coding, *, closed: int, filled: int, **more) -> tuple[State, Layout]:
    """A random state of codes, of which ``closed`` are in the recent store, and the layout that says so."""
    state = random_state(layout, filled=filled, **more)
    state = with_codes(state._replace(since_compaction=filled - closed), layout, coding)
    return state, replace(layout, coding=coding)


def numbers(x: Coded, name: str) -> np.ndarray:
    """scale · code + bias in float64, the codes unpacked from words of 32 bits, the lowest bits first."""
    codes, scales, biases = (np.array(y) if y.dtype == mx.uint32 else f64(y) for y in getattr(x, name))
    bits, group = x.coding.bits, x.coding.group
    each = (codes[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
    each = each.reshape(*scales.shape, group).astype(np.float64)
    return (scales[..., None] * each + biases[..., None]).reshape(*scales.shape[:-1], scales.shape[-1] * group)
