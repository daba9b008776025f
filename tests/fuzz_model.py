"""A layer's cache as lists of rows, written from zm_mlx/method.md: one sequence, one token and one head at a time.

Everything is float64, and nothing is shared with the package. A decision that float32 may take otherwise is noted
(``Layer.unsure``), so that whoever compares can go on from what the cache decided.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import twin

CLOSE = 5e-5  # relative difference of two numbers of which float32 may take either for the larger
OLDEST = 4  # tokens that every replay sees
RIDGE = 0.02
DISCOUNT = 1.2  # nats


@dataclass(frozen=True)
class Rules:
    """What a cache does, in numbers: R, the M of each head, P, S, and the method's settings.

    Args:
        by: what ranks tokens: "attention", "union" (with a replay's reading) or "age".
        fits: whether the first residual row is fitted at a prompt's end, and victims are dropped otherwise.
        turn: what moves a query behind its piece, [D, D]; ``None``: prompts are not replayed.
        piece: tokens that are replayed together.
        window: queries that score a prompt which is held whole; ``None``: all.
        fewest: queries to which a row is fitted.
        distance: tokens between a query and the victims that it is fitted to.
        sinks: [H, G] or none.
        rounding: of merged rows.
        coded: what is left of keys and values [n, .] when a compaction passes them; ``None``: all.
    """

    residual: int
    context: tuple[int, ...]
    proximity: int
    staging: int
    scale: float
    alpha: float = 1.0
    kappa: float = 3.0
    decay: float = 0.98
    pool: int = 1
    by: str = "attention"
    fits: bool = False
    turn: np.ndarray | None = None
    piece: int = 512
    window: int | None = 512
    fewest: int = 128
    distance: int = 64
    sinks: np.ndarray | None = None
    rounding: Callable[[np.ndarray], np.ndarray] = np.asarray
    coded: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def capacity(self) -> int:
        return self.residual + min(self.context) + self.proximity + self.staging


@dataclass
class Row:
    """A raw token, or a residual row (position -1); ``sums`` are Σk, Σv and Σ‖k‖² behind a merged one."""

    key: np.ndarray
    value: np.ndarray
    position: int = -1
    weight: float = 1.0
    score: float = 0.0
    reading: float = 0.0
    sums: tuple[np.ndarray, np.ndarray, float] | None = None
    coded: bool = False

    @property
    def spread(self) -> float:
        if self.sums is None:
            return 0.0
        mean = self.sums[0] / self.weight
        return max(0.0, self.sums[2] / self.weight - float(mean @ mean)) / len(mean)


@dataclass
class Head:
    """Residual rows, then raw ones in the order of positions."""

    merged: list[Row] = field(default_factory=list)
    raw: list[Row] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return self.merged + self.raw


@dataclass
class Prompt:
    """Tokens that are held whole until ``length`` of them came: a prompt, or a piece of one."""

    length: int
    begun: int
    piece: bool = False
    queries: list[np.ndarray] = field(default_factory=list)  # [H, G, D] of each token
    masses: list[list[np.ndarray]] = field(default_factory=list)  # of each token, for each head [rows]


class Layer:
    """One layer, one sequence."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.heads = [Head() for _ in rules.context]
        self.tokens: list[tuple[np.ndarray, np.ndarray]] = []  # all keys [H, D] and values [H, Dv] that came
        self.seen = self.departed = self.closed = 0
        self.staged = -rules.capacity % rules.staging
        self.prompt: Prompt | None = None
        self.unsure = False
        self.compactions = self.fits = 0

    def copy(self) -> "Layer":
        made = copy.copy(self)
        made.tokens = list(self.tokens)
        made.heads = [Head(*([replace(r) for r in rows] for rows in (x.merged, x.raw))) for x in self.heads]
        if self.prompt is not None:
            prompt = self.prompt
            made.prompt = replace(prompt, queries=list(prompt.queries), masses=list(prompt.masses))
        return made

    # ---- tokens

    def call(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Queries [Hq, L, D], keys [H, L, D], values [H, L, Dv]; returns [Hq, L, Dv]."""
        length = q.shape[1]
        if length == 1:
            self._before_decoding()
        outputs = []
        for i in range(length):
            if length > 1 and self.prompt is None and self.rules.turn is not None:
                self.prompt = Prompt(self.rules.piece, self.seen, piece=True)
            outputs.append(self._token(q[:, i], k[:, i], v[:, i]))
        return np.stack(outputs, axis=1)

    def decode(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """``call`` for one token after the other."""
        return np.concatenate([self.call(*(x[:, i : i + 1] for x in (q, k, v))) for i in range(q.shape[1])], axis=1)

    def begin(self, length: int) -> None:
        """Announce a prompt."""
        self.finish()
        self.prompt = Prompt(length, self.seen)

    def finish(self) -> None:
        """End a prompt or a piece with the tokens that it has."""
        prompt, rules = self.prompt, self.rules
        self.prompt = None
        if prompt is None or not prompt.queries:
            return
        taken = len(prompt.queries)
        self._score(prompt)
        self._replay(prompt.queries[taken - taken % rules.piece :])
        if prompt.piece and self.staged + taken < rules.staging:
            self.staged += taken
            return
        # Until something is merged, compactions stay where one falls on token min N.
        self._compact((self.seen - rules.capacity) % rules.staging if self.seen <= rules.capacity else 0, prompt)

    def _before_decoding(self) -> None:
        """A call of one token ends a piece, and a prompt that is far from its end and would exceed the budget."""
        prompt = self.prompt
        if prompt is None:
            return
        left = prompt.length - len(prompt.queries)
        if prompt.piece or (left > 2 and self.seen >= self.rules.capacity):
            self.finish()

    def _token(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        queries = q.reshape(len(self.heads), -1, q.shape[-1])
        outputs, masses = [], []
        self.tokens.append((k, v))
        for h, head in enumerate(self.heads):
            head.raw.append(Row(k[h], v[h], self.seen))
            out, p = self._attend(h, queries[h])
            outputs.append(out)
            masses.append(p.sum(0))
        self.seen += 1
        if self.prompt is None:
            self._add(masses)
            self.staged += 1
            if self.staged == self.rules.staging:
                self._compact(0)
        else:
            self._hold(self.prompt, queries, masses)
        return np.concatenate(outputs)

    def _attend(self, h: int, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of one head's queries [G, D] over all its rows: output [G, Dv] and probabilities [G, rows]."""
        rows, rules = self.heads[h].rows, self.rules
        out, p = twin.attention(
            queries[:, None],
            np.array([r.key for r in rows]),
            np.array([r.value for r in rows]),
            np.array([r.weight for r in rows]),
            np.array([r.spread for r in rows]),
            np.ones((1, len(rows)), bool),
            scale=rules.scale,
            alpha=rules.alpha,
            kappa=rules.kappa,
            sinks=None if rules.sinks is None else rules.sinks[h],
        )
        return out[:, 0], p[:, 0]

    def _hold(self, prompt: Prompt, queries: np.ndarray, masses: list[np.ndarray]) -> None:
        prompt.queries.append(queries)
        prompt.masses.append(masses)
        if len(prompt.queries) % self.rules.piece == 0:
            self._replay(prompt.queries[-self.rules.piece :])
        if len(prompt.queries) == prompt.length:
            self.finish()

    # ---- importance

    def _add(self, masses: Sequence[np.ndarray]) -> None:
        """What a query gives to the rows that it saw, which are the first of those there are now."""
        for head, mass in zip(self.heads, masses, strict=True):
            for row, m in zip(head.rows, mass, strict=False):
                row.score = self.rules.decay * row.score + m

    def _score(self, prompt: Prompt) -> None:
        """The scores of a prompt's tokens and of older ones, by its last queries."""
        taken, window = len(prompt.queries), self.rules.window
        for i, masses in enumerate(prompt.masses):
            counts = window is None or i >= taken - window
            self._add(masses if counts else [np.zeros_like(m) for m in masses])

    def _replay(self, queries: Sequence[np.ndarray]) -> None:
        """The newest tokens, one for each of the queries, are worth what these show from behind them."""
        rules = self.rules
        if rules.turn is None or len(queries) < 2:
            return
        for h, head in enumerate(self.heads):
            piece, others = head.raw[-len(queries) :], head.raw[: -len(queries)]
            keys = np.array([r.key for r in others[:OLDEST] + piece])
            moved = np.concatenate([q[h] @ rules.turn for q in queries])
            with np.errstate(invalid="ignore"):
                logits = rules.scale * moved @ keys.T
                e = np.exp(logits - logits.max(-1, keepdims=True))
                reading = (e / e.sum(-1, keepdims=True)).max(0)[-len(piece) :]
            for row, x in zip(piece, reading, strict=True):
                row.reading = float(x)

    # ---- compaction

    def _compact(self, staged: int, prompt: Prompt | None = None) -> None:
        """All but the newest P tokens and those that stay staged leave the recent store."""
        rules = self.rules
        self.staged, self.closed = staged, self.seen - staged
        leaving = max(0, self.seen - self.departed - rules.proximity - staged)
        before, self.departed = self.departed, self.departed + leaving
        self.compactions += leaving > 0
        for h, (head, context) in enumerate(zip(self.heads, rules.context, strict=True)):
            if leaving and self.departed > rules.residual + context:
                self._compress(h, before <= rules.residual + context, prompt)
            head.raw = self.passed(head.raw)

    def _compress(self, h: int, fresh: bool, prompt: Prompt | None) -> None:
        """Of one head's tokens that left the recent store the most important ones stay."""
        rules, head = self.rules, self.heads[h]
        pool = [r for r in head.raw if r.position < self.departed]
        chosen = self._choose(pool, rules.context[h])
        victims = [r for i, r in enumerate(pool) if i not in chosen]
        head.raw = [pool[i] for i in sorted(chosen)] + head.raw[len(pool) :]
        if rules.fits:
            self._drop(h, victims, fresh, prompt)
        elif rules.residual:
            self._merge(head, self.passed(victims), fresh)

    def passed(self, rows: list[Row]) -> list[Row]:
        """Rows as a compaction leaves them: all but the staged ones are rounded to codes, once."""
        code, stop = self.rules.coded, self.closed
        new = [r for r in rows if code is not None and not r.coded and r.position < stop]
        if code is not None and new:
            keys, values = (code(np.array(x)) for x in ([r.key for r in new], [r.value for r in new]))
            found = {
                r.position: replace(r, key=k, value=v, coded=True) for r, k, v in zip(new, keys, values, strict=True)
            }
            return [found.get(r.position, r) for r in rows]
        return rows

    def _choose(self, pool: list[Row], count: int) -> set[int]:
        worth, _ = self._worth(pool, 0)
        order = sorted(range(len(pool)), key=lambda i: (-worth[i], i))
        inside, outside = order[:count], order[count:]
        least, most = self._worth(pool, CLOSE)
        exact = least == most
        low, high = least[inside][:, None], most[outside][None]
        sure = (low > high) | ((low == high) & exact[inside][:, None] & exact[outside][None])
        self.unsure = self.unsure or not sure.all()
        return set(inside)

    def _worth(self, pool: list[Row], close: float) -> tuple[np.ndarray, np.ndarray]:
        """Importance of rows that compete, at least and at most, if their numbers are right up to a share of them."""
        if self.rules.by == "age":
            age = np.array([-float(r.position) for r in pool])
            return age, age
        score = _about(_pooled([r.score for r in pool], self.rules.pool), close)
        if self.rules.by == "attention":
            return score
        reading = _pooled([r.reading for r in pool], self.rules.pool)
        never = ~(reading > 0)
        most, least = _ranks(*score)
        most_read, least_read = (np.where(never, len(pool), x) for x in _ranks(*_about(reading, close)))
        return -np.minimum(least, least_read).astype(float), -np.minimum(most, most_read).astype(float)

    def _merge(self, head: Head, victims: list[Row], fresh: bool) -> None:
        rules = self.rules
        if fresh:
            groups = [[victims[i] for i in g] for g in twin.cut(len(victims), rules.residual)]
            head.merged = [self._joined(None, g) for g in groups]
            return
        centres = np.array([r.key for r in head.merged])
        joins: list[list[Row]] = [[] for _ in head.merged]
        for row in victims:
            dots = centres @ row.key
            dots = np.where(np.isnan(dots), -np.inf, dots)
            first = int(np.argmax(dots))
            others = np.delete(dots, first)
            if len(others) and others.max() > dots[first] - 10 * CLOSE * max(1.0, abs(dots[first])):
                self.unsure = True
            joins[first].append(row)
        head.merged = [self._joined(row, g) if g else row for row, g in zip(head.merged, joins, strict=True)]

    def _joined(self, old: Row | None, victims: list[Row]) -> Row:
        rows = ([] if old is None else [old]) + victims
        weight = sum(r.weight for r in rows)
        each = [r.sums or (r.key, r.value, float(r.key @ r.key)) for r in rows]
        keys, values, squares = (sum(x) for x in zip(*each, strict=True))
        mean, value = self.rules.rounding(keys / weight), self.rules.rounding(values / weight)
        score = float(np.max([r.score for r in rows]))
        return Row(mean, value, -1, weight, score, 0.0, (keys, values, squares))

    def _drop(self, h: int, victims: list[Row], fresh: bool, prompt: Prompt | None) -> None:
        """Victims are dropped, unless a row is fitted to them and the old one."""
        head, like = self.heads[h], victims[0]
        if fresh:
            nothing = Row(np.zeros_like(like.key), np.zeros_like(like.value), weight=0.0)
            head.merged = [replace(nothing) for _ in range(self.rules.residual)]
        if prompt is None or not head.merged:
            return
        queries = prompt.queries[-self.rules.piece :]
        if len(queries) >= self.rules.fewest:
            self.fits += 1
            old = [r for r in head.merged if r.weight > 0]
            head.merged[0] = self._fitted(old + victims, np.array([q[h] for q in queries]))

    def _fitted(self, victims: list[Row], queries: np.ndarray) -> Row:
        """The row that gives what victims give to queries [W, G, D]."""
        rules, (count, groups, dim) = self.rules, queries.shape
        q = rules.scale * queries.transpose(1, 0, 2).reshape(-1, dim)
        at = np.tile(np.arange(self.seen - count, self.seen), groups)
        each = max(1, len(q) // (4 * (dim + 1)))
        q, at = q[::each], at[::each]
        with np.errstate(divide="ignore", invalid="ignore"):
            logits = q @ np.array([r.key for r in victims]).T + np.log([r.weight for r in victims])
            far = np.array([r.position for r in victims])[None] <= at[:, None] - rules.distance
            p = np.where(far, np.exp(np.where(far, logits, -np.inf)), 0.0)
            y = np.log(p.sum(-1))
            known = np.isfinite(y)
            given = np.where(known[:, None], p / p.sum(-1, keepdims=True), 0.0).sum(0)
        if not known.any():
            return Row(np.zeros(dim), np.zeros_like(victims[0].value), weight=0.0)
        x = np.concatenate([q[known], np.ones((known.sum(), 1))], axis=1)
        ridge = np.diag([RIDGE] * dim + [0.0])
        found = np.linalg.solve(x.T @ x / len(x) + ridge, x.T @ y[known] / len(x))
        value = given @ np.array([r.value for r in victims]) / given.sum()
        return Row(rules.rounding(found[:-1]), rules.rounding(value), weight=math.exp(found[-1] - DISCOUNT))


def _pooled(x: list[float], pool: int) -> np.ndarray:
    """The maximum over neighbours; what is no number is least."""
    values = [-math.inf if math.isnan(v) else v for v in x]
    reach = pool // 2
    return np.array([max(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])


def _about(x: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """x, less and more than it by a share."""
    wide = np.where(np.isfinite(x), np.abs(x), 0) * share
    return x - wide, x + wide


def _ranks(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many others are larger, at least and at most, of numbers between two bounds; equal ones are equal."""
    same = (low[None] == low[:, None]) & (high[None] == high[:, None])
    return (low[None] > high[:, None]).sum(1), ((high[None] > low[:, None]) & ~same).sum(1)
