"""The operations of ``compress`` as Metal kernels: one module a kernel, its function has the module's name.

The sources are in ``metal/``. ``zm_mlx.backend`` decides whether they compute.
"""
