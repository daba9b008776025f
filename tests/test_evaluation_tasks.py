"""What each task measures: the same as by the plainest means, and nothing at all with the full cache."""

import math

import mlx.core as mx
import numpy as np
import pytest
import tiny
from evaluated import item, subject
from mlx_lm.models.cache import RotatingKVCache

from zm_mlx import make_prompt_cache
from zm_mlx.evaluation.asking import Asking, summary
from zm_mlx.evaluation.caches import Contender, full_bytes
from zm_mlx.evaluation.grading import Grade, Question, divergences, graded, losses
from zm_mlx.evaluation.observing import observe, replayed
from zm_mlx.evaluation.prefilled import fork
from zm_mlx.evaluation.tasks import BY_NAME
from zm_mlx.evaluation.tasks.agreement import GREEDY, relative_error
from zm_mlx.evaluation.tasks.continuation import split
from zm_mlx.policies import ZeroMerge

FULL = Contender("full")


def log_probabilities(logits):
    """[n, V] in float64, the naive way."""
    x = np.exp(tiny.f64(logits))
    return np.log(x / x.sum(axis=-1, keepdims=True))


def one_by_one(caches, tokens):
    """Logits [n, V] of tokens fed singly."""
    return tiny.feed(subject().model, caches, mx.array([list(tokens)]), 1)[0]


def answers(question):
    """The parts of an answer in words."""
    runs = np.split(np.array(question.scored), np.flatnonzero(np.diff(question.scored) > 1) + 1)
    return [subject().tokenizer.decode([question.tokens[i] for i in run]).strip() for run in runs]


@pytest.fixture(scope="module")
def exams():
    """Each task's exam of one item, made once."""
    return {name: task.exam(subject(), task.items([item()])[0]) for name, task in BY_NAME.items()}


@pytest.mark.parametrize("name", BY_NAME)
def test_the_full_cache_loses_nothing(exams, name):
    found = exams[name].measure(FULL)
    assert abs(found.get("loss", found.get("kl"))) < 1e-6
    if name == "agreement":
        assert found["divergence"] == GREEDY and found["attention"] < 1e-5


@pytest.mark.parametrize("name", BY_NAME)
def test_a_compressed_cache_loses_something_and_the_same_every_time(exams, name):
    first = exams[name].measure(Contender("zeromerge", 0.15))
    assert first == exams[name].measure(Contender("zeromerge", 0.15))
    assert all(math.isfinite(x) for x in first.values())
    assert first.get("kl", first.get("nll")) > 1e-4
    for metric in BY_NAME[name].metrics:
        assert metric.key in first


# ---- continuation: what decoding token by token under the cap would give


def product(prompt, name, rows):
    """The caches of an ordinary generation that has read the prompt but for its last token."""
    model = subject().model
    taken = "streaming" if name.endswith("streaming") else "exact"
    length = len(prompt) - 1
    caches = make_prompt_cache(model, rows, prompt_length=length, prefill=taken, policy=ZeroMerge(), head_rows=None)
    tiny.feed(model, caches, mx.array([prompt[:-1]]), 512)
    return caches


@pytest.mark.parametrize("name", ["zeromerge", "zeromerge-streaming"])
def test_a_continuation_is_scored_as_ordinary_generation_would_have_it(exams, name):
    """In blocks it must be neither another prompt, which may be held above the cap, nor masked otherwise."""
    prompt, following = split(subject(), item())
    contender = Contender(name, 0.15)
    caches = product(prompt, name, exams["continuation"].prompted.caches(contender)[0].layout.rows[0])
    logs = log_probabilities(one_by_one(caches, [prompt[-1], *following[:-1]]))
    expected = -logs[np.arange(len(following)), following]
    found = exams["continuation"].measure(contender)
    assert found["nll"] == pytest.approx(expected.mean(), abs=1e-3)
    full = exams["continuation"].full
    assert found["loss 1-32"] == pytest.approx((expected - full)[:32].mean(), abs=1e-3)
    assert found["loss 129-256"] == pytest.approx((expected - full)[128:].mean(), abs=1e-3)


def test_mlx_lms_rotating_cache_is_scored_as_token_by_token(exams):
    prompt, following = split(subject(), item())
    exam, contender = exams["continuation"], Contender("rotating", 0.15)
    rows = exam.prompted.caches(contender)[0].most
    theirs = []
    for layer in exam.prompted.layers:
        x = [mx.concatenate([x[:, :, :4], x[:, :, 4 - rows :]], axis=2) for x in layer.rows]
        theirs.append(RotatingKVCache(rows, keep=4))
        theirs[-1].state = (*x, len(prompt) - 1, 4, rows, rows)
    logs = log_probabilities(one_by_one(theirs, [prompt[-1], *following[:-1]]))
    expected = -logs[np.arange(len(following)), following].mean()
    assert exam.measure(contender)["nll"] == pytest.approx(expected, abs=1e-3)


def test_the_cap_holds_while_a_continuation_is_taken(exams):
    made = exams["continuation"].prompted.caches(Contender("zeromerge", 0.15))
    before = sum(c.nbytes for c in made)
    subject().model(mx.array([item().window()[:257]]), cache=made)
    assert sum(c.nbytes for c in made) == before
    assert max(c.layer.recent_rows for c in made) < 257


def test_a_continuation_follows_its_prompt():
    prompt, following = split(subject(), item(length=600))
    assert [*prompt, *following] == [*subject().begin, *item(length=600).window()][:856] and len(prompt) == 600


# ---- agreement


def test_divergences_are_those_of_the_textbook(exams):
    ours, theirs = (mx.array(np.random.default_rng(i).normal(0, 2, (5, 30)).astype(np.float32)) for i in (0, 1))
    p, q = np.exp(log_probabilities(theirs)), log_probabilities(ours)
    expected = (p * (np.log(p) - q)).sum(axis=-1)
    np.testing.assert_allclose(divergences(ours, theirs), expected, rtol=1e-4)
    np.testing.assert_allclose(losses(ours, [3] * 5), -q[:, 3], rtol=1e-4)


def test_attention_that_holds_everything_has_no_error_and_that_which_does_not_has_one(exams):
    prompted = exams["agreement"].prompted
    following = item().window()[600:728]
    _, observed = observe(prompted, following)

    def errors(rows):
        caches = make_prompt_cache(subject().model, rows, policy=ZeroMerge(), head_rows=None)
        tiny.feed(subject().model, caches, prompted.tokens[None], 512)
        outputs = replayed(prompted, caches, observed)
        return [relative_error(one, out) for one, out in zip(observed, outputs, strict=True)]

    assert max(errors(800)) < 1e-5
    assert min(errors(120)) > 1e-2


def test_the_relative_error_is_that_of_whole_outputs(exams):
    observed = exams["agreement"].observed[0]
    out = observed.output * 1.5
    assert relative_error(observed, out) == pytest.approx(0.5, abs=1e-5)
    o, theirs = tiny.f64(observed.output[:, ::-1])[0], tiny.f64(observed.output)[0]
    each = [np.linalg.norm(o[:, t] - theirs[:, t]) / np.linalg.norm(theirs[:, t]) for t in range(o.shape[1])]
    assert relative_error(observed, observed.output[:, ::-1]) == pytest.approx(np.mean(each), rel=1e-4)


def test_the_first_divergence_is_the_first_token_that_greedy_decoding_gives_otherwise(exams):
    exam, contender = exams["agreement"], Contender("streaming_llm", 0.1)
    caches, own = exam.prompted.caches(contender), [exam.greedy[0]]
    while own[-1] == exam.greedy[len(own) - 1] and len(own) < len(exam.greedy):
        own.append(int(one_by_one(caches, own[-1:]).argmax(axis=-1).item()))
    expected = len(own) - 2 if own[-1] != exam.greedy[len(own) - 1] else GREEDY
    assert exam.measure(contender)["divergence"] == expected < GREEDY


# ---- questions


def test_an_answer_is_scored_on_its_own_tokens_alone(exams):
    prompted = exams["recall"].prompted
    asked = Question("single", (5, 6, 7, 8, 9, 10), (3, 5))
    found = graded(subject(), prompted.caches(FULL), asked)
    caches = subject().model.make_cache()
    tiny.feed(subject().model, caches, prompted.tokens[None], 512)
    logs = log_probabilities(one_by_one(caches, asked.tokens))
    assert found.loss == pytest.approx(-(logs[2, 8] + logs[4, 10]) / 2, abs=1e-3)
    best = logs.argmax(axis=-1)
    right = Question("single", (5, 6, 7, int(best[2]), 9, 10), (3,))
    assert graded(subject(), prompted.caches(FULL), right).exact and not found.exact


def test_questions_are_asked_of_copies(exams):
    exam = exams["recall"]
    turned = Asking(subject(), exam.prompted, exam.questions[::-1])
    grades = turned._grades(Contender("zeromerge", 0.2))[::-1]
    for one, other in zip(exam._grades(Contender("zeromerge", 0.2)), grades, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)


def test_losses_are_above_the_full_caches_and_by_kind_and_depth():
    asked = [Question("single", (1, 2), (1,), 0.05), Question("single", (1, 2), (1,), 0.95), Question("keys", (1,), ())]
    found, full = [Grade(3, True), Grade(2, False), Grade(1, False)], [Grade(1, True), Grade(1, True), Grade(2, True)]
    values = summary(asked, found, full)
    expected = {
        "loss": 2 / 3,
        "exact": 1 / 3,
        "single loss": 1.5,
        "single exact": 0.5,
        "keys loss": -1,
        "keys exact": 0,
    }
    deep = {"depth 5 loss": 2, "depth 5 exact": 1, "depth 95 loss": 1, "depth 95 exact": 0, "nll": 2}
    assert values == pytest.approx({**expected, **deep})


# ---- conversation


def test_a_conversation_has_one_cap_for_all_its_turns(exams):
    exam = exams["conversation"]
    total = len(exam.prompted) + len(exam.later)
    assert 0.9 * 600 < total <= 640  # what was asked for, and marks of turns
    assert exam.share == pytest.approx(len(exam.prompted) / total) and 0.65 < exam.share < 0.8
    for name in ("zeromerge", "streaming_llm", "rotating"):
        used = sum(c.nbytes for c in exam._caches(Contender(name, 0.2)))
        room = 0.2 * full_bytes(exam.prompted.shapes, total)
        assert 0.9 * room < used <= room


def test_turns_after_the_first_are_taken_as_in_decoding(exams):
    exam, contender = exams["conversation"], Contender("zeromerge", 0.2)
    whole = exam._caches(contender)
    singly = exam.prompted.caches(Contender("zeromerge", 0.2 / exam.share))
    one_by_one(singly, exam.later)
    for one, other in zip(whole, singly, strict=True):
        tiny.assert_same_state(one, other)


def test_the_facts_of_a_conversation_are_in_its_first_turn(exams):
    exam = exams["conversation"]
    first, later = (subject().tokenizer.decode(list(t)) for t in (exam.prompted.tokens.tolist(), exam.later))
    for asked in exam.questions:
        (answer,) = answers(asked)
        assert answer in first and answer not in later


# ---- recall with the question before


def test_each_part_asks_another_question_of_the_same_text():
    task = BY_NAME["recall-before"]
    parts = [task.exam(subject(), x) for x in task.items([item()])]
    assert len(parts) == 4
    texts = [subject().tokenizer.decode(p.prompted.tokens.tolist()) for p in parts]
    assert len(set(texts)) == 4 and len({t[:800] for t in texts}) == 1
    for text, exam in zip(texts, parts, strict=True):
        (asked,) = exam.questions
        words = text.rstrip().splitlines()[-2]
        assert words.endswith("?") and words in text.partition("\n")[0]  # stated before the text, and again behind it
        assert asked.scored[0] == 1 and all(part in text for part in answers(asked))


def test_copies_of_caches_are_what_is_asked(exams):
    made = exams["recall"].prompted.caches(Contender("zeromerge", 0.2))
    before = made[0].offset
    graded(subject(), fork(made), exams["recall"].questions[0])
    assert made[0].offset == before
