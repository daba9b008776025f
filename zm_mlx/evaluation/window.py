"""mlx-lm's rotating cache in blocks of tokens.

In calls of more than one token mlx-lm's own mask hides the first tokens, which it keeps, so that it would have to be
evaluated token by token. This gives what it gives then, for many tokens at once.
"""

import mlx.core as mx

from ..host.caches import ROTATING_KEEP
from ..state.rows import Dense
from .recording import Guest


class Window(Guest):
    """The first tokens and the newest ones, ``most`` in all.

    Args:
        rows: of a prompt [1, H, T].
        most: rows that each query sees, its own included.
    """

    def __init__(self, rows: Dense, most: int) -> None:
        super().__init__(rows.shape[1])
        self.most, self.seen = most, rows.shape[2]
        self.rows = self._cut(rows)

    @property
    def offset(self) -> int:
        return self.seen

    @property
    def nbytes(self) -> int:
        """Bytes of its rows, as mlx-lm's cache holds them once it is full."""
        return sum(x.nbytes for x in self.rows)

    def arrays(self) -> list[mx.array]:
        return list(self.rows)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.seen += keys.shape[2]
        return keys, values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None = None,
        cap: float | None = None,
    ) -> mx.array:
        if cap is not None:
            raise ValueError("the evaluation's window cannot attend for a model whose scores have a soft cap")
        rows = Dense.joined([self.rows, Dense(keys, values)], axis=2)
        old, held = self.seen - keys.shape[2], self.rows.shape[2]
        first = min(ROTATING_KEEP, held)
        position = mx.concatenate([mx.arange(first), mx.arange(old - held + first, self.seen)])
        query = mx.arange(old, self.seen)[:, None]
        near = position > query - (self.most - ROTATING_KEEP)
        mask = (position <= query) & (near | (position < ROTATING_KEEP))
        self.rows, self.used = self._cut(rows), (rows, mask)
        return mx.fast.scaled_dot_product_attention(queries, *rows, scale=scale, mask=mask, sinks=sinks)

    def attend_again(self, queries: mx.array, scale: float) -> mx.array:
        rows, mask = self.used
        return mx.fast.scaled_dot_product_attention(queries, *rows, scale=scale, mask=mask)

    def _cut(self, rows: Dense) -> Dense:
        """The first tokens and the newest ones."""
        count, most = rows.shape[2], self.most
        if count <= most:
            return rows
        newest = slice(count - most + ROTATING_KEEP, count)
        return rows.map(lambda x: mx.concatenate([x[:, :, :ROTATING_KEEP], x[:, :, newest]], axis=2))
