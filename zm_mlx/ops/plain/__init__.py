"""The method in plain MLX operations: what the kernels are compared with."""
