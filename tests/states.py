"""Random states and calls for tests of operations: garbage wherever nothing lies."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from zm_mlx.policies import Policy
from zm_mlx.state.layout import Layout
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import Call, Scores, State

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
GARBAGE = 3e4  # in rows that hold nothing


def names(dtypes):
    return [str(d).rpartition(".")[2] for d in dtypes]


def f32(x: np.ndarray) -> mx.array:
    return mx.array(np.asarray(x, np.float32))


class Given(NamedTuple):
    """The arguments of an operation of attention."""

    call: Call
    state: State
    layout: Layout
    policy: Policy = Policy()

    def with_call(self, **changes) -> "Given":
        return self._replace(call=self.call._replace(**changes))

    def with_kept(self, **changes) -> "Given":
        """Other arrays of the kept rows: keys, values, weight."""
        kept = self.state.kept
        rows = kept.rows._replace(**{k: changes.pop(k) for k in ("keys", "values") if k in changes})
        return self._replace(state=self.state._replace(kept=kept._replace(rows=rows, **changes)))


def random_state(
    layout: Layout, *, departed, filled, batch=2, dim=8, value_dim=8, dtype=mx.float32, seed=0, empty=()
) -> State:
    """Merged rows once ``departed`` tokens no longer fit a head; of these, rows ``empty`` have no weight."""
    rng = np.random.default_rng(seed)
    rows, heads, r = layout.starts[-1], layout.heads, layout.residual
    keys, values = rng.standard_normal((batch, rows, dim)), rng.standard_normal((batch, rows, value_dim))
    weight, score = np.ones((batch, rows)), rng.random((batch, rows))
    spread = np.zeros((batch, heads, r))
    for h in range(heads):
        begin, end = layout.starts[h : h + 2]
        if departed > end - begin:
            weight[:, begin : begin + r] = rng.integers(2, 30, (batch, r))
            spread[:, h] = rng.random((batch, r)) * 2
            for i in empty:
                weight[:, begin + i] = 0
        else:
            keys[:, begin + departed : end] = values[:, begin + departed : end] = GARBAGE
            weight[:, begin + departed : end] = 0
    news = [rng.standard_normal((batch, heads, layout.recent, d)) for d in (dim, value_dim)]
    for x in news:
        x[:, :, filled:] = GARBAGE
    recent = Dense(*(mx.array(x).astype(dtype) for x in news))
    state = State.empty(layout, recent, layout.recent)
    return state._replace(
        kept=state.kept._replace(rows=Dense(*(mx.array(x).astype(dtype) for x in (keys, values))), weight=f32(weight)),
        residuals=state.residuals._replace(spread=f32(spread)),
        recent=recent,
        scores=Scores(f32(score), f32(rng.random((batch, heads, layout.recent)))),
        departed=departed,
        filled=filled,
        since_compaction=0,
    )


def random_queries(layout, length, groups, dim, dtype, batch=2, seed=1) -> mx.array:
    x = np.random.default_rng(seed).standard_normal((batch, layout.heads * groups, length, dim)) * 2
    return mx.array(x).astype(dtype)


def arrived(state: State, keys: np.ndarray, values: np.ndarray, scores: np.ndarray) -> State:
    """The state with these recent rows [B, H, n] alone."""
    rows = Dense(*(mx.array(x).astype(state.kept.rows.dtype) for x in (keys, values)))
    scores = state.scores._replace(recent=f32(scores))
    return state._replace(recent=rows, scores=scores, filled=rows.shape[2], since_compaction=0)
