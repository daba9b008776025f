"""Errors of this package that are not plain ``ValueError``."""


class UnsupportedModelError(ValueError):
    """A model whose attention cannot run on this cache; the message names the model and the reason."""
