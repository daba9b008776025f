"""Scores of answers against values worked out by hand."""

import pytest

from zm_mlx.evaluation.scoring import contained, exact_match, f1, rouge


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1),
        ("  an   eiffel\ttower!", ["Eiffel Tower"], 1),
        ("the tower", ["Eiffel Tower", "Tower"], 1),  # any of them
        ("Eiffel Towers", ["Eiffel Tower"], 0),
        ("theory", ["ory"], 0),  # articles are whole words
        ("", ["42"], 0),
    ],
)
def test_exact_match_is_squads(answer, right, expected):
    assert exact_match(answer, right) == expected


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("the cat sat", ["a cat sat down"], 2 * 1 * (2 / 3) / (1 + 2 / 3)),  # precision 2/2, recall 2/3
        ("cat cat dog", ["cat"], 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # a word counts as often as it is right
        ("no idea", ["paris"], 0),
        ("no idea", ["paris", "idea"], 2 * 0.5 * 1 / 1.5),  # the best of them
        ("", ["paris"], 0),
        ("The", ["a"], 1),  # both empty
    ],
)
def test_f1_is_squads(answer, right, expected):
    assert f1(answer, right) == pytest.approx(expected)


def test_contained_is_the_share_of_right_answers_in_a_text():
    assert contained("The numbers are 123 and 456.", ["123", "456", "789"]) == pytest.approx(2 / 3)
    assert contained("nothing", ["123"]) == 0


def test_rouge_is_the_f_measure_of_stemmed_words_pairs_and_the_longest_subsequence():
    score = rouge()
    assert score is not None  # the test extra installs it
    found = score("the cats sat on a mat", ["the cat sat there on mats"])
    # Stems: the cat sat on a mat / the cat sat there on mat. Words shared 5 of 6 and 6; pairs "the cat", "cat sat" of 5
    # and 5; longest common subsequence "the cat sat on mat", 5.
    assert found == pytest.approx({"rouge1": 5 / 6, "rouge2": 2 / 5, "rougeL": 5 / 6})
    best = score("the cats sat on a mat", ["something else", "the cat sat there on mats"])
    assert best == pytest.approx(found)
