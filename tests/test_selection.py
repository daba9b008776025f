"""Selection (zm_mlx/ops/plain/selection.py) against the float64 twin."""

import mlx.core as mx
import numpy as np
import twin
from hypothesis import given, settings
from hypothesis import strategies as st

from zm_mlx.policies.selection import select


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.sampled_from([1, 3, 5, 13]), st.data())
def test_select_pools_and_gives_ties_to_the_older(score, pool, data):
    count = data.draw(st.integers(0, len(score)))
    chosen, victims = select(mx.array([score], mx.float32), count, pool)
    expected, others = twin.select([float(s) for s in score], count, pool)
    assert chosen.tolist() == [expected]
    assert victims.tolist() == [others]


def test_select_chooses_for_each_head_by_itself():
    score = np.random.default_rng(0).random((2, 3, 40))
    chosen, victims = select(mx.array(score.astype(np.float32)), 11, 5)
    for b in range(2):
        for h in range(3):
            expected, others = twin.select(score[b, h].tolist(), 11, 5)
            assert chosen[b, h].tolist() == expected
            assert victims[b, h].tolist() == others


def test_large_scores_and_small_ones_do_not_tie():
    score = mx.array([[1e-12, 3e-12, 2e-12, 1e6, 0.0]])
    assert select(score, 3, 1)[0].tolist() == [[1, 2, 3]]
