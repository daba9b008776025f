"""How the processes of ``mlx.launch`` that hold one model together agree on what each does.

Each of these functions is called by all ranks at the same point, or they wait for each other for ever. With one
process there is nothing to agree on, and nothing is sent.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import UserError

LOST = "connection to a peer was lost"  # in MLX's error, once another rank has ended

T = TypeVar("T")
Sampler = Callable[[mx.array], mx.array]


def count() -> int:
    """How many processes there are."""
    return int(mx.distributed.init().size())


def rank() -> int:
    """Which of them this is, from 0."""
    return int(mx.distributed.init().rank())


def together(local: Callable[[], T]) -> list[T]:
    """What ``local`` gives on each rank, by rank: what JSON can say.

    Raises:
        Exception: where it fails on any rank: its own error where it failed here, else a ``UserError`` with the words
            of the first rank that failed. All ranks raise; ``agreed_error`` knows such an error again.
    """
    if count() == 1:
        return [local()]
    value, failed = None, None
    try:
        value = local()
    except Exception as error:
        if agreed_error(error):
            raise
        failed = error
    told = _exchange({"value": value} if failed is None else {"error": str(failed) or type(failed).__name__})
    first = next((i for i, each in enumerate(told) if "error" in each), None)
    if first is None:
        return [each["value"] for each in told]
    if failed is None:
        failed = UserError(f"rank {first}: {told[first]['error']}")
    failed._zm_agreed = True  # type: ignore[attr-defined]
    raise failed


def agreed(local: Callable[[], T]) -> T:
    """What ``local`` gives here, once it has worked on all ranks; errors as those of ``together``."""
    found: list[T] = []
    together(lambda: found.append(local()))
    return found[0]


def agreed_error(error: BaseException | None) -> bool:
    """Whether all ranks raise this error, or what it was made of."""
    while error is not None:
        if getattr(error, "_zm_agreed", False):
            return True
        error = error.__cause__ or error.__context__
    return False


def wait_for_all() -> None:
    """Go on once all ranks are here."""
    if count() > 1:
        mx.eval(mx.distributed.all_sum(mx.array(1)))


def drawn_by_first(sampler: Sampler) -> Sampler:
    """A sampler that gives what rank 0 draws, on all ranks.

    Machines of two kinds round differently, and random numbers may have gone apart: ranks that go on with different
    tokens, of which one ends the text, would wait for each other.
    """
    counts = 1 if rank() == 0 else 0

    def draw(logprobs: mx.array) -> mx.array:
        # A product on all ranks: what did not depend on the model's own messages could be sent before these.
        return mx.distributed.all_sum(sampler(logprobs) * counts)

    return draw


def _exchange(document: dict[str, Any]) -> list[dict[str, Any]]:
    """A JSON document of each rank, by rank."""
    data = np.frombuffer(json.dumps(document).encode(), np.uint8)
    longest = int(np.array(mx.distributed.all_gather(mx.array([data.size]))).max())
    padded = np.pad(data, (0, longest - data.size), constant_values=ord(" "))
    rows = np.array(mx.distributed.all_gather(mx.array(padded)[None]))
    return [json.loads(row.tobytes()) for row in rows]
