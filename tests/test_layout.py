"""Rows per head: regions, order and groups of heads, bytes."""

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zm_mlx.policies import Policy
from zm_mlx.state.layout import Group, LayerShape, Layout
from zm_mlx.state.rows import Dense
from zm_mlx.state.state import State

TOKEN = LayerShape(2, 8, 8, 2)


def of(rows, heads, **settings) -> Layout:
    return Policy(**settings).layout(rows, heads)


def test_defaults_divide_rows_as_the_design_says():
    a = of(1024, 8)
    assert (a.residual, a.staging, a.proximity) == (4, 128, 448)  # C = 896, half of it the newest
    assert a.context == (1024 - 4 - 128 - 448,) * 8
    assert a.rows == (1024,) * 8 and a.capacity == 1024 and a.recent == 576


@pytest.mark.parametrize(("rows", "staging"), [(6, 1), (15, 1), (16, 2), (2047, 255), (2048, 256), (100_000, 256)])
def test_staging_is_an_eighth_between_1_and_256(rows, staging):
    assert of(rows, 2).staging == staging


def test_staging_follows_the_mean_of_a_table():
    assert of([16, 48], 2).staging == 4
    assert of([16, 48], 2, staging=7).staging == 7


def test_largest_heads_are_stored_first_and_equal_heads_keep_the_models_order():
    a = of([40, 80, 40, 80, 60], 5)
    assert a.order == (1, 3, 4, 0, 2)
    assert a.rows == (40, 80, 40, 80, 60)
    kept = [n - a.recent for n in (80, 80, 60, 40, 40)]
    assert a.starts == tuple(sum(kept[:i]) for i in range(6))
    assert not a.in_model_order and of([80, 60, 60], 3).in_model_order


def test_equal_heads_are_one_rectangle():
    (group,) = of(64, 3).groups
    assert group == Group(0, 3, 64 - 4 - 28 - 8, 0, 28)
    assert (group.stop_head, group.stop_row) == (3, 84)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(30, 200), min_size=1, max_size=8), st.integers(0, 5), st.floats(0.05, 0.95))
def test_regions_always_add_up(table, residual, proximity):
    a = of(table, len(table), residual=residual, proximity=proximity)
    assert a.rows == tuple(table) and a.capacity == min(table)
    assert min(a.context) >= 0 and a.proximity >= 1 and a.staging >= 1
    heads = [h for g in a.groups for h in range(g.first_head, g.stop_head)]
    assert heads == list(range(len(table))) and sorted(a.order) == heads
    assert a.groups[-1].stop_row == a.starts[-1] == sum(residual + m for m in a.context)
    for g in a.groups:
        assert all(a.context[a.order[h]] == g.context for h in range(g.first_head, g.stop_head))
        assert a.starts[g.first_head] == g.first_row and g.rows == residual + g.context
    assert [g.context for g in a.groups] == sorted({*a.context}, reverse=True)


def test_a_table_of_one_number_is_the_uniform_layout():
    assert of([90] * 4, 4) == of(90, 4)


def test_one_head_may_have_the_floor_and_one_everything():
    a = of([500, 68, 67], 3)
    assert a.staging == 26 and a.rows == (500, 68, 67)
    assert a.proximity == 67 - 4 - 26 and a.context[2] == 0


@pytest.mark.parametrize(("rows", "heads", "more"), [(5, 2, {}), (12, 1, {"residual": 2, "staging": 10})])
def test_too_few_rows_raise_and_name_a_number_that_works(rows, heads, more):
    with pytest.raises(ValueError, match="smallest that works here is") as error:
        of(rows, heads, **more)
    least = int(str(error.value).split("works here is ")[1].split()[0])
    assert of(least, heads, **more).rows == (least,) * heads
    with pytest.raises(ValueError):
        of(least - 1, heads, **more)


@pytest.mark.parametrize("residual", [0, 1, 4, 13, 14, 16, 32, 64])
def test_the_smallest_rows_named_work_for_many_residual_rows(residual):
    with pytest.raises(ValueError, match="smallest that works here is") as error:
        of(1, 2, residual=residual)
    least = int(str(error.value).split("works here is ")[1].split()[0])
    assert min(of(least, 2, residual=residual).context) >= 0
    with pytest.raises(ValueError):
        of(least - 1, 2, residual=residual)


def test_a_small_head_of_a_table_raises():
    with pytest.raises(ValueError, match="a budget of 20 rows per head is too small"):
        of([400, 20], 2)


def test_a_table_for_other_heads_raises():
    with pytest.raises(ValueError, match="needs 3 numbers, one for each KV head, not 2"):
        of([64, 64], 3)


@pytest.mark.parametrize("table", [64, [200, 40, 40]])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("residual", "score"), [(0, "attention"), (4, "reread"), (4, "attention")])
def test_bytes_are_those_of_the_arrays(table, dtype, residual, score):
    a = of(table, 3, residual=residual, score=score)
    for batch in (1, 3):
        arrays = State.empty(a, Dense.zeros((batch, 3, 1), 16, 24, dtype), a.recent).arrays()
        assert a.nbytes(LayerShape(3, 16, 24, dtype.size), batch) == sum(x.nbytes for x in arrays)


def test_a_smaller_head_takes_less_memory():
    whole, part = of([100, 100], 2, staging=8), of([100, 40], 2, staging=8, proximity=14 / 46)
    assert part.nbytes(TOKEN) < whole.nbytes(TOKEN)
    small = of([100, 40], 2, staging=8)
    # Same regions but for the context of one head: its rows, and nothing else, are gone.
    large = Layout(small.residual, (small.context[0],) * 2, small.proximity, small.staging)
    assert large.nbytes(TOKEN) - small.nbytes(TOKEN) == 60 * ((8 + 8) * 2 + 12)
