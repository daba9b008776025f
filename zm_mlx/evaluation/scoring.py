"""Scores of a generated answer against the right ones: exact match, F1, ROUGE."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ROUGE = ("rouge1", "rouge2", "rougeL")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces, as SQuAD's own evaluation does it."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is one of the right ones, 0 if not (SQuAD, Rajpurkar et al. 2016, arXiv 1606.05250)."""
    return float(normalised(answer) in {normalised(r) for r in right})


def contained(answer: str, right: Sequence[str]) -> float:
    """The share of the right answers that stand in the answer (RULER, Hsieh et al. 2024, arXiv 2404.06654)."""
    found = normalised(answer)
    return sum(normalised(r) in found for r in right) / len(right)


def f1(answer: str, right: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, for the best of the right answers (as ``exact_match``)."""
    return max(_f1(normalised(answer).split(), normalised(r).split()) for r in right)


def rouge() -> Callable[[str, Sequence[str]], dict[str, float]] | None:
    """ROUGE-1, -2 and -L (F-measures with stemming, Lin 2004) of an answer, for the best of the right ones.

    ``None`` where the library rouge-score is not installed (pip install 'zm-mlx[evaluate]').
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)

    def score(answer: str, right: Sequence[str]) -> dict[str, float]:
        found = scorer.score_multi(list(right), answer)
        return {name: float(found[name].fmeasure) for name in ROUGE}

    return score


def _f1(answer: Sequence[str], right: Sequence[str]) -> float:
    if not answer or not right:
        return float(answer == right)
    shared = sum((Counter(answer) & Counter(right)).values())
    return 2 * shared / (len(answer) + len(right))
