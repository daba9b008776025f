"""Facts and questions: planted where they should be, drawn from the seed alone, and scored on the answer alone."""

import numpy as np
import pytest
from evaluated import item, subject

from zm_mlx.evaluation.facts import KINDS, Draw, Fact
from zm_mlx.evaluation.frame import Frame, begins_with
from zm_mlx.evaluation.haystack import COMMENT, planted, question
from zm_mlx.evaluation.tasks.recall import before_answer, draw_of

TEXT = item(length=1500).window()


def decoded(tokens):
    return subject().tokenizer.decode(list(tokens))


@pytest.mark.parametrize("mark", ["", COMMENT])
@pytest.mark.parametrize("seed", range(3))
def test_every_fact_stands_on_a_line_of_its_own_at_its_depth(seed, mark):
    facts = Draw([seed]).quiz().facts
    tokens = planted(subject(), TEXT, facts, 1500, mark)
    assert len(tokens) == 1500
    lines = decoded(tokens).split("\n")
    for fact in facts:
        assert lines.count(f"{mark}{fact.text}") == 1
        before = "\n".join(lines[: lines.index(f"{mark}{fact.text}")])
        assert len(subject().encode(before)) / 1500 == pytest.approx(fact.depth, abs=0.1)


def test_between_the_facts_the_text_is_as_it_was():
    facts = Draw([1]).quiz().facts
    lines = decoded(planted(subject(), TEXT, facts, 1500)).split("\n")
    text = "\n".join(line for line in lines if line not in {f.text for f in facts})
    assert decoded(TEXT).startswith(text) and len(text) > 1000


def test_a_text_without_lines_takes_facts_between_tokens():
    words = subject().encode("one two three four " * 200)
    tokens = planted(subject(), words, [Fact(0.5, "The number is 12345.")], 300)
    before, found, after = decoded(tokens).partition("The number is 12345.\n")
    assert found and len(tokens) == 300 and 0.8 < len(before) / len(after) < 1.25


def test_facts_that_are_longer_than_the_text_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"50 tokens are too few for .* facts; use longer prompts \(--prompt-tokens\)"):
        planted(subject(), TEXT, Draw([0]).quiz().facts, 50)


def test_seeds_and_documents_draw_other_facts_and_the_same_ones_the_same():
    drawn = [draw_of(item(seed, name=name)).quiz() for seed in range(4) for name in ("prose 0", "code 0")]
    texts = [{f.text for f in quiz.facts} for quiz in drawn]
    numbers = [{word for t in text for word in t.split() if word[:-1].isdigit()} for text in texts]
    for i, one in enumerate(numbers):
        assert all(len(one & other) <= 1 for other in numbers[:i])
    assert draw_of(item(2, name="prose 0")).quiz() == drawn[4]
    assert draw_of(item(2, length=1200, name="prose 0")).quiz() == drawn[4]  # at any length


@pytest.mark.parametrize("seed", range(20))
def test_a_quiz_has_every_kind_and_no_two_facts_about_one_thing(seed):
    quiz = Draw([seed]).quiz()
    assert [len(quiz.of(kind)) for kind in KINDS] == [6, 4, 3, 1, 1]
    assert len({f.text for f in quiz.facts}) == len(quiz.facts) == 6 + 4 + 3 + 3 + 2
    depths = [q.depth for q in quiz.of("single")]
    np.testing.assert_allclose(depths, np.linspace(0.05, 0.95, 6))
    assert all(0.05 <= f.depth <= 0.95 for f in quiz.facts)
    about = [f.text.rpartition(" is ")[0] for f in quiz.facts if " is " in f.text and "One of the" not in f.text]
    assert len(set(about)) == len(about)
    for query in quiz.queries:  # a fact says what completes the question
        for piece in query.pieces:
            given = piece.given.split(".\n")[-1]
            assert any(f.text == f"{given} {piece.answer}." for f in quiz.facts)


@pytest.mark.parametrize("seed", range(5))
def test_only_the_tokens_of_answers_are_scored(seed):
    for query in Draw([seed]).quiz().queries:
        asked = question(subject(), query, "\n\n")
        runs = np.split(np.array(asked.scored), np.flatnonzero(np.diff(asked.scored) > 1) + 1)
        assert len(runs) == len(query.pieces)
        for run, piece in zip(runs, query.pieces, strict=True):
            found = decoded([asked.tokens[i] for i in run]).strip()
            assert found == piece.answer or (piece.hint and found and piece.answer.endswith(found) and found[0] != " ")
        assert asked.scored[-1] == len(asked.tokens) - 1 and asked.kind == query.kind
        whole = "\n\n" + "".join(f"{p.given} {p.answer}" for p in query.pieces)
        assert decoded(asked.tokens) == whole


def test_a_hint_gives_what_tells_several_right_answers_apart():
    for query in Draw([3]).quiz(["values"]).queries:
        asked = question(subject(), query, "\n\n")
        given = decoded(asked.tokens[: asked.scored[0]])
        assert given.rstrip()[-1].isdigit() and len(asked.scored) >= 1
    firsts = [q.pieces[0].answer[0] for q in Draw([3]).quiz(["values"]).queries]
    assert len(set(firsts)) == 3


def test_what_is_compressed_with_the_question_ends_right_before_the_answer():
    query = Draw([0]).quiz().of("single")[0]
    asked = question(subject(), query, "\n\n")
    end, rest = before_answer(asked)
    assert [*end, *rest.tokens] == list(asked.tokens)
    assert rest.scored[0] == 1 and [rest.tokens[i] for i in rest.scored] == [asked.tokens[i] for i in asked.scored]


# ---- what surrounds words


class Tokenizer:
    """Letters, with a beginning of sequence; ``template`` is a chat template's work."""

    def __init__(self, template=None):
        self.template, self.has_chat_template = template, template is not None

    def encode(self, text, add_special_tokens=True):
        return [-1] * add_special_tokens + [ord(c) for c in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return self.template(messages)


def test_a_frame_is_what_a_chat_template_puts_around_words():
    made = Tokenizer(
        lambda messages: "<s>" + "".join(f"[{m['role']}]{m['content']}." for m in messages) + "[assistant]"
    )
    assert Frame.of(made) == Frame("<s>[user]", ".[assistant]", ".[user]")


@pytest.mark.parametrize("template", [None, lambda m: "<first> <second>", lambda m: 1 / 0])
def test_without_a_template_that_works_there_is_no_frame(template):
    assert Frame.of(Tokenizer(template)) is None


def test_the_beginning_of_a_sequence_is_found_without_a_template():
    assert begins_with(Tokenizer()) == [-1]
