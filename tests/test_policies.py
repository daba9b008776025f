"""Policies: another method is a subclass, and nothing computes what it replaced."""

from dataclasses import dataclass

import mlx.core as mx
import pytest
import tiny
from tiny import assert_same_state, give, held, tokens

from zm_mlx import Policy
from zm_mlx.host.cache import ZeroMergeCache
from zm_mlx.ops import check, choose
from zm_mlx.policies import BY_NAME, Paper, selection
from zm_mlx.state.state import Scores


@dataclass(frozen=True)
class Oldest(Policy):
    """Keeps the oldest tokens."""

    residual: int = 0

    def select(self, importance: mx.array, count: int) -> tuple[mx.array, mx.array]:
        return selection.select(-mx.cumsum(mx.ones_like(importance), axis=-1), count, 1)


@dataclass(frozen=True)
class Lengths(Policy):
    """Keeps the tokens whose keys are shortest, whatever attention they got."""

    residual: int = 0
    pool: int = 1

    def importance(self, state, layout):
        of = lambda keys: -(keys.astype(mx.float32) ** 2).sum(axis=-1)  # noqa: E731
        return Scores(of(state.kept.rows.keys), of(state.recent.keys))


def context_of(cache, head=0):
    rows = held(cache, head)
    return rows.position.tolist()[: -cache.layer.filled]


def test_a_selection_of_its_own_decides_what_stays():
    cache = tiny.cache(20, policy=Oldest(staging=3))
    give(cache, *tokens(1, 90), 7)
    assert context_of(cache) == list(range(cache.layout.context[0]))


def test_an_importance_of_its_own_decides_what_stays():
    q, k, v = tokens(1, 90)
    cache = tiny.cache(20, policy=Lengths(staging=3))
    give(cache, q, k, v, 7)
    left_recent = 90 - cache.layer.filled
    lengths = (k[0, 0, :left_recent] ** 2).sum(axis=-1)
    shortest = sorted(mx.argsort(lengths)[: cache.layout.context[0]].tolist())
    assert context_of(cache) == shortest


@dataclass(frozen=True)
class Weightless(Policy):
    """A merged row counts as one token."""

    def log_mass(self, weight: mx.array) -> mx.array:
        return mx.where(weight > 0, 0, -mx.inf)


@pytest.mark.parametrize(("name", "policy"), [("compact", Oldest()), ("attend", Weightless())])
def test_no_kernel_computes_what_a_policy_replaced(monkeypatch, name, policy):
    monkeypatch.setattr(choose, "_verified", lambda *_: True)
    given = check.problem(name, check.Case(mx.float16, 64, 64, 2))
    call = None if name == "compact" else given.call
    assert choose.Operations(given.layout, Policy(), "metal")._on_metal(name, given.state, call)
    assert not choose.Operations(given.layout, policy, "metal")._on_metal(name, given.state, call)


def test_the_papers_policy_is_its_equations_and_survives_saving():
    assert BY_NAME["paper"] is Paper and (Paper().kappa, Paper().pool, Paper().alpha, Paper().decay) == (0, 1, 1, 0.98)
    cache, same = tiny.cache(20, policy=Paper(staging=3)), tiny.cache(20, policy=Policy(kappa=0, pool=1, staging=3))
    for c in (cache, same):
        give(c, *tokens(1, 90), 7)
    assert_same_state(cache, same)
    again = ZeroMergeCache.from_state(cache.state)
    assert again.policy == Paper(staging=3) and type(again.policy) is Paper


def test_a_state_of_a_policy_that_is_not_here_is_refused_by_name():
    cache = tiny.cache(20, policy=Oldest(staging=3))
    give(cache, *tokens(1, 30))
    with pytest.raises(ValueError, match="policy 'Oldest', which is none of zeromerge, "):
        ZeroMergeCache.from_state(cache.state)
