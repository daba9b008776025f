"""Every architecture of mlx-lm: served with equal logits, or refused by name; the README lists which."""

import re

import pytest
from architectures import CONFIGS, OTHERS
from model_configs import METAL, architectures
from model_list import README, REFUSED, outcome, written
from test_other_attention import check_after_a_compaction, check_within_the_budget

SERVED = [name for name in architectures() if name not in {*METAL, *OTHERS, *CONFIGS}]


def test_the_readme_lists_what_the_probe_finds():
    """Write it with: python tests/model_list.py"""
    readme = README.read_text()
    assert written(readme) == readme


def test_every_refusal_gives_a_reason_and_none_is_an_accident_of_python():
    for name in architectures():
        kind, reason = outcome(name)
        assert (kind == REFUSED) == bool(reason)
        assert not re.match(r"\w*(Error|Exception)\b", reason), f"{name}: {reason}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SERVED)
def test_every_other_architecture_that_is_served_has_equal_logits(name):
    if outcome(name).kind == REFUSED:
        pytest.skip("refused")
    check_within_the_budget(name, 7)
    check_after_a_compaction(name)
