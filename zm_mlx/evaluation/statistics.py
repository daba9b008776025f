"""Means and standard errors over documents; several items of one document are averaged first.

Items of one document are not independent (the same text, other facts), so the documents are the sample: the
mean is that of the documents' means, its standard error their standard deviation over the square root of their
number. Two caches are compared on the same items, by the differences within each.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Values = Mapping[tuple[str, int, int], float]  # of each item: its document, seed and part


class Estimate(NamedTuple):
    """A mean over ``documents`` documents, with its standard error (``None`` for a single one)."""

    mean: float
    error: float | None
    documents: int

    def as_dict(self) -> dict[str, float | int | None]:
        return self._asdict()


def estimate(values: Values) -> Estimate | None:
    """The mean over documents; ``None`` without values."""
    clusters: dict[str, list[float]] = {}
    for (document, *_), value in values.items():
        clusters.setdefault(document, []).append(value)
    if not clusters:
        return None
    means = np.array([np.mean(x) for x in clusters.values()])
    count = len(means)
    error = float(means.std(ddof=1)) / math.sqrt(count) if count > 1 else None
    return Estimate(float(means.mean()), error, count)


def difference(values: Values, reference: Values) -> Estimate | None:
    """The mean difference on the items that both have; ``None`` without any."""
    return estimate({item: value - reference[item] for item, value in values.items() if item in reference})
