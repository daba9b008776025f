"""All that knows mlx-lm: the cache behind its protocol, the hook, the probe, plans and saved caches."""
