"""By what a model is known again, wherever its folder lies."""

import hashlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

SAMPLE = 16  # numbers of each array: enough to tell any two trainings apart, and no work for large models
DIGITS = 32


def fingerprint(model: nn.Module) -> str:
    """A name for a model's weights: the same for the same weights, in 32 or 16 bits if these are exact in both.

    It depends on each array's name, shape and first numbers, so a quantised or fine-tuned model, or one with an
    adapter, is another model.
    """
    leaves = sorted(tree_flatten(model.parameters()), key=lambda leaf: leaf[0])
    samples = [x.reshape(-1)[:SAMPLE].astype(mx.float32) for _, x in leaves]
    mx.eval(samples)
    digest = hashlib.sha256()
    for (name, x), sample in zip(leaves, samples, strict=True):
        digest.update(f"{name} {x.shape} ".encode())
        digest.update(np.array(sample).astype("<f4").tobytes())
    return digest.hexdigest()[:DIGITS]
