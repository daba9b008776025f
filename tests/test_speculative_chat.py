"""A conversation with drafts says what it says without; its caches and what waits add up to its transcript."""

import copy

import chatted
import pytest
from chatted import conversation, engine
from test_chat import talk, typed
from tiny import assert_same_state

from zm_mlx import PromptLookup, cache_prompt, chat, drafting
from zm_mlx.chatting.session import Session
from zm_mlx.drafting import Draft
from zm_mlx.engine import Engine
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.host.model_caches import zero_merge
from zm_mlx.host.saved import read
from zm_mlx.loading import Source

TURNS = ["one two three one two three one two", "and again: one two three", "the same once more"]
REPEATS = "a b c d a b c d a b c d a b c d a b c d a b c"


def spoken(made, lookup):
    """A new conversation with a draft: prompt lookup, or the model itself in bounded caches."""
    talking = conversation(made, rows=40)
    draft = Draft(4) if lookup else drafting.renewed(Draft(4, "itself", copy.copy(made.model)), talking.caches)
    if not lookup:
        draft.model.fed = []
    talking.draft = draft
    return talking


def answered(talking, text, most=24, stop=None):
    """Tokens of an answer, and those of the turn; ends after ``stop`` tokens."""
    tokens = talking.encode(text)
    given = []
    settings = chatted.Settings(most)
    for response in talking.answer(tokens, settings, lambda: stop is not None and len(given) >= stop):
        given.append(response.token)
    return tokens, given


@pytest.mark.parametrize("lookup", [True, False])
@pytest.mark.parametrize("stop", [None, 1, 6])
def test_answers_are_those_without_a_draft_and_nothing_is_lost_between_turns(lookup, stop):
    made = engine(template=None)
    plain, drafted = conversation(made, rows=40), spoken(made, lookup)
    transcripts = {plain: [], drafted: []}
    answers = {plain: [], drafted: []}
    for text in TURNS:
        for talking in (plain, drafted):
            tokens, given = answered(talking, text, stop=stop)
            transcripts[talking] += [*tokens, *given]
            answers[talking].append(given)
            own = [*talking.caches.every, *(talking.draft.every if talking.draft else [])]
            assert {c.offset for c in own} == {len(transcripts[talking])} and talking.standing.pending == ()
    assert answers[drafted] == answers[plain]
    for a, b in zip(drafted.caches.every, plain.caches.every, strict=True):
        assert_same_state(a, b)


def test_prompt_lookup_finds_what_was_said_in_earlier_turns(monkeypatch):
    made = engine(template=None)
    talking = spoken(made, True)
    first, given = answered(talking, REPEATS, most=4)
    seen = []
    monkeypatch.setattr("zm_mlx.engine.PromptLookup", lambda tokens: seen.append(list(tokens)) or PromptLookup(tokens))
    tokens = talking.encode(TURNS[0])
    list(talking.answer(tokens, chatted.Settings(2), lambda: False))
    assert seen[0][: len(first) + len(given)] == [*first, *given]


def test_a_new_conversation_knows_nothing_of_the_last_one():
    made = engine(template=None)
    session = Session(made, Source("tiny"), drafting.Wish("40", "streaming", None))
    session.speculate(drafting.renewed(Draft(3, "itself", made.model), session.conversation.caches))
    answered(session.conversation, TURNS[0])
    old = session.conversation
    session.begin(None)
    assert session.conversation.draft is not None and session.conversation is not old
    assert all(c.empty() for c in session.conversation.draft.every)
    assert any(not c.empty() for c in old.draft.every)


def test_an_interrupted_reading_goes_on_with_the_next_turn():
    made = engine(template=None)
    talking = spoken(made, False)
    text = " ".join(TURNS * 3)
    tokens = talking.encode(text)
    calls = iter([False, True])
    assert list(talking.answer(tokens, chatted.Settings(4, 8), lambda: next(calls, True))) == []
    held = {c.offset for c in [*zero_merge(talking.caches.every), *talking.draft.every]}
    assert held == {len(tokens) - len(talking.standing.pending)}
    assert talking.standing.pending == tuple(tokens[held.pop() :])
    waiting = list(talking.standing.pending)
    again, given = answered(talking, TURNS[1])
    assert again[: len(waiting)] == waiting and given
    assert talking.seen == len(tokens) - len(waiting) + len(again) + len(given)


# ---- the command


@pytest.mark.parametrize(
    "flags", [["--prompt-lookup"], ["--draft-model", DEFAULT_MODEL, "--num-draft-tokens", "2"]], ids=str
)
def test_the_chat_answers_as_without_a_draft(monkeypatch, capsys, flags):
    lines = "one two three one two three\nonce more: one two\n"
    _, expected, _ = talk(monkeypatch, capsys, lines, "--kv-budget", "64")
    code, found, err = talk(monkeypatch, capsys, lines, "--kv-budget", "64", *flags)
    assert code == 0, err
    assert found == expected


@pytest.mark.parametrize("flags", [["--prompt-lookup"], ["--draft-model", DEFAULT_MODEL]], ids=str)
def test_a_chat_from_a_saved_prompt_answers_as_without_a_draft(monkeypatch, capsys, tmp_path, flags):
    """The draft knows the saved prompt's tokens: prompt lookup quotes them, a draft model has read them."""
    file, seen = str(tmp_path / "saved.safetensors"), []
    code = cache_prompt.main(["--prompt", REPEATS * 4, "--prompt-cache-file", file, "--kv-budget", "64"])
    assert code == 0
    lines = "one two three one two three\nonce more: one two\n"
    capsys.readouterr()
    _, expected, _ = talk(monkeypatch, capsys, lines, "--prompt-cache-file", file)
    speculate = Engine._speculate
    monkeypatch.setattr(Engine, "_speculate", lambda self, *args: seen.append(args[-1]) or speculate(self, *args))
    code, found, err = talk(monkeypatch, capsys, lines, "--prompt-cache-file", file, *flags)
    assert code == 0, err
    assert found == expected
    own = zero_merge(read(file)[0])
    assert len(seen[0].before) == own[0].offset
    if seen[0].model is not None:
        assert all(c.offset > own[0].offset for c in seen[-1].every)


def test_someone_sees_what_drafts_and_how_much(monkeypatch, capsys):
    typed(monkeypatch, REPEATS, "/save " + "nowhere-at-all/x", "/exit")
    code = chat.main(["-m", "12", "--prompt-lookup", "--kv-budget", "64"])
    out = capsys.readouterr().out
    assert code == 0
    assert "Draft: prompt lookup, up to 8 tokens at a time" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-draft-tokens", "3"], "--num-draft-tokens needs"),
        (["--prompt-lookup", "--num-draft-tokens", "0"], "--num-draft-tokens must be"),
        (["--prompt-lookup", "--draft-model", "x"], "give one of them"),
        (["--draft-model", "nowhere/at-all-x"], "--draft-model nowhere/at-all-x"),
    ],
)
def test_drafts_that_do_not_work_are_one_line(monkeypatch, capsys, flags, words):
    code, out, err = talk(monkeypatch, capsys, "hello\n", *flags)
    assert code == 2 and out == "" and words in err and len(err.splitlines()) == 1
