"""Caches beside the lists of rows that they must equal (fuzz_model.py), for tests that do anything to them."""

import copy
from collections import Counter
from dataclasses import dataclass, replace

import fuzz_model
import mlx.core as mx
import numpy as np
import tiny
from tiny import f64

from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.policies import Paper, Policy, ZeroMerge
from zm_mlx.policies.streaming_llm import StreamingLLM

PIECE, FEWEST, DISTANCE = 24, 9, 5  # in place of 512, 128 and 64
GROUP = 32  # numbers that share a scale, where rows become codes
TURNS = {n: np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0].astype(np.float32) for n in (8, GROUP)}
TOLERANCE = {mx.float32: 1e-4, mx.float16: 4e-3}
COUNTS: Counter = Counter()

POLICIES = {
    "default": lambda s, r: ZeroMerge(staging=s, residual=min(r, 2), newest=4),
    "default, without a turn": lambda s, r: ZeroMerge(staging=s, residual=min(r, 2)),
    "paper": lambda s, r: Paper(staging=s, residual=r),
    "compensated": lambda s, r: Policy(staging=s, residual=r, pool=3),
    "all queries": lambda s, r: Policy(staging=s, residual=r, decay=1.0, alpha=0.6),
    "sinks": lambda s, r: StreamingLLM(staging=s),
}


@dataclass(frozen=True)
class Shape:
    """What all caches of one run have in common."""

    heads: int
    groups: int
    dtype: mx.Dtype
    sinks: mx.array | None = None
    dim: int = 8
    value_dim: int = 6

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def row_bytes(self) -> int:
        return (self.dim + self.value_dim) * self.dtype.size

    def coded_bytes(self, bits: int) -> int:
        """Of a row: codes, and a scale and a bias for each group."""
        return (self.dim + self.value_dim) * bits // 8 + 2 * self.dtype.size * (self.dim + self.value_dim) // GROUP

    def coded(self, bits: int):
        """What is left of rows [n, .]."""

        def left(x: np.ndarray) -> np.ndarray:
            codes, *shared = mx.quantize(mx.array(x.astype(np.float32)).astype(self.dtype), GROUP, bits)
            return f64(mx.dequantize(codes, *(y.astype(mx.float32) for y in shared), group_size=GROUP, bits=bits))

        return left

    def tokens(self, seed: int, length: int):
        """Queries, keys and values as a model brings them."""
        made = tiny.tokens(seed, length, heads=self.heads, groups=self.groups, dim=self.dim, value_dim=self.value_dim)
        return tuple(x.astype(self.dtype) for x in made)


@dataclass
class Subject:
    """A cache, and the lists that it must equal."""

    cache: ZeroMergeCache
    model: fuzz_model.Layer
    poisoned: bool = False  # it met what is no number
    checked: tuple | None = None  # state and phase that were compared last

    def copy(self, cache=None) -> "Subject":
        cache = copy.deepcopy(self.cache) if cache is None else cache
        return Subject(cache, self.model.copy(), self.poisoned)


def subject(shape: Shape, policy: Policy, rows, turned: bool) -> Subject:
    turn = TURNS[shape.dim] if turned else None
    cache = ZeroMergeCache(
        policy.layout(rows, shape.heads), policy=policy, turn=None if turn is None else mx.array(turn)
    )
    layout = cache.layout
    assert layout.rows == (tuple(rows) if isinstance(rows, list) else (rows,) * shape.heads)
    by = "age" if isinstance(policy, StreamingLLM) else "union" if policy.score == "replay" else "attention"
    rules = fuzz_model.Rules(
        layout.residual,
        layout.context,
        layout.proximity,
        layout.staging,
        shape.scale,
        alpha=policy.alpha,
        kappa=policy.kappa,
        decay=policy.decay,
        pool=policy.pool,
        by=by,
        fits=isinstance(policy, ZeroMerge),
        turn=turn.astype(np.float64) if turn is not None and policy.score == "replay" else None,
        piece=PIECE,
        window=1 if by == "age" else None if policy.decay == 1 else PIECE,
        fewest=FEWEST,
        distance=DISTANCE,
        sinks=None if shape.sinks is None else f64(shape.sinks).reshape(shape.heads, -1),
        rounding=tiny.rounding(shape.dtype),
        coded=None if policy.kv_bits is None else shape.coded(policy.kv_bits),
    )
    return Subject(cache, fuzz_model.Layer(rules))


# ---- what a cache must equal


def rows_of(cache: ZeroMergeCache, arrays: dict[str, np.ndarray], h: int) -> dict[str, np.ndarray]:
    """The filled rows of one of the model's heads, kept ones first."""
    state, layout = cache.layer, cache.layout
    stored = layout.order.index(h)
    begin, end = layout.starts[stored : stored + 2]
    kept, filled = slice(begin, min(end, begin + state.departed)), state.filled
    recent = {"weight": np.ones(filled), "position": np.arange(state.departed, state.seen)}
    recent |= {name: arrays[f"recent {name}"][stored, :filled] for name in ("keys", "values", "score")}
    names = list(recent)
    if state.reads:
        names.append("reading")
        recent["reading"] = arrays["recent reading"][stored, :filled]
    return {name: np.concatenate([arrays[name][kept], recent[name]]) for name in names}


def arrays_of(cache: ZeroMergeCache) -> dict[str, np.ndarray]:
    state = cache.layer
    kept = [state.kept.of(g, state.departed).rows.dense() for g in cache.layout.groups]
    keys, values = (mx.concatenate([y.flatten(1, 2) for y in x], axis=1) for x in zip(*kept, strict=True))
    recent = state.recent.dense()
    found = {
        "keys": keys,
        "values": values,
        "weight": state.kept.weight,
        "position": state.kept.position,
        "score": state.scores.kept,
        "recent keys": recent.keys,
        "recent values": recent.values,
        "recent score": state.scores.recent,
        "key sums": state.residuals.key_sum,
        "value sums": state.residuals.value_sum,
        "square sums": state.residuals.square_sum,
    }
    if state.reads:
        found |= {"reading": state.reading.kept, "recent reading": state.reading.recent}
    found = {name: x.astype(mx.float32) for name, x in found.items()}
    mx.eval(found)  # all at once
    return {name: np.array(x)[0].astype(np.float64) for name, x in found.items()}


def check(found: Subject, shape: Shape) -> None:
    """Everything that can be seen of a cache."""
    cache, model = found.cache, found.model
    assert cache.offset == model.seen
    prompt = model.prompt
    exact = prompt is not None and not prompt.piece
    assert cache.prefill == ("exact" if exact else "streaming")
    assert cache.remaining == (prompt.length - len(prompt.queries) if exact else None)
    assert cache.empty() == (cache.layer is None)
    if cache.layer is None:
        assert not model.seen
        return
    check_bytes(found, shape)
    arrays = arrays_of(cache)
    rows = [rows_of(cache, arrays, h) for h in range(shape.heads)]
    assert cache.size() == max(len(r["weight"]) for r in rows)
    if found.poisoned:  # there is more that is no number, by products of matrices
        adopt(found, rows, arrays)
    elif model.unsure:
        COUNTS["unsure"] += 1
        pairs = zip(rows, model.heads, strict=True)
        if any(r["position"].tolist() != [x.position for x in head.rows] for r, head in pairs):
            COUNTS["adopted"] += 1
            adopt(found, rows, arrays)
    model.unsure = False
    for h, head in enumerate(model.heads):
        if model.rules.by == "age":
            sinks = min(4, model.rules.context[h], model.seen)
            assert rows[h]["position"][:sinks].tolist() == list(range(sinks))
        check_rows(rows[h], head, found, shape)


def check_bytes(found: Subject, shape: Shape) -> None:
    cache, model = found.cache, found.model
    rules, bits, prompt = model.rules, cache.policy.kv_bits, model.prompt
    scores = 4 * (2 if cache.layer.reads else 1)  # by attention, by reading
    row = passed = shape.row_bytes
    if bits is not None:
        passed = shape.coded_bytes(bits)
    # Codes take room as they come; what a compaction has not passed, none of them.
    closed = (
        rules.proximity if bits is None else sum(r.coded for r in model.heads[0].raw if r.position >= model.departed)
    )
    kept = shape.heads * rules.residual + sum(rules.context)
    budget = kept * (passed + 8 + scores) + shape.heads * (rules.staging * (row + scores) + closed * (passed + scores))
    budget += shape.heads * rules.residual * 4 * (shape.dim + shape.value_dim + 2)
    if bits is not None:
        budget += shape.heads * rules.residual * row  # which are no codes
    if prompt is None:
        assert cache.nbytes == budget
    elif model.seen:
        queries = shape.heads * shape.groups * shape.dim * shape.dtype.size * min(PIECE, max(1, len(prompt.queries)))
        sinks = 0 if shape.sinks is None else shape.sinks.nbytes
        assert cache.nbytes <= budget + prompt.length * shape.heads * (row + scores) + queries + sinks


def check_rows(rows: dict[str, np.ndarray], head: fuzz_model.Head, found: Subject, shape: Shape) -> None:
    model, rules = found.model, found.model.rules
    position, weight = rows["position"].tolist(), rows["weight"]
    assert position == [r.position for r in head.rows]
    raw = [p for p in position if p >= 0]
    newest = min(len(raw), rules.proximity)
    assert raw == sorted(set(raw)) and raw[len(raw) - newest :] == list(range(model.seen - newest, model.seen))
    if rules.residual and not rules.fits:
        assert weight.sum() == model.seen
    merged = len(head.merged)
    expected = {x: np.array([getattr(r, x) for r in head.rows]) for x in ("key", "value", "weight", "score", "reading")}
    for name in ("key", "value"):
        same(rows[name + "s"][merged:], expected[name][merged:], 0)
    same(weight[merged:], expected["weight"][merged:], 0)
    check_residuals(rows, expected, head, found, shape)
    if model.prompt is None:
        ranked = slice(merged if rules.fits else 0, None)  # a fitted row competes with nothing
        same(rows["score"][ranked], expected["score"][ranked], 2e-4)
        if "reading" in rows:
            same(rows["reading"], expected["reading"], 2e-4)


def check_residuals(rows, expected, head: fuzz_model.Head, found: Subject, shape: Shape) -> None:
    fits, tolerance = found.model.rules.fits, 30 * TOLERANCE[shape.dtype]
    there = [i for i, r in enumerate(head.merged) if r.weight > 0]
    if not (fits and found.poisoned):
        same(rows["weight"][: len(head.merged)], expected["weight"][: len(head.merged)], 0.02 if fits else 0)
        for name in ("key", "value"):
            same(rows[name + "s"][there], expected[name][there] if there else np.zeros(0), tolerance)
    if fits:  # go on from its float32
        for i, r in enumerate(head.merged):
            r.key, r.value, r.weight = rows["keys"][i], rows["values"][i], float(rows["weight"][i])


def same(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Equal up to a tolerance, also in what is no number; numpy's own test is slow where all is well."""
    if found.size == expected.size == 0:
        return
    if found.shape == expected.shape:
        with np.errstate(invalid="ignore"):
            close = np.abs(found - expected) <= tolerance * (1 + np.abs(expected))
        if close.all():
            return
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)


def adopt(found: Subject, rows, arrays) -> None:
    """Go on from the tokens that the cache chose; how many there are, and what they are, is no choice."""
    model, layout = found.model, found.cache.layout
    for h, head in enumerate(model.heads):
        columns = [rows[h][x] for x in ("keys", "values", "position", "weight", "score")]
        columns.append(rows[h].get("reading", np.zeros(len(columns[0]))))
        made = [fuzz_model.Row(k, v, int(p), *map(float, more)) for k, v, p, *more in zip(*columns, strict=True)]
        merged, raw = [r for r in made if r.position < 0], [r for r in made if r.position >= 0]
        assert (len(merged), len(raw)) == (len(head.merged), len(head.raw))
        came = [fuzz_model.Row(*(x[h] for x in model.tokens[r.position]), r.position) for r in raw]
        for i, (r, row) in enumerate(zip(raw, model.passed(came), strict=True)):
            same(r.key, row.key, 0)
            same(r.value, row.value, 0)
            raw[i] = replace(r, coded=row.coded)
        if not model.rules.fits:
            sums = [arrays[f"{x} sums"][layout.order.index(h)] for x in ("key", "value", "square")]
            merged = [replace(r, sums=(k, v, float(n))) for r, k, v, n in zip(merged, *sums, strict=False)]
        head.merged, head.raw = merged, raw


def identical(a: ZeroMergeCache, b: ZeroMergeCache) -> None:
    """Bit by bit."""
    one, other = ([x for x in c.state if x is not None] for c in (a, b))
    assert len(one) == len(other) and one[-1] == other[-1]
    assert [x.dtype for x in one[:-1]] == [x.dtype for x in other[:-1]]
    if one[:-1]:
        equal = [mx.array_equal(x, y, equal_nan=True) for x, y in zip(one[:-1], other[:-1], strict=True)]
        assert mx.stack(equal).all()


def feed(cache, shape: Shape, taken) -> np.ndarray:
    """One call of attention: [B, Hq, L, Dv]."""
    q, k, v = taken
    keys, values = cache.update_and_fetch(k, v)
    out = cache.attend(q, keys, values, shape.scale, shape.sinks)
    mx.eval(out)
    return f64(out)


def attended(found: Subject, shape: Shape, out: np.ndarray, taken, decoding: bool = False) -> None:
    """The lists take the tokens too; the cache's output [Hq, L, Dv] must be theirs."""
    model, before = found.model, found.model.compactions
    with np.errstate(invalid="ignore"):
        expected = (model.decode if decoding else model.call)(*(f64(x)[0] for x in taken))
    if found.poisoned:
        # In a product of matrices the neighbours of what is no number become no numbers, too, and so may a choice.
        if model.compactions == before:
            there = np.isfinite(out)
            assert np.isfinite(expected[there]).all()
            same(out[there], expected[there], TOLERANCE[shape.dtype])
    elif not model.unsure:
        same(out, expected, TOLERANCE[shape.dtype])
