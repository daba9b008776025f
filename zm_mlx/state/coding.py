"""How many bits the numbers of a row take; knows no arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

BITS = (8, 4)
GROUPS = (64, 32)  # the widest first, which takes the fewest bytes


class CodingError(ValueError):
    """Rows cannot become codes in the way that is asked for."""


@dataclass(frozen=True)
class Coding:
    """Bits of a code, and how many neighbouring numbers share a scale and a bias.

    Raises:
        CodingError: one is none of ``BITS`` and ``GROUPS``.
    """

    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise CodingError(f"kv_bits must be {_listed(BITS)}, not {self.bits!r}")
        if self.group not in GROUPS:
            raise CodingError(f"kv_group_size must be {_listed(GROUPS)}, not {self.group!r}")

    @classmethod
    def fitting(cls, bits: int, group: int | None, dims: Sequence[int]) -> "Coding":
        """For vectors of these lengths, in groups of 64 numbers unless ``group`` says otherwise, or of 32.

        Raises:
            CodingError: a vector cannot be divided into such groups; the message says what works.
        """
        works = [g for g in GROUPS if not any(d % g for d in dims)]
        if not works:
            raise CodingError(
                f"kv_bits needs head dims that are multiples of {min(GROUPS)}, and this model has "
                f"{_listed(sorted(set(dims)))}: leave it out"
            )
        found = cls(bits, works[0] if group is None else group)
        if found.group not in works:
            raise CodingError(
                f"kv_group_size={group} does not divide the head dims {_listed(sorted(set(dims)))} of this model: "
                f"{_listed(works)} works"
            )
        return found

    def nbytes(self, dim: int, itemsize: int) -> int:
        """Bytes of one vector of ``dim`` numbers, whose scales and biases take ``itemsize`` bytes each."""
        return dim * self.bits // 8 + 2 * itemsize * (dim // self.group)


def _listed(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
