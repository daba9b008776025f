"""Caches under whatever is done to them equal lists of rows that were written from the method (fuzz_model.py).

A prompt's pieces and windows are short here, so that they end within a few calls.
"""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fuzzed import (
    COUNTS,
    DISTANCE,
    FEWEST,
    GROUP,
    PIECE,
    POLICIES,
    Shape,
    Subject,
    attended,
    check,
    feed,
    identical,
    subject,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from tiny import f64

import zm_mlx
from zm_mlx import phases
from zm_mlx.host import saved
from zm_mlx.host.batch import ZeroMergeBatch
from zm_mlx.ops.plain import fitting
from zm_mlx.policies import Policy

MOST = 3  # caches at a time, and rows of a batch
RULES: list[str] = []

# ---- what is done to them


def step(**drawn):
    """A rule, counted."""

    def made(method):
        RULES.append(method.__name__)

        @functools.wraps(method)
        def counted(self, **values):
            COUNTS["steps"] += 1
            COUNTS[method.__name__] += 1
            method(self, **values)

        return rule(**drawn)(counted)

    return made


seeds = st.integers(0, 10**6)
which = st.integers(0, 10**3)


class Caches(RuleBasedStateMachine):
    """Caches by themselves (``alone``) and in batches, each with its lists."""

    @initialize(
        heads=st.integers(1, 2),
        groups=st.integers(1, 2),
        half=st.booleans(),
        sinks=st.booleans(),
        wide=st.sampled_from([False, False, True]),
        seed=seeds,
    )
    def start(self, heads, groups, half, sinks, wide, seed):
        """Rows can become codes where they are ``wide``."""
        dims = (GROUP, GROUP) if wide else (8, 6)
        self.shape = Shape(heads, groups, mx.float16 if half else mx.float32, None, *dims)
        if sinks:
            drawn = np.random.default_rng(seed).standard_normal(heads * groups)
            self.shape = replace(self.shape, sinks=mx.array(drawn.astype(np.float32)).astype(self.shape.dtype))
        self.alone: list[Subject] = []
        self.batch: tuple[ZeroMergeBatch, list[Subject]] = (ZeroMergeBatch([]), [])
        self.made(name="default", staging=3, residual=1, more=12, table=False, bits=8, seed=seed)
        self.merged(picks=[0, 0])

    def check(self):
        """Compare what has changed, and one of the others: copies must not share what is written."""
        batch, rows = self.batch
        assert batch.offset.tolist() == [x.model.seen for x in rows]
        every = [*self.alone, *rows]
        for n, found in enumerate(every):
            now = (found.cache.layer, found.cache.phase)
            if found.checked is None or any(a is not b for a, b in zip(found.checked, now, strict=True)):
                found.checked = now
            elif n != COUNTS["steps"] % len(every):
                continue
            check(found, self.shape)

    def add(self, found):
        self.alone = [*self.alone[-MOST + 1 :], found]
        self.check()

    def one(self, i):
        return self.alone[i % len(self.alone)]

    @step(
        name=st.sampled_from(sorted(POLICIES)),
        staging=st.integers(1, 5),
        residual=st.integers(0, 3),
        more=st.integers(0, 25),
        table=st.booleans(),
        bits=st.sampled_from([None, 8, 4]),
        seed=seeds,
    )
    def made(self, name, staging, residual, more, table, bits, seed):
        policy = POLICIES[name](staging, residual)
        if bits is not None and self.shape.dim == GROUP:
            policy = replace(policy, kv_bits=bits, kv_group_size=GROUP)
            COUNTS["coded"] += 1
        rows = max(policy.smallest, 6) + more
        if table:
            rows = (rows + np.random.default_rng(seed).integers(0, 9, self.shape.heads)).tolist()
        self.add(subject(self.shape, policy, rows, name != "default, without a turn"))

    @step(i=which, count=st.integers(1, 8), seed=seeds)
    def decode(self, i, count, seed):
        found = self.one(i)
        taken = self.shape.tokens(seed, count)
        out = [feed(found.cache, self.shape, cut(taken, j, j + 1)) for j in range(count)]
        attended(found, self.shape, np.concatenate(out, axis=2)[0], taken, decoding=True)
        self.check()

    @step(i=which, lengths=st.lists(st.integers(2, 30), min_size=1, max_size=2), seed=seeds)
    def prompt(self, i, lengths, seed):
        found = self.one(i)
        for j, length in enumerate(lengths):
            taken = self.shape.tokens(seed + j, length)
            out = feed(found.cache, self.shape, taken)
            attended(found, self.shape, out[0], taken)
            check(found, self.shape)
        self.check()

    @step(
        i=which,
        length=st.integers(1, 30),
        where=st.sampled_from("qkv"),
        number=st.sampled_from([np.nan, np.inf, -np.inf]),
        seed=seeds,
    )
    def poisoned(self, i, length, where, number, seed):
        """A copy meets what is no number, in one place of one token."""
        found = self.one(i).copy()
        found.poisoned = True
        rng = np.random.default_rng(seed)
        taken = dict(zip("qkv", map(np.array, map(f64, self.shape.tokens(seed, length))), strict=True))
        x = taken[where]
        x[0, rng.integers(x.shape[1]), rng.integers(length), rng.integers(x.shape[3])] = (
            number if where == "k" else np.nan
        )
        given = [mx.array(x.astype(np.float32)).astype(self.shape.dtype) for x in taken.values()]
        attended(found, self.shape, feed(found.cache, self.shape, given)[0], given)
        self.add(found)

    @step(i=which, length=st.integers(1, 70))
    def begin_prompt(self, i, length):
        found = self.one(i)
        found.cache.begin_prompt(length)
        found.model.begin(length)
        self.check()

    @step(i=which)
    def finish_prompt(self, i):
        found = self.one(i)
        found.cache.finish_prompt()
        found.model.finish()
        self.check()

    @step(i=which, length=st.integers(1, 9), seed=seeds)
    def cancel_call(self, i, length, seed):
        """An update that is never attended."""
        found = self.one(i)
        _, k, v = self.shape.tokens(seed, length)
        found.cache.update_and_fetch(k, v)
        assert found.cache.pending and found.cache.offset == found.model.seen + length
        found.cache.drop_update()
        self.check()

    @step(i=which)
    def copied(self, i):
        found = self.one(i)
        made = found.copy()
        identical(made.cache, found.cache)
        self.add(made)

    @step(i=which)
    def saved_and_loaded(self, i):
        found = self.one(i)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "a.safetensors")
            zm_mlx.save_prompt_cache(file, [x.cache for x in self.alone], {"note": "x"})
            made, notes = saved.read(file)
        assert notes == {"note": "x"}
        for before, after in zip(self.alone, made, strict=True):
            identical(before.cache, after)
        self.add(found.copy(made[i % len(self.alone)]))

    @step(
        i=which,
        k=st.integers(1, 6),
        calls=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 6)), min_size=1, max_size=3),
        seed=seeds,
    )
    def rolled_back(self, i, k, calls, seed):
        """Calls of (accepted, rejected) tokens: nothing is left of the rejected ones."""
        found = self.one(i)
        with zm_mlx.rollback([found.cache], k):
            for j, (accepted, rejected) in enumerate(calls):
                accepted = min(accepted, k + 1)
                rejected = min(rejected, k + 1 - accepted)
                taken = self.shape.tokens(seed + j, accepted + rejected)
                out = feed(found.cache, self.shape, taken)
                attended(replace(found, model=found.model.copy()), self.shape, out[0], taken, decoding=True)
                assert found.cache.trim(rejected) == rejected
                with np.errstate(invalid="ignore"):
                    found.model.decode(*(f64(x)[0, :, :accepted] for x in taken))
                check(found, self.shape)
        self.check()

    # ---- batches

    @step(picks=st.lists(which, min_size=1, max_size=MOST))
    def merged(self, picks):
        found = [self.one(i) for i in picks]
        batch = found[0].cache.merge([x.cache for x in found])
        self.batch = (batch, [x.copy(row) for x, row in zip(found, batch.rows, strict=True)])
        for x, y in zip(found, self.batch[1], strict=True):
            identical(x.cache, y.cache)
        self.check()

    @step(lengths=st.lists(st.integers(0, 20), min_size=MOST, max_size=MOST), left=st.booleans(), seed=seeds)
    def batch_call(self, lengths, left, seed):
        """A rectangle of tokens with padding on one side, which is no number."""
        batch, found = self.batch
        lengths = lengths[: len(found)]
        width = max(1, *lengths)
        taken = [self.shape.tokens(seed + j, n) for j, n in enumerate(lengths)]
        padding = [width - n for n in lengths]
        if left:
            batch.prepare(left_padding=padding)
        else:
            batch.prepare(lengths=lengths, right_padding=padding)
        sides = [(n, 0) if left else (0, n) for n in padding]
        q, k, v = (
            mx.concatenate([mx.pad(x[c], [(0, 0), (0, 0), s, (0, 0)], constant_values=mx.nan) for x, s in pairs])
            for c in range(3)
            for pairs in [list(zip(taken, sides, strict=True))]
        )
        out = feed(batch, self.shape, (q, k, v))
        batch.finalize()
        for j, (x, n) in enumerate(zip(found, lengths, strict=True)):
            first = padding[j] if left else 0
            assert not np.delete(out[j], np.s_[first : first + n], axis=1).any()
            if n:
                attended(x, self.shape, out[j, :, first : first + n], taken[j])
        self.check()

    @step(count=st.integers(1, 3), seed=seeds)
    def batch_decode(self, count, seed):
        for j in range(count):
            self.batch_call_of_one(seed + 10 * j)

    def batch_call_of_one(self, seed):
        batch, found = self.batch
        taken = [self.shape.tokens(seed + j, 1) for j in range(len(found))]
        out = feed(batch, self.shape, [mx.concatenate(list(x)) for x in zip(*taken, strict=True)])
        for j, x in enumerate(found):
            attended(x, self.shape, out[j], taken[j])
        self.check()

    @step(picks=st.lists(which, min_size=1, max_size=MOST))
    def filtered(self, picks):
        batch, found = self.batch
        picks = [i % len(found) for i in picks]
        batch.filter(picks)
        self.batch = (batch, [found[i].copy(row) for i, row in zip(picks, batch.rows, strict=True)])
        self.check()

    @step(picks=st.lists(which, min_size=1, max_size=2))
    def extended(self, picks):
        batch, found = self.batch
        if len(found) + len(picks) > MOST:
            return
        others = [self.one(i) for i in picks]
        batch.extend(others[0].cache.merge([x.cache for x in others]))
        more = [x.copy(row) for x, row in zip(others, batch.rows[len(found) :], strict=True)]
        self.batch = (batch, [*found, *more])
        self.check()

    @step(i=which)
    def extracted(self, i):
        batch, found = self.batch
        taken = found[i % len(found)]
        made = taken.copy(batch.extract(i % len(found)))
        if made.model.prompt is not None and made.model.prompt.piece:
            made.model.finish()
        self.add(made)

    @step()
    def batch_saved_and_loaded(self):
        batch, found = self.batch
        again = ZeroMergeBatch.from_state(batch.state)
        for x, row in zip(found, again.rows, strict=True):
            identical(x.cache, row)
        self.batch = (again, [x.copy(row) for x, row in zip(found, again.rows, strict=True)])
        self.check()


def cut(taken, begin, end):
    return tuple(x[:, :, begin:end] for x in taken)


# ---- runs


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(phases, "PIECE", PIECE)
    monkeypatch.setattr(phases, "FEWEST", FEWEST)
    monkeypatch.setattr(fitting, "DISTANCE", DISTANCE)
    monkeypatch.setattr(Policy, "window", property(lambda self: None if self.decay == 1 else PIECE))
    COUNTS.clear()


def run(examples: int, steps: int, **more) -> None:
    how = settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **more,
    )
    run_state_machine_as_test(Caches, settings=how)
    assert COUNTS["steps"] >= steps
    # All was done many times, and few choices were too close to be known.
    assert min(COUNTS[name] for name in RULES) >= steps // 400, COUNTS
    assert COUNTS["adopted"] <= steps // 200, COUNTS


def test_whatever_is_done_to_caches_they_equal_lists_of_rows(short):
    run(48, 2000, derandomize=True)


@pytest.mark.exhaustive
def test_whatever_is_done_to_caches_they_equal_lists_of_rows_at_length(short):
    run(500, 20_000)
