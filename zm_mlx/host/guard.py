"""The memory guard: what a prompt will take at its peak, and whether this machine has it.

It judges prompts, not the tokens generated after them: those take no more memory.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..errors import MemoryGuardError
from .memory import free_bytes
from .plan import Plan


@dataclass(frozen=True)
class Load:
    """What is to be judged.

    Args:
        prompt_tokens: of the longest prompt.
        step: tokens of a prompt in one call of the model.
        sequences: held at the same time, prompts under way included.
        prompts: read together, in the same calls of the model.
        held: bytes of these sequences' caches that exist already.
    """

    prompt_tokens: int
    step: int
    sequences: int = 1
    prompts: int = 1
    held: int = 0


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak: what MLX holds already, all caches, and what reading prompts takes besides.

    ``measured`` says that the last was calibrated with the model; otherwise it is an upper bound, far below what
    is free.
    """

    before: int
    caches: int
    reading: int
    measured: bool

    @property
    def peak(self) -> int:
        return self.before + self.caches + self.reading

    @property
    def new(self) -> int:
        """Bytes that are not held yet."""
        return self.caches + self.reading


def guard(model: nn.Module, plan: Plan, load: Load, force: bool = False) -> Prediction:
    """What a load will take at its peak; call it in the thread that uses the model, before anything is allocated.

    Raises:
        MemoryGuardError: more than is free here, and not ``force``. The message names what would fit.
    """
    found = Prediction(mx.get_active_memory() - load.held, load.sequences * plan.nbytes, 0, False)
    room = free_bytes(reserve=0)
    if room is not None and found.new > room and not force:
        raise MemoryGuardError(f"this takes {found.new / 1e9:.2f} GB, and {room / 1e9:.2f} GB are free here")
    return found
