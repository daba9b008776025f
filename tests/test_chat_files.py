"""A saved conversation goes on as if it had never been saved; a file that does not fit changes nothing."""

import json
import os
from pathlib import Path

import mlx.core as mx
import pytest
from chatted import TEMPLATE, conversation, engine, fed, say
from test_chat_conversation import ANSWERS, USER, ended

from zm_mlx.chatting import commands
from zm_mlx.chatting.session import Session
from zm_mlx.chatting.standing import Standing
from zm_mlx.errors import UserError
from zm_mlx.host import saved
from zm_mlx.host.caches import Wish
from zm_mlx.loading import Source

LONG = " ".join(USER * 6)


def session(made=None, rows=64, **source):
    made = made or engine()
    opened = Session(made, Source(made.name, **source), Wish(str(rows), "streaming", None))
    made.model.fed.clear()
    return opened


def loaded(one, file):
    """Load a conversation, and forget what the model was asked to see whether the file is its own."""
    one.load(file)
    one.engine.model.fed.clear()


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "talk.safetensors")


@pytest.mark.parametrize("most", [8, 1])
def test_a_loaded_conversation_gives_the_tokens_of_one_that_was_never_saved(file, most):
    one = session()
    say(one.conversation, LONG, most=most)
    one.save(file)
    expected = say(one.conversation, USER[1], most=24)
    other = session()
    other.load(file)
    assert say(other.conversation, USER[1], most=24) == expected
    assert other.conversation.standing == one.conversation.standing
    assert other.conversation.seen == one.conversation.seen > 64


def test_what_was_not_read_and_how_the_answer_ended_is_saved_too(file):
    one = session()
    calls = iter([False, True])
    say(one.conversation, LONG, step=8, stopped=lambda: next(calls, True))
    one.save(file)
    other = session()
    loaded(other, file)
    assert other.conversation.standing == one.conversation.standing
    assert len(other.conversation.standing.pending) > 0
    say(one.conversation, USER[1], ended(one.engine, ANSWERS[0]))
    say(other.conversation, USER[1], ended(other.engine, ANSWERS[0]))
    assert fed(one.engine)[8:] == fed(other.engine)
    other.save(file)
    one.load(file)
    assert one.conversation.standing.stop == one.engine.tokenizer.eos_token_id


def test_after_saving_the_conversation_goes_on_and_the_file_stays_as_it_was(file):
    one = session()
    say(one.conversation, LONG)
    one.save(file)
    before = Path(file).read_bytes()
    say(one.conversation, LONG)
    assert Path(file).read_bytes() == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_keeps_the_old_file_and_the_conversation(monkeypatch, tmp_path, file, failure):
    one = session()
    say(one.conversation, USER[0], ended(one.engine, ANSWERS[0]))
    one.save(file)
    before = Path(file).read_bytes()
    say(one.conversation, USER[1], ended(one.engine, ANSWERS[1]))

    def fail(*_):
        raise failure

    monkeypatch.setattr(saved.os, "replace", fail)
    with pytest.raises((KeyboardInterrupt, UserError)):
        one.save(file)
    assert Path(file).read_bytes() == before and os.listdir(tmp_path) == ["talk.safetensors"]
    say(one.conversation, USER[2], ended(one.engine, ANSWERS[2]))
    assert one.conversation.seen == len(fed(one.engine))


def damaged(file, metadata=None, cut=None):
    """A saved conversation that is not as it was."""
    one = session()
    say(one.conversation, USER[0])
    if metadata is not None:
        saved.save_prompt_cache(file, one.conversation.caches.every, metadata)
        return
    one.save(file)
    Path(file).write_bytes(Path(file).read_bytes()[:cut])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: None, "no prompt cache file"),
        (lambda file: Path(file).mkdir(), "is no file"),
        (lambda file: Path(file).write_text("hello"), "its header is longer than the file"),
        (lambda file: damaged(file, cut=-100), "truncated, damaged or changed"),
        (lambda file: damaged(file, {"model": "other"}), "saved with the model other, and this chat runs tiny"),
        (lambda file: damaged(file, {"model": "tiny", "conversation": "{"}), "of its conversation is damaged"),
        (lambda file: damaged(file, {"model": "tiny", "conversation": '{"turns": -1, "pending": []}'}), "is damaged"),
        (lambda file: damaged(file, {"model": "tiny", "conversation": '{"pending": ["a"]}'}), "is damaged"),
        (lambda file: damaged(file, {"model": "tiny", "conversation": "[]"}), "is damaged"),
        (lambda file: damaged(file, {"conversation": Standing(adapter="lora").text()}), "(lora, not none)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_reason_and_changes_nothing(file, make, words):
    make(file)
    one = session()
    say(one.conversation, USER[0], ended(one.engine, ANSWERS[0]))
    before = one.conversation
    with pytest.raises(UserError) as refused:
        one.load(file)
    assert words in str(refused.value) and str(refused.value).startswith("/load: ")
    assert one.conversation is before
    say(one.conversation, USER[1], ended(one.engine, ANSWERS[1]))
    assert one.conversation.seen == len(fed(one.engine))


def test_a_model_of_another_shape_with_the_same_name_is_refused(file):
    one = session()
    say(one.conversation, USER[0])
    one.save(file)
    other = session(engine(kv_heads=4))
    with pytest.raises(UserError, match="saved for another model: layer 0 has shape"):
        other.load(file)


def test_a_saved_prompt_is_the_beginning_of_the_first_message(file):
    made = engine()
    talk = conversation(made)
    opening = made.tokenizer.encode(f"<s>user:{USER[0]}", add_special_tokens=False)
    made.prefill(opening, talk.caches.every)
    saved.save_prompt_cache(file, talk.caches.every, {"model": "tiny"})
    one = session()
    loaded(one, file)
    say(one.conversation, " " + USER[1], ended(made, ANSWERS[0]))
    say(one.conversation, USER[2], ended(made, ANSWERS[1]))
    messages = [
        {"role": "user", "content": f"{USER[0]} {USER[1]}"},
        {"role": "assistant", "content": ANSWERS[0]},
        {"role": "user", "content": USER[2]},
        {"role": "assistant", "content": ANSWERS[1]},
    ]
    whole = made.tokenizer.apply_chat_template(messages, tokenize=False)
    assert [*opening, *fed(one.engine)] == made.tokenizer.encode(whole, add_special_tokens=False)


def test_nothing_is_saved_of_a_conversation_without_tokens_and_wrong_names_are_refused(file):
    one = session()
    with pytest.raises(UserError, match="/save: nothing was said yet"):
        one.save(file)
    say(one.conversation, USER[0])
    with pytest.raises(UserError, match=r"/save: .*ends in \.safetensors"):
        one.save("talk.bin")
    with pytest.raises(UserError, match="/save: "):
        one.save("no/such/folder/talk.safetensors")


def test_a_new_conversation_holds_nothing_of_the_last_one():
    one = session()
    first = say(one.conversation, LONG, most=12)
    one.begin(None)
    assert one.conversation.seen == 0 and one.conversation.standing == Standing()
    assert say(one.conversation, LONG, most=12) == first


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/unknown", "there is no command /unknown (/help"),
        ("/STATS", "there is no command /STATS"),
        ("/", "there is no command /"),
        ("/stats now", "/stats takes nothing, not 'now'"),
        ("/exit now", "/exit takes nothing"),
        ("/save", "/save needs the name of a file"),
        ("/load ", "/load needs the name of a file"),
        ("/load missing.safetensors", "/load: no prompt cache file at missing.safetensors"),
    ],
)
def test_a_command_that_does_not_work_says_why(line, words):
    with pytest.raises(UserError) as refused:
        commands.run(line, session())
    assert words in str(refused.value)


def test_a_system_prompt_begins_a_new_conversation_and_stays_after_a_reset(capsys):
    one = session()
    say(one.conversation, USER[0])
    assert commands.run("/system Be brief.", one)
    one.engine.model.fed.clear()
    say(one.conversation, USER[0], ended(one.engine, ANSWERS[0]))
    assert one.engine.tokenizer.decode(fed(one.engine)).startswith("<s>system:Be brief.</s><s>user:")
    commands.run("/system", one)
    assert capsys.readouterr().out.splitlines()[-1] == "Be brief."
    commands.run("/reset", one)
    assert one.conversation.standing == Standing(system="Be brief.")


def test_a_system_prompt_that_the_template_refuses_keeps_the_conversation():
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    for one in (session(engine(no_system)), session(engine(None))):
        say(one.conversation, USER[0])
        before = one.conversation
        with pytest.raises(UserError, match=r"no system|/system needs a chat template"):
            commands.run("/system Be brief.", one)
        assert one.conversation is before


def test_stats_count_rows_tokens_and_bytes(capsys):
    one = session(rows=64)
    commands.run("/stats", one)
    out = capsys.readouterr().out
    assert "0 of 64 rows per head" in out and "Seen: 0 tokens in 0 turns" in out
    say(one.conversation, USER[0], most=4)
    seen = one.conversation.seen
    commands.run("/stats", one)
    assert f"{seen} of 64 rows per head" in capsys.readouterr().out
    for _ in range(3):
        say(one.conversation, LONG, most=4)
    commands.run("/stats", one)
    out = capsys.readouterr().out
    assert f"Seen: {one.conversation.seen} tokens in 4 turns; the model was trained on 4,096" in out
    budget = one.plan.nbytes / 1e3
    assert f"KV cache: {budget:.2f} KB of a budget of {budget:.2f} KB; a full cache would hold" in out
    drawn = out.splitlines()[0].partition("]")[0]
    assert "#" in drawn and "+" in drawn and drawn.count("|") == 2


def test_stats_of_a_loaded_conversation_are_those_of_its_own_budget(capsys, file):
    one = session(rows=96)
    say(one.conversation, LONG)
    one.save(file)
    other = session(rows=64)
    other.load(file)
    commands.run("/stats", other)
    out = capsys.readouterr().out
    assert " of 96 rows per head" in out
    assert f"of a budget of {one.plan.nbytes / 1e3:.2f} KB; a full cache would hold" in out
    commands.run("/reset", other)
    commands.run("/stats", other)
    assert "0 of 64 rows per head" in capsys.readouterr().out


def test_the_metadata_is_what_generate_reads_too(file):
    one = session(trust_remote_code=True)
    say(one.conversation, USER[0])
    one.save(file)
    metadata = saved.read(file)[1]
    assert metadata["model"] == "tiny" and json.loads(metadata["tokenizer_config"]) == {"trust_remote_code": True}
    mx.eval([c.state for c in one.conversation.caches.every])
