"""Budgets: every form, floors, errors that name what works, bytes never exceeded."""

import math
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zm_mlx import budget as budgets
from zm_mlx.budget import FRACTION_FLOOR, Budget, Request
from zm_mlx.policies import Policy
from zm_mlx.state.layout import LayerShape

SHAPES = [LayerShape(8, 128, 128, 2)] * 4
MIXED = [LayerShape(8, 128, 128, 2), LayerShape(2, 64, 96, 2)]


DEFAULTS = Policy()


def total(rows, shapes=SHAPES, policy=DEFAULTS):
    return sum(policy.layout(rows, s.heads).nbytes(s) for s in shapes)


class Found(NamedTuple):
    rows: int
    reason: str


def resolve(budget, shapes, policy, **request):
    """Rows per head, which are the same in all layers."""
    found = budgets.resolve(budget, shapes, policy, Request(**request))
    layouts, reason = found.layouts, found.reason
    (rows,) = {n for layout in layouts for n in layout.rows}
    return Found(rows, reason)


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        (0.2, "fraction", 0.2),
        (1.0, "fraction", 1.0),
        ("0.2", "fraction", 0.2),
        (".5", "fraction", 0.5),
        ("1.", "fraction", 1.0),
        (" 1.0 ", "fraction", 1.0),
        (2048, "rows", 2048),
        ("2048", "rows", 2048),
        ("1", "rows", 1),
        ("512MB", "bytes", 512 * 10**6),
        ("1.5GB", "bytes", 1_500_000_000),
        ("1.5 gb", "bytes", 1_500_000_000),
        ("64KB", "bytes", 64_000),
        ("2GiB", "bytes", 2 * 2**30),
        ("512MiB", "bytes", 512 * 2**20),
        ("auto", "auto", 0),
        ("AUTO", "auto", 0),
        (Budget("rows", 7), "rows", 7),
    ],
)
def test_every_form_is_read(given, kind, value):
    assert Budget.parse(given) == Budget(kind, value)


def test_small_fractions_are_read_as_floats():
    assert Budget.parse(1e-05) == Budget("fraction", 1e-05)


def test_numpy_numbers_are_read():
    np = pytest.importorskip("numpy")
    assert Budget.parse(np.float64(0.25)) == Budget("fraction", 0.25)
    assert Budget.parse(np.int64(256)) == Budget("rows", 256)


@pytest.mark.parametrize("given", [float("nan"), float("inf"), -float("inf")])
def test_floats_that_are_no_numbers_raise(given):
    with pytest.raises(ValueError, match="budget of"):
        Budget.parse(given)


@pytest.mark.parametrize("given", ["1.5", 2.0, 0.0, "-0.1", "1.0000001"])
def test_fractions_outside_0_to_1_raise_and_hint_at_integers(given):
    with pytest.raises(ValueError, match=r"not a fraction in \(0, 1.0\]; rows per head are an integer"):
        Budget.parse(given)


@pytest.mark.parametrize("given", ["0", "-5", 0, "0MB", "0.0GB"])
def test_budgets_of_nothing_raise(given):
    with pytest.raises(ValueError, match="holds nothing"):
        Budget.parse(given)


@pytest.mark.parametrize("given", ["", "5%", "12 parsecs", "512M", "GB", "1e9", "nan", True])
def test_anything_else_raises_and_names_the_forms(given):
    with pytest.raises(ValueError, match=r"'auto', a fraction of the prompt .* rows per head .* or bytes"):
        Budget.parse(given)


@pytest.mark.parametrize("text", ["auto", "0.2", "2048"])
def test_a_budget_prints_as_a_user_writes_it(text):
    assert str(Budget.parse(text)) == text


@pytest.mark.parametrize("given", ["auto", "0.123456789", "2048", "1.5GB", "512MiB"])
def test_what_a_budget_prints_is_read_again(given):
    assert Budget.parse(str(Budget.parse(given))) == Budget.parse(given)


def test_rows_are_taken_as_they_are():
    assert resolve(Budget.parse(1000), SHAPES, Policy()).rows == 1000


def test_rows_below_the_smallest_raise_and_name_it():
    with pytest.raises(ValueError, match="a budget of 5 rows per head is too small: the smallest that works here is 6"):
        resolve(Budget.parse(5), SHAPES, Policy())
    assert resolve(Budget.parse(6), SHAPES, Policy()).rows == 6


def test_a_fraction_is_of_the_tokens_at_the_end_of_the_prompt():
    assert resolve(Budget.parse(0.2), SHAPES, Policy(), prompt_tokens=5000).rows == 1000
    assert resolve(Budget.parse(0.2), SHAPES, Policy(), prompt_tokens=5001).rows == 1001
    assert resolve(Budget.parse(1.0), SHAPES, Policy(), prompt_tokens=5000).rows == 5000


def test_a_fraction_is_not_rounded_up_by_its_binary_form():
    assert 0.07 * 10_000 > 700
    assert resolve(Budget.parse(0.07), SHAPES, Policy(), prompt_tokens=10_000).rows == 700


@pytest.mark.parametrize("prompt", [1, 64, 320])
def test_a_fraction_has_a_floor_and_says_so(prompt):
    found = resolve(Budget.parse(0.2), SHAPES, Policy(), prompt_tokens=prompt)
    assert found.rows == FRACTION_FLOOR == 64
    if prompt < 320:
        assert "64 is the least" in found.reason and str(prompt) in found.reason
    assert resolve(Budget.parse(0.2), SHAPES, Policy(), prompt_tokens=325).rows == 65


def test_a_fraction_without_a_prompt_raises_and_names_the_argument():
    with pytest.raises(ValueError, match="prompt_length must be given"):
        resolve(Budget.parse(0.2), SHAPES, Policy())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    given=st.integers(40_000, 10**9),
    shapes=st.sampled_from([SHAPES, MIXED, SHAPES[:1]]),
    policy=st.sampled_from([Policy(), Policy(residual=0), Policy(residual=3, proximity=0.1), Policy(staging=32)]),
    other=st.sampled_from([0, 12_345]),
)
def test_bytes_are_never_exceeded_and_never_wasted(given, shapes, policy, other):
    budget = Budget("bytes", given)
    if given < total(policy.smallest, shapes, policy) + other:
        with pytest.raises(ValueError, match="smallest that works"):
            resolve(budget, shapes, policy, other_bytes=other)
        return
    rows = resolve(budget, shapes, policy, other_bytes=other).rows
    assert total(rows, shapes, policy) + other <= given < total(rows + 1, shapes, policy) + other


def test_too_few_bytes_raise_and_name_a_number_that_works():
    with pytest.raises(ValueError, match=r"a budget of 10,000 bytes is too small .* smallest that works is") as error:
        resolve(Budget.parse("10KB"), SHAPES, Policy(), other_bytes=77)
    least = int(str(error.value).split("works is ")[1].split()[0].replace(",", ""))
    assert resolve(Budget("bytes", least), SHAPES, Policy(), other_bytes=77).rows == 6
    with pytest.raises(ValueError):
        resolve(Budget("bytes", least - 1), SHAPES, Policy(), other_bytes=77)


@pytest.mark.parametrize("residual", [0, 1, 4, 13, 14, 16, 32, 64])
def test_the_smallest_rows_work_for_any_number_of_residual_rows(residual):
    policy = Policy(residual=residual)
    policy.layout(policy.smallest, SHAPES[0].heads)
    assert resolve(Budget.parse("1GB"), SHAPES, policy).rows > 64


def test_auto_is_the_least_of_memory_request_and_context():
    p, auto = Policy(), Budget.parse("auto")
    found = resolve(auto, SHAPES, p, prompt_tokens=1000, new_tokens=100, model_context=4096, free_bytes=10**12)
    assert (found.rows, found.reason) == (1100, "auto: prompt and new tokens")
    found = resolve(auto, SHAPES, p, prompt_tokens=10**6, new_tokens=100, model_context=4000, free_bytes=10**12)
    assert (found.rows, found.reason) == (4000, "auto: the model's context")
    found = resolve(auto, SHAPES, p, prompt_tokens=10**6, model_context=10**6, free_bytes=total(3000))
    assert (found.rows, found.reason) == (3000, "auto: what memory allows")
    found = resolve(auto, SHAPES, p, prompt_tokens=10**6, free_bytes=total(3000) + 10**6, other_bytes=10**6)
    assert found.rows == 3000


def test_auto_keeps_all_of_a_request_that_fits_and_allocates_no_more():
    for tokens in (1, 2, 7, 255, 256, 5000):
        found = resolve(Budget.parse("auto"), SHAPES, Policy(), prompt_tokens=tokens, new_tokens=3, free_bytes=10**12)
        assert found.rows == max(tokens + 3, Policy().smallest)


def test_auto_with_no_memory_at_all_still_gives_rows_that_work():
    found = resolve(Budget.parse("auto"), SHAPES, Policy(), prompt_tokens=10**5, free_bytes=0)
    assert found.rows == Policy().smallest


def test_auto_with_one_limit_alone_uses_it():
    assert resolve(Budget.parse("auto"), SHAPES, Policy(), model_context=2048).rows == 2048
    assert resolve(Budget.parse("auto"), SHAPES, Policy(), free_bytes=total(512)).rows == 512


def test_auto_without_any_limit_raises():
    with pytest.raises(ValueError, match="auto needs"):
        resolve(Budget.parse("auto"), SHAPES, Policy())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("residual", -1),
        ("proximity", 0.0),
        ("proximity", 1.0),
        ("staging", 0),
        ("alpha", -0.1),
        ("kappa", -1.0),
        ("decay", 0.0),
        ("decay", 1.1),
        ("pool", 0),
        ("pool", 4),
        *[(name, x) for name in ("proximity", "alpha", "kappa", "decay") for x in (math.nan, math.inf, -math.inf, "1")],
        *[(name, x) for name in ("residual", "staging", "pool") for x in (1.0, math.nan, "3")],
    ],
)
def test_settings_outside_their_range_raise_and_name_themselves(setting, value):
    with pytest.raises(ValueError, match=setting):
        Policy(**{setting: value})
