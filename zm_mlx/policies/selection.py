"""Which rows stay: the most important ones, max-pooled over their neighbours (method.md 4)."""

import mlx.core as mx


def select(importance: mx.array, count: int, pool: int) -> tuple[mx.array, mx.array]:
    """Choose the ``count`` rows with the highest importance, max-pooled over ``pool`` neighbours.

    Args:
        importance: [..., n] float32, rows in the order of their positions.

    Returns:
        Indices of the chosen rows [..., count] and of the others [..., n - count], int32, both
        ascending. Of equal rows the older wins; NaN counts as -inf.
    """
    n = importance.shape[-1]
    worth = pooled(importance, pool)
    if count == 0:
        chosen = mx.zeros(worth.shape, mx.bool_)
    else:
        least = mx.partition(worth, n - count, axis=-1)[..., n - count : n - count + 1]
        above, level = worth > least, worth == least
        seats = count - above.sum(axis=-1, keepdims=True)
        chosen = above | (level & (_ranks(level) < seats))
    rows = mx.broadcast_to(mx.arange(n, dtype=mx.int32), chosen.shape)
    places = mx.where(chosen, _ranks(chosen), count + _ranks(~chosen))
    order = mx.put_along_axis(mx.zeros(chosen.shape, mx.int32), places, rows, axis=-1)
    return order[..., :count], order[..., count:]


def pooled(importance: mx.array, pool: int) -> mx.array:
    """The maximum over ``pool`` neighbours of importance [..., n]; NaN counts as -inf."""
    sides = [(0, 0)] * (importance.ndim - 1) + [(pool // 2, pool // 2)]
    found = mx.pad(without_nan(importance), sides, constant_values=-mx.inf)
    width = 1
    while width < pool:  # the maximum over ``width`` rows becomes that over twice as many
        step = min(width, pool - width)
        found = mx.maximum(found[..., :-step], found[..., step:])
        width += step
    return found


def without_nan(x: mx.array) -> mx.array:
    """x with -inf for NaN, which has no order: a model that overflows must not choose too few rows."""
    return mx.where(mx.isnan(x), -mx.inf, x)


def _ranks(flags: mx.array) -> mx.array:
    """For each true flag [..., n], how many true ones come before it."""
    return mx.cumsum(flags.astype(mx.int32), axis=-1) - 1
