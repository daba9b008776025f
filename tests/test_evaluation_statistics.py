"""Means, errors and tables: the numbers that are published must be those of the textbook, paired as they say."""

import statistics
from itertools import pairwise

import numpy as np
import pytest
from evaluated import record

from zm_mlx.evaluation.figure import apart
from zm_mlx.evaluation.statistics import difference, estimate
from zm_mlx.evaluation.summary import Results, tables
from zm_mlx.evaluation.task import Metric

RNG = np.random.default_rng(0)
DOCUMENTS, SEEDS = 7, 3
WINDOW = {(f"prose {d}", s, 0): float(RNG.normal(d, 0.1)) for d in range(DOCUMENTS) for s in range(SEEDS)}
OURS = {item: x - 0.5 + float(RNG.normal(0, 0.2)) for item, x in WINDOW.items()}


def naive(values):
    """Mean and standard error over the documents' means."""
    means = [statistics.fmean(x for (d, *_), x in values.items() if d == f"prose {i}") for i in range(DOCUMENTS)]
    return statistics.fmean(means), statistics.stdev(means) / DOCUMENTS**0.5


class Task:
    name, version = "recall", 1
    metrics = (Metric("loss", "loss of answers"), Metric("exact", "exact match", lower=False))


def records(values, cache, **more):
    return [
        record({"loss": x, "exact": 0.5}, document=d, seed=s, part=p, cache=cache, **more)
        for (d, s, p), x in values.items()
    ]


def results():
    full = records(dict.fromkeys(WINDOW, -1e-9), "full", budget=1.0)
    return Results([*records(WINDOW, "streaming_llm"), *records(OURS, "zeromerge"), *full])


def test_a_mean_and_its_error_are_those_of_the_documents():
    found = estimate(WINDOW)
    assert found is not None and found.documents == DOCUMENTS
    assert (found.mean, found.error) == pytest.approx(naive(WINDOW))


def test_a_difference_is_paired_within_each_item_and_so_is_its_error():
    found = difference(OURS, WINDOW)
    assert found is not None
    assert (found.mean, found.error) == pytest.approx(naive({i: OURS[i] - WINDOW[i] for i in OURS}))
    assert found.error < 0.2 * naive(WINDOW)[1]  # documents differ by more than the caches do


def test_only_items_that_both_have_are_compared():
    fewer = {item: x for item, x in WINDOW.items() if item[0] < "prose 4"}
    assert difference(OURS, fewer) == difference({i: OURS[i] for i in fewer}, fewer)
    assert difference(OURS, {("other", 0, 0): 1.0}) is None
    assert estimate({}) is None


def test_documents_count_alike_whatever_their_number_of_items():
    found = estimate({("a", 0, 0): 0.0, ("a", 1, 0): 0.0, ("a", 2, 0): 0.0, ("b", 0, 0): 1.0})
    assert found is not None and found.mean == 0.5


def test_a_single_document_has_no_error():
    found = estimate({("a", 0, 0): 1.0, ("a", 1, 0): 3.0})
    assert found == (2.0, None, 1)


def test_the_table_shows_mean_error_and_the_paired_difference_to_the_window():
    lines = tables(results(), [Task()])
    (ours,) = (line for line in lines if line.startswith("zeromerge") and "-0." in line)
    mean, error = naive(OURS)
    apart, its = naive({i: OURS[i] - WINDOW[i] for i in OURS})
    shown = f"{mean:.3f} ±{error:.3f} ({apart:+.3f} ±{its:.3f})".replace("±0.", "±.")
    assert ours.split(None, 1)[1] == shown
    assert any("7 documents" in line and "lower is better" in line for line in lines)
    (window,) = (line for line in lines if line.startswith("streaming_llm") and "(" not in line and ".5" not in line)
    assert window.split(None, 1)[1] == "{:.3f} ±{:.3f}".format(*naive(WINDOW)).replace("±0.", "±.")
    assert "streaming_llm" in lines[0]  # what the differences are to
    assert not any("-0.000" in line for line in lines)


def test_the_document_has_every_number_and_the_difference():
    (ours,) = (d for d in results().as_list() if d["cache"] == "zeromerge")
    assert (ours["documents"], ours["items"], ours["budget"]) == (DOCUMENTS, DOCUMENTS * SEEDS, 0.1)
    loss = ours["metrics"]["loss"]
    assert (loss["mean"], loss["error"]) == pytest.approx(naive(OURS))
    assert loss["against_window"]["mean"] == pytest.approx(naive({i: OURS[i] - WINDOW[i] for i in OURS})[0])
    assert ours["metrics"]["exact"]["mean"] == 0.5 and "prose" not in loss  # prose alone is no kind apart


def test_prose_and_code_are_told_apart_where_there_are_both():
    found = Results(
        [record({"loss": 1.0}, document="prose 0"), record({"loss": 3.0}, document="code 0")],
    ).as_list()[0]["metrics"]["loss"]
    assert (found["mean"], found["prose"], found["code"]) == (2.0, 1.0, 3.0)


def test_budgets_and_lengths_are_not_mixed():
    each = [record({"loss": float(b)}, budget=b, prompt_tokens=n) for b in (0.1, 0.2) for n in (512, 1024)]
    assert len(Results(each).groups) == 4


@pytest.mark.parametrize("seed", range(5))
def test_labels_stand_apart_in_the_order_of_their_lines(seed):
    wanted = np.random.default_rng(seed).uniform(0, 1, 9).tolist()
    places = apart(wanted, 0.12)
    order = np.argsort(wanted)
    assert all(places[b] - places[a] >= 0.12 - 1e-9 for a, b in pairwise(order))
    assert apart([0.0, 1.0, 2.0], 0.5) == [0.0, 1.0, 2.0]
    assert apart([1.0, 1.0], 0.5) == [0.75, 1.25]
