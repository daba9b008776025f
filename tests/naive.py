"""Eviction token by token in float64, as the papers write it down: what policies without merged rows are compared with.

One sequence, H KV heads, G query heads each. A policy is a rule: from what is known of a head's rows to
their importance.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@dataclass
class Head:
    """Rows of one KV head: positions in order; of each position the attention it got, query by query [G]."""

    rows: list[int] = field(default_factory=list)
    got: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)  # position → query → probability per query head

    def since(self, query: int) -> np.ndarray:
        """Σ over queries from ``query`` on and query heads of the attention to each row."""
        return np.array([sum(p.sum() for i, p in self.got[j].items() if i >= query) for j in self.rows])


Rule = Callable[["Evicting", int], np.ndarray]  # (all heads, head) → importance of its rows


class Evicting:
    """A cache of M context rows, P newest and S staged ones for each head.

    Compactions fall on token M + P + S and every S tokens before and after.
    """

    def __init__(self, regions: tuple[int, int, int], rule: Rule, pool: int = 1):
        self.context, self.newest, self.staging = regions
        self.rule, self.pool = rule, pool
        self.seen = self.last = 0  # tokens, and those that the last compaction saw
        self.heads: list[Head] = []
        self.keys = self.values = np.zeros(0)

    def run(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
        """Outputs [Hq, T, Dv] of queries [Hq, T, D], keys [H, T, D] and values [H, T, Dv]."""
        count, length = k.shape[:2]
        self.keys, self.values = k, v.copy()
        self.heads = [Head() for _ in range(count)]
        groups, out = len(q) // count, np.zeros((*q.shape[:2], v.shape[2]))
        capacity = self.context + self.newest + self.staging
        for t in range(length):
            for h, head in enumerate(self.heads):
                head.rows.append(t)
                head.got[t] = {}
                mine = slice(h * groups, (h + 1) * groups)
                p = softmax(scale * q[mine, t] @ k[h, head.rows].T)
                for i, j in enumerate(head.rows):
                    head.got[j][t] = p[:, i]
                out[mine, t] = p @ self.values[h, head.rows]
            self.seen += 1
            if (self.seen - capacity) % self.staging == 0:
                self.compact()
        return out

    def compact(self) -> None:
        kept = [self.kept(h) for h in range(len(self.heads))]  # by what all heads are before any is changed
        for head, rows in zip(self.heads, kept, strict=True):
            head.rows = rows
        self.last = self.seen

    def kept(self, h: int) -> list[int]:
        rows = self.heads[h].rows
        pool = max(0, len(rows) - self.newest)
        if self.seen - self.newest <= self.context:
            return rows
        worth, reach = self.rule(self, h)[:pool], self.pool // 2
        pooled = [worth[max(0, j - reach) : j + reach + 1].max() for j in range(pool)]
        best = sorted(range(pool), key=lambda j: (-pooled[j], j))[: self.context]
        return [rows[j] for j in sorted(best)] + rows[pool:]
