"""The equations in float64 NumPy, one head and one token at a time, nothing shared with the package.

``Cache`` is a whole layer for one sequence: it remembers every token that arrived and which tokens stand
behind each row. ``PaperLoop`` is the published loop, one token a step, with running means.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np


def attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    weight: np.ndarray,
    spread: np.ndarray,
    visible: np.ndarray,
    *,
    scale: float,
    alpha: float,
    kappa: float,
    sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Queries [G, L, D] of one KV head over its rows; ``visible`` is [L, rows]. Output and probabilities."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    with np.errstate(divide="ignore", invalid="ignore"):
        logits = scale * q @ keys.T + alpha * np.log(weight)
    logits = logits + np.minimum(kappa, 0.5 * scale**2 * spread * (q * q).sum(-1, keepdims=True))
    logits = np.where(visible & (weight > 0), logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    if sinks is not None:
        sinks = np.asarray(sinks, np.float64)[:, None, None]
        top = np.maximum(top, sinks)
    e = np.exp(logits - top)
    total = e.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks - top))
    return (e / total) @ values, e / total


def mass(p: np.ndarray, decay: float) -> np.ndarray:
    """Σ_i λ^(L-1-i) Σ_g p[g, i, j]."""
    length = p.shape[1]
    return sum(decay ** (length - 1 - i) * p[:, i].sum(0) for i in range(length))


def select(score: Sequence[float], count: int, pool: int) -> tuple[list[int], list[int]]:
    """The ``count`` rows of highest pooled score, and the others; both in order, the older wins a tie."""
    n, reach = len(score), pool // 2
    pooled = [max(score[max(0, i - reach) : i + reach + 1]) for i in range(n)]
    best = sorted(range(n), key=lambda i: (-pooled[i], i))[:count]
    return sorted(best), [i for i in range(n) if i not in best]


def doubt(score: Sequence[float], count: int, pool: int) -> float:
    """Relative distance of the last chosen pooled score to the nearest other one: too small is too close to call."""
    n, reach = len(score), pool // 2
    pooled = np.array([max(score[max(0, i - reach) : i + reach + 1]) for i in range(n)])
    if not 0 < count < n:
        return np.inf
    last = np.sort(pooled)[n - count]
    others = pooled[pooled != last]
    return float(np.abs(others - last).min() / max(last, 1e-30)) if len(others) else np.inf


def cut(count: int, groups: int) -> list[range]:
    """``count`` rows in order, cut into contiguous groups of equal size (± 1)."""
    edges = [-(-g * count // groups) for g in range(groups + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def spread_of(keys: np.ndarray) -> float:
    """Variance of keys, averaged over the dimensions."""
    return float(((keys - keys.mean(0)) ** 2).sum(-1).mean() / keys.shape[-1])


@dataclass
class Row:
    tokens: list[int]
    score: float


@dataclass
class Head:
    """One KV head: ``merged`` rows first, then ``raw`` ones in order; every token stands behind one row or none."""

    residual: int
    context: int
    proximity: int
    pool: int
    rounding: Callable[[np.ndarray], np.ndarray] = np.asarray
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    merged: list[Row] = field(default_factory=list)
    raw: list[Row] = field(default_factory=list)
    compressed: bool = False
    doubt: float = np.inf

    def append(self, key: np.ndarray, value: np.ndarray, score: float = 0.0) -> None:
        self.raw.append(Row([len(self.keys)], score))
        self.keys.append(np.asarray(key, np.float64))
        self.values.append(np.asarray(value, np.float64))

    @property
    def rows(self) -> list[Row]:
        return self.merged + self.raw

    def mean(self, what: list[np.ndarray], row: Row) -> np.ndarray:
        if len(row.tokens) == 1:
            return what[row.tokens[0]]
        return self.rounding(np.mean([what[t] for t in row.tokens], axis=0))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Keys, values, weight and spread of the rows."""
        rows = self.rows
        keys, values = (np.stack([self.mean(x, r) for r in rows]) for x in (self.keys, self.values))
        spread = [spread_of(np.stack([self.keys[t] for t in r.tokens])) if len(r.tokens) > 1 else 0.0 for r in rows]
        return keys, values, np.array([float(len(r.tokens)) for r in rows]), np.array(spread)

    def attend(self, q: np.ndarray, *, decay: float, counts: bool = True, **how) -> np.ndarray:
        """Queries [G, D] of one new token, already appended; its probabilities are added to the scores.

        ``counts=False``: the query is too long ago to count.
        """
        keys, values, weight, spread = self.arrays()
        out, p = attention(q[:, None], keys, values, weight, spread, np.ones((1, len(keys)), bool), **how)
        for row, m in zip(self.rows, mass(p, decay), strict=True):
            row.score = decay * row.score + (m if counts else 0.0)
        return out[:, 0]

    def compact(self) -> None:
        """All raw rows older than the newest ``proximity`` ones are context, or merged, or dropped."""
        older = max(0, len(self.raw) - self.proximity)
        pool, newest = self.raw[:older], self.raw[older:]
        if not self.compressed and len(pool) <= self.residual + self.context:
            return
        self.compressed = True
        score = [r.score for r in pool]
        chosen, victims = select(score, self.context, self.pool)
        self.doubt = min(self.doubt, doubt(score, self.context, self.pool))
        self.raw = [pool[i] for i in chosen] + newest
        if self.residual == 0:
            return
        if not self.merged:
            groups = [[pool[victims[i]] for i in g] for g in cut(len(victims), self.residual)]
            self.merged = [Row([t for r in g for t in r.tokens], max(r.score for r in g)) for g in groups]
            return
        centres = np.stack([self.mean(self.keys, r) for r in self.merged])
        for row in (pool[i] for i in victims):
            dots = centres @ self.keys[row.tokens[0]]
            nearest = int(np.argmax(dots))
            if len(dots) > 1:
                first, second = np.sort(dots)[::-1][:2]
                self.doubt = min(self.doubt, (first - second) / max(1e-30, np.abs(dots).max()))
            target = self.merged[nearest]
            target.tokens = target.tokens + row.tokens
            target.score = max(target.score, row.score)


class Cache:
    """One layer, one sequence. Regions come as numbers: R, the M of each head, P, S."""

    def __init__(
        self,
        residual: int,
        context: Sequence[int],
        proximity: int,
        staging: int,
        *,
        alpha: float = 1.0,
        kappa: float = 3.0,
        decay: float = 0.98,
        pool: int = 13,
        window: int | None = 512,
        rounding: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> None:
        self.heads = [Head(residual, m, proximity, pool, rounding) for m in context]
        self.staging, self.window, self.decay = staging, window, decay
        self.how = {"alpha": alpha, "kappa": kappa}
        self.capacity = residual + min(context) + proximity + staging
        self.anchor = self.capacity  # compactions happen at token counts a multiple of S away from it
        self.seen = 0
        self.prompt_end = 0

    @property
    def doubt(self) -> float:
        return min(h.doubt for h in self.heads)

    def begin_prompt(self, length: int) -> None:
        self.prompt_end = self.seen + length

    def step(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, sinks: np.ndarray | None = None
    ) -> np.ndarray:
        """One token: q [Hq, D], k [H, D], v [H, Dv]; returns [Hq, Dv]."""
        self.seen += 1
        groups = np.asarray(q, np.float64).reshape(len(self.heads), -1, q.shape[-1])
        counts = self.window is None or self.seen > self.prompt_end - self.window
        outputs = []
        sink = [None] * len(self.heads) if sinks is None else np.reshape(sinks, (len(self.heads), -1))
        for head, queries, key, value, s in zip(self.heads, groups, k, v, sink, strict=True):
            head.append(key, value)
            outputs.append(head.attend(queries, decay=self.decay, counts=counts, scale=scale, sinks=s, **self.how))
        if self.seen == self.prompt_end:
            if self.seen > self.capacity:
                self.anchor = self.seen
            self.prompt_end = 0
        if not self.prompt_end and (self.seen - self.anchor) % self.staging == 0:
            for head in self.heads:
                head.compact()
        return np.concatenate(outputs)

    def run(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, sinks: np.ndarray | None = None
    ) -> np.ndarray:
        """Tokens of one sequence, q [Hq, T, D], k [H, T, D], v [H, T, Dv]: returns [Hq, T, Dv]."""
        outputs = [self.step(q[:, t], k[:, t], v[:, t], scale, sinks) for t in range(q.shape[1])]
        return np.stack(outputs, axis=1)


class PaperLoop:
    """The paper's equations for one KV head: a prompt longer than C, then one token a step, S = 1.

    After the prompt the top M tokens by decayed score are context, the newest P proximity, and the
    others lie in R residual slots. Each step: compensated attention over all slots and the new token,
    scores ← λ scores + Σ_g p, the oldest proximity token joins the context, and the least important one
    of these M + 1 is merged into the residual slot with the largest dot product, by a running mean.
    """

    def __init__(self, residual: int, context: int, proximity: int, *, alpha: float, decay: float, scale: float):
        self.residual, self.context, self.proximity = residual, context, proximity
        self.alpha, self.decay, self.scale = alpha, decay, scale

    def prompt(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """q [G, T, D], k [T, D], v [T, Dv]."""
        length = len(k)
        logits = self.scale * q @ k.T
        logits[:, ~np.tri(length, dtype=bool)] = -np.inf
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        score = mass(p, self.decay)
        older = length - self.proximity
        order = np.argsort(-score[:older], kind="stable")
        top, rest = np.sort(order[: self.context]), np.sort(order[self.context :])
        slots = [rest[g.start : g.stop] for g in cut(len(rest), self.residual)]
        raw = np.concatenate([top, np.arange(older, length)])
        self.k = np.concatenate([np.stack([k[s].mean(0) for s in slots]), k[raw]])
        self.v = np.concatenate([np.stack([v[s].mean(0) for s in slots]), v[raw]])
        self.w = np.concatenate([[float(len(s)) for s in slots], np.ones(len(raw))])
        self.s = np.concatenate([[score[s].max() for s in slots], score[raw]])
        return p @ v

    def step(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """q [G, D], k [D], v [Dv]."""
        self.k, self.v = np.vstack([self.k, k]), np.vstack([self.v, v])
        self.w, self.s = np.append(self.w, 1.0), np.append(self.s, 0.0)
        logits = self.scale * q @ self.k.T + self.alpha * np.log(self.w)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        self.s = self.decay * self.s + p.sum(0)
        out = p @ self.v
        r, m = self.residual, self.context
        i = r + int(np.argmin(self.s[r : r + m + 1]))
        j = int(np.argmax(self.k[:r] @ self.k[i]))
        total = self.w[j] + self.w[i]
        self.k[j] = (self.w[j] * self.k[j] + self.w[i] * self.k[i]) / total
        self.v[j] = (self.w[j] * self.v[j] + self.w[i] * self.v[i]) / total
        self.s[j], self.w[j] = max(self.s[j], self.s[i]), total
        keep = np.arange(len(self.w)) != i
        self.k, self.v, self.w, self.s = self.k[keep], self.v[keep], self.w[keep], self.s[keep]
        return out
