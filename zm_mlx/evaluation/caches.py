"""The caches of an evaluation by name, each at the same share of the bytes of a full cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mlx_lm.models.cache import KVCache, QuantizedKVCache

from ..budget import largest, total_bytes
from ..host.caches import ROTATING_KEEP
from ..policies import BY_NAME, Policy, ZeroMerge, name_of
from ..state.layout import LayerShape
from ..state.rows import Dense

DEFAULT = name_of(ZeroMerge())
OF_MLX_LM = ("full", "rotating", "quantized")
STREAMING = "-streaming"
UNIFORM = "-uniform"
CODED = {"-8bit": 8, "-4bit": 4}
BITS = (8, 4, 2)  # widths that mlx-lm's quantised cache allocates right
GROUPS = (32, 64, 128)  # numbers that share a scale, the most exact first


@dataclass(frozen=True)
class Contender:
    """A cache under comparison.

    Args:
        name: ``full``, ``rotating`` or ``quantized`` of mlx-lm, or a policy of ``policies.BY_NAME``. The prompt is
            read with full caches and compressed once; with ``-streaming`` behind the name it is read through
            the caches themselves; with ``-uniform`` it does not use the model's table of rows per head, which
            ``zeromerge`` does where there is one; with ``-8bit`` or ``-4bit`` its rows become codes. In this order:
            ``zeromerge-uniform-8bit-streaming``.
        budget: share of the bytes that full caches take for the prompt, in (0, 1]; ``full`` takes all.
        policy: other settings than the named policy's own.

    Raises:
        ValueError: an unknown name, or a budget out of range.
    """

    name: str
    budget: float = 1.0
    policy: Policy | None = None

    def __post_init__(self) -> None:
        if self.method not in OF_MLX_LM and self.method not in BY_NAME:
            raise ValueError(f"no cache is called {self.name!r}; there are {', '.join([*OF_MLX_LM, *BY_NAME])}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget must be a share of the full cache in (0, 1], not {self.budget!r}")
        if self.policy is not None and type(self.policy) is not BY_NAME.get(self.method):
            raise ValueError(f"{self.name} takes no settings of {type(self.policy).__name__}")
        if self.bits is not None and self.settings is None:
            raise ValueError(f"{self.name} does not work: the bits of mlx-lm's caches follow from their budget")

    @property
    def streaming(self) -> bool:
        """Whether the prompt is read through the caches themselves."""
        return self.name.endswith(STREAMING)

    @property
    def method(self) -> str:
        """The name without the way in which the prompt is read and rows are held."""
        name = self.name.removesuffix(STREAMING)
        for suffix in CODED:
            name = name.removesuffix(suffix)
        return name.removesuffix(UNIFORM)

    @property
    def bits(self) -> int | None:
        """Bits of the codes that rows become; ``None`` where they do not."""
        name = self.name.removesuffix(STREAMING)
        return next((bits for suffix, bits in CODED.items() if name.endswith(suffix)), None)

    @property
    def shares(self) -> bool:
        """Whether rows are shared out by the model's table."""
        return self.method == DEFAULT and UNIFORM not in self.name

    @cached_property
    def settings(self) -> Policy | None:
        """The policy of caches of this package; ``None`` for mlx-lm's."""
        found = self.policy or (BY_NAME[self.method]() if self.method in BY_NAME else None)
        return found if found is None or self.bits is None else replace(found, kv_bits=self.bits)

    def room(self, shapes: Sequence[LayerShape], tokens: int) -> int:
        """Bytes that the caches of all layers may take for a prompt of ``tokens`` tokens."""
        return math.floor(self.budget * full_bytes(shapes, tokens))


def full_bytes(shapes: Sequence[LayerShape], tokens: int) -> int:
    """Bytes of uncompressed caches."""
    return tokens * sum(s.token_bytes for s in shapes)


def rows_of(policy: Policy, shapes: Sequence[LayerShape], room: int) -> int:
    """The most rows per head that fit into ``room`` bytes.

    Raises:
        ValueError: not even the fewest that work fit.
    """
    rows = largest(shapes, policy, room)
    need = total_bytes(policy.layouts(rows, [s.heads for s in shapes]), shapes)
    if need > room:
        raise ValueError(f"{room:,} bytes are too few: the fewest rows that work take {need:,}")
    return rows


def full(rows: Dense) -> KVCache:
    """mlx-lm's cache of rows [1, H, T]."""
    cache = KVCache()
    cache.state = (rows.keys, rows.values, rows.shape[2])
    return cache


def window_rows(shapes: Sequence[LayerShape], room: int) -> int:
    """Rows of mlx-lm's rotating cache that fit into ``room`` bytes.

    Raises:
        ValueError: no more than the first tokens that it always keeps.
    """
    rows = room // full_bytes(shapes, 1)
    if rows <= ROTATING_KEEP:
        raise ValueError(f"{room:,} bytes are too few for a rotating cache: they hold {rows} rows")
    return rows


@dataclass(frozen=True)
class Quantization:
    """Bits of a number, and how many numbers share a scale and a bias."""

    bits: int
    group: int

    @classmethod
    def within(cls, shapes: Sequence[LayerShape], budget: float) -> "Quantization":
        """The most exact one that takes no more than this share of the full cache.

        Raises:
            ValueError: none does; the message says what the smallest takes.
        """
        dims = math.gcd(*(d for s in shapes for d in (s.head_dim, s.value_dim)))
        width = max(8 * s.itemsize for s in shapes)  # bits of a number, and of a scale and a bias
        found = [cls(bits, group) for bits in BITS for group in GROUPS if dims % group == 0]
        for one in found:
            if one.share(width) <= budget:
                return one
        if not found:
            raise ValueError(f"mlx-lm cannot quantise head dims that have the common divisor {dims}")
        least = min(one.share(width) for one in found)
        raise ValueError(f"mlx-lm's quantised cache takes {least:.3f} of the full one at least, not {budget}")

    def share(self, width: int) -> float:
        """Bytes beside those of numbers of ``width`` bits."""
        return self.bits / width + 2 / self.group

    def of(self, rows: Dense) -> QuantizedKVCache:
        """The quantised cache of rows [1, H, T], made after the prompt as mlx-lm does."""
        return full(rows).to_quantized(self.group, self.bits)
