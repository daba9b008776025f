"""What is done with a state: in plain MLX operations, and the same in Metal kernels. ``choose`` picks."""
