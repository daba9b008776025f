"""The operations of ``ops.plain`` as Metal kernels, with the same signatures: one module an operation.

The sources are in ``metal/``. ``ops.choose`` decides whether they compute.
"""
