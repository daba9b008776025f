"""By what a model is known again, wherever its folder lies."""

import hashlib
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

SAMPLE = 16  # numbers of each array: enough to tell any two trainings apart, and no work for large models
DIGITS = 32
PART = "_zm_part"  # the attribute of a model that was split

Leaves = Sequence[tuple[str, mx.array]]


def fingerprint(model: nn.Module) -> str:
    """A name for a model's weights: the same for the same weights, in 32 or 16 bits if these are exact in both.

    It depends on each array's name, shape and first numbers, so it is another one once a model is quantised.
    """
    return _digest(_leaves(model), mx.float32)


def lineage(model: nn.Module) -> str:
    """A name for a trained model: the same for all its quantisations, in any width, and with or without adapters.

    Quantisation and adapters leave the weights of norms as they are, and full training does not. Where these say
    nothing (all the same in each norm, as before training), it is the fingerprint. A part of a model (``host.part``)
    has that of the whole.
    """
    part = getattr(model, PART, None)
    if part is not None:
        return str(part.lineage)
    norms = [(name, x) for name, x in _leaves(model) if x.ndim == 1 and name.endswith("weight")]
    if all(mx.all(x == x[0]).item() for _, x in norms):
        return fingerprint(model)
    return _digest(norms, mx.bfloat16)


def _leaves(model: nn.Module) -> list[tuple[str, mx.array]]:
    return sorted(tree_flatten(model.parameters()), key=lambda leaf: leaf[0])


def _digest(leaves: Leaves, width: mx.Dtype) -> str:
    samples = [x.reshape(-1)[:SAMPLE].astype(width).astype(mx.float32) for _, x in leaves]
    mx.eval(samples)
    digest = hashlib.sha256()
    for (name, x), sample in zip(leaves, samples, strict=True):
        digest.update(f"{name} {x.shape} ".encode())
        digest.update(np.array(sample).astype("<f4").tobytes())
    return digest.hexdigest()[:DIGITS]
