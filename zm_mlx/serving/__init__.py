"""A server of mlx-lm's API over caches of fixed size: one idea a file, the door is ``zm_mlx.server``."""
