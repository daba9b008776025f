"""Tables of rows per KV head: rows and bytes stay what the budget says, and no table is used for another model."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zm_mlx.budget import Budget, Request, resolve, total_bytes
from zm_mlx.calibration import table as tables
from zm_mlx.calibration.table import Table, TableError, apportion, kept_fraction, uniform_part
from zm_mlx.policies import Policy
from zm_mlx.state.layout import LayerShape

SHAPES = [LayerShape(2, 16, 16, 4)] * 3
MIXED = [LayerShape(2, 16, 16, 4), LayerShape(3, 32, 16, 4), LayerShape(2, 16, 16, 4)]
FEW = ((0.5, 2.5), (0.0, 1.5), (1.0, 0.5))
MANY = ((0.75, 1.75), (0.5, 1.25), (1.0, 0.75))
TABLE = Table("f" * 32, "tiny", {"tokens": 64, "texts": 2}, ((0.1, FEW), (0.4, MANY)))


def uniform(rows, shapes=SHAPES, **settings):
    policy = Policy(**settings)
    return tuple(policy.layout(rows, s.heads) for s in shapes)


def of(shares, *fractions):
    return replace(TABLE, points=tuple((f, shares) for f in fractions))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.integers(6, 3000),
    tokens=st.none() | st.integers(1, 20_000),
    shapes=st.sampled_from([SHAPES, MIXED]),
    data=st.data(),
)
def test_rows_and_bytes_are_exactly_those_of_the_uniform_budget(rows, tokens, shapes, data):
    heads = [s.heads for s in shapes]
    flat = data.draw(st.lists(st.integers(0, 9), min_size=sum(heads), max_size=sum(heads)).filter(any))
    shares = iter([x * len(flat) / sum(flat) for x in flat])
    table = of(tuple(tuple(next(shares) for _ in range(n)) for n in heads), 0.05, 0.3)
    even = uniform(rows, shapes)
    found = table.layouts(even, shapes, tokens)
    assert sum(sum(a.rows) for a in found) == sum(sum(a.rows) for a in even)
    assert total_bytes(found, shapes) == total_bytes(even, shapes)
    for a, b in zip(found, even, strict=True):  # the newest tokens are not what a table is about
        assert (a.residual, a.proximity, a.staging) == (b.residual, b.proximity, b.staging)
        assert min(a.context) >= 0 and min(a.rows) >= Policy().smallest - 1 and a.heads == b.heads


def test_layers_whose_rows_cost_different_bytes_do_not_trade_rows():
    table = of(((3.0, 3.0), (0.0, 0.0, 0.0), (0.5, 0.5)), 0.1)
    even = uniform(400, MIXED)
    found = table.layouts(even, MIXED, 4000)
    assert sum(found[1].context) == sum(even[1].context)
    assert found[0].context[0] > 2 * found[2].context[0]


def test_rows_follow_the_shares_and_a_part_is_the_same_for_all(monkeypatch):
    monkeypatch.setattr(tables, "UNIFORM", ((32, 1.0), (100, 0.25)))
    even = uniform(1600)
    mean = even[0].context[0]
    found = TABLE.layouts(even, SHAPES, 10 * mean + sum(even[0].rows[:1]) - mean)
    for layer, shares in zip(found, FEW, strict=True):
        assert layer.context == pytest.approx([mean * (0.25 + 0.75 * x) for x in shares], abs=1)


def test_the_fewer_the_rows_the_more_alike_the_heads():
    assert [uniform_part(n) for n in (6, 32, 64, 200, 10_000)] == [1, 1, 0.5, 0.2, 0.2]
    assert 0.5 < uniform_part(48) < 1 and 0.2 < uniform_part(120) < 0.5
    assert len({n for a in TABLE.layouts(uniform(30), SHAPES, 10_000) for n in a.rows}) == 1


def test_shares_between_fractions_add_up_and_grow_no_head_backwards():
    rows = [[f * x for layer in TABLE.shares(f) for x in layer] for f in (0.05, 0.1, 0.2, 0.3, 0.4, 0.7, 1.0)]
    for f, kept in zip((0.05, 0.1, 0.2, 0.3, 0.4, 0.7, 1.0), rows, strict=True):
        assert sum(kept) / 6 == pytest.approx(f)
        assert max(kept) <= 1 + 1e-9  # of the tokens: nobody keeps more than there are
    assert all(a <= b + 1e-9 for less, more in pairwise(rows) for a, b in zip(less, more, strict=True))
    for f, shares in ((0.01, FEW), (0.1, FEW), (0.4, MANY), (1.0, ((1.0, 1.0),) * 3)):
        assert sum(TABLE.shares(f), ()) == pytest.approx(sum(shares, ()))


def test_a_budget_that_holds_nearly_all_tokens_is_nearly_uniform():
    even = uniform(400)
    assert kept_fraction(even, 400) == 1 and kept_fraction(even, 1) == 1
    assert TABLE.layouts(even, SHAPES, 400) == even
    nearly = TABLE.layouts(even, SHAPES, 404)
    assert nearly != even
    for a, b in zip(nearly, even, strict=True):
        assert a.rows == pytest.approx(b.rows, rel=0.06)


def test_unknown_tokens_stand_for_a_tenth():
    even = uniform(800)
    tokens = 10 * even[0].context[0] + 800 - even[0].context[0]
    assert kept_fraction(even, tokens) == pytest.approx(0.1)
    assert TABLE.layouts(even, SHAPES) == TABLE.layouts(even, SHAPES, tokens)


@pytest.mark.parametrize("budget", [0.2, 409, "300KB"])
def test_a_table_shares_out_a_budget_of_any_kind(budget):
    even = resolve(Budget.parse(budget), SHAPES, Policy(), Request(prompt_tokens=2048)).layouts
    found = TABLE.layouts(even, SHAPES, 2048)
    assert found != even and total_bytes(found, SHAPES) == total_bytes(even, SHAPES)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**9), st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_apportioned_rows_lose_none(total, weights):
    rows = apportion(total, weights)
    assert sum(rows) == total and min(rows) >= 0
    if sum(weights) > 1e-3:
        assert all(
            abs(n - total * w / math.fsum(weights)) <= 1 + 1e-9 * total for n, w in zip(rows, weights, strict=True)
        )


def test_a_table_of_other_layers_or_heads_is_refused():
    for shapes in (SHAPES[:2], MIXED):
        with pytest.raises(TableError, match=r"3 layers of 2 KV heads.*python -m zm_mlx\.calibrate"):
            TABLE.layouts(uniform(400, shapes), shapes, 4000)


def test_a_table_comes_back_from_its_file(tmp_path):
    file = tmp_path / "table.json"
    TABLE.write(file)
    found = Table.read(file)
    assert found == TABLE and found.source == str(file) and str(file) in found.words
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def damaged(**changes):
    return json.dumps({**json.loads(TABLE.text()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "\xff",
        TABLE.text()[:-20],
        damaged(format=2),
        damaged(shares={}),
        damaged(shares=[]),
        damaged(shares={"0.1": []}),
        damaged(shares={"0.1": [1.0, 1.0]}),
        damaged(shares={"0.1": [["a"]]}),
        damaged(shares={"1.5": [[1.0]]}),
        damaged(shares={"x": [[1.0]]}),
        damaged(shares={"0.1": [[float("nan")]]}),
        damaged(shares={"0.1": [[-1.0, 3.0]]}),
        damaged(shares={"0.1": [[3.0, 3.0]]}),
        damaged(shares={"0.1": [[1.0]], "0.2": [[1.0, 1.0]]}),
        damaged(made=3),
        json.dumps({"format": 1}),
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_refused_by_name_and_with_the_remedy(tmp_path, text):
    file = tmp_path / "table.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(TableError, match=r"table\.json .*python -m zm_mlx\.calibrate"):
        Table.read(file)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TableError, match=r"nothing\.json cannot be read"):
        Table.read(tmp_path / "nothing.json")
    with pytest.raises(TableError, match="cannot be read"):
        Table.read(tmp_path)
