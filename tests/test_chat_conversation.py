"""A conversation feeds each token once: its caches hold what one rendering of the whole would have."""

import signal

import chatted
import mlx.core as mx
import pytest
from chatted import THOUGHTLESS, conversation, engine, fed, say
from mlx_lm.models import gpt2

from zm_mlx.chatting.interrupting import Interrupts
from zm_mlx.chatting.standing import Standing
from zm_mlx.engine import Engine
from zm_mlx.errors import UserError
from zm_mlx.host.model_caches import zero_merge
from zm_mlx.prompts import Chat, rewrites

USER = ["import os", "def f(x):", "return x"]
ANSWERS = ["import sys", "class A:", "pass"]


def ids(made, text):
    return made.tokenizer.encode(text, add_special_tokens=False)


def rendered(made, messages, **more):
    return ids(made, made.tokenizer.apply_chat_template(messages, tokenize=False, **more))


def messages(turns, system=None):
    found = [] if system is None else [{"role": "system", "content": system}]
    for text, answer in turns:
        found += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return found


def ended(made, text):
    """An answer as the model gives it, with the end of its turn."""
    return [*ids(made, text), made.tokenizer.eos_token_id]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("step", [2048, 4])
def test_tokens_of_three_turns_are_those_of_one_rendering(system, step):
    made = engine()
    talk = conversation(made, standing=Standing(system=system))
    for text, answer in zip(USER, ANSWERS, strict=True):
        say(talk, text, ended(made, answer), step=step)
    assert fed(made) == rendered(made, messages(zip(USER, ANSWERS, strict=True), system))
    assert talk.seen == len(fed(made)) and talk.standing.pending == ()


def test_a_cut_off_answer_gets_its_end_of_turn_once_with_the_next_turn():
    made = engine()
    talk = conversation(made)
    settings = chatted.Settings(1, 2048, chatted.Written(ids(made, ANSWERS[0])))
    cut = [r.token for r in talk.answer(talk.encode(USER[0]), settings, lambda: False)]
    say(talk, USER[1], ended(made, ANSWERS[1]))
    turns = [(USER[0], made.tokenizer.decode(cut)), (USER[1], ANSWERS[1])]
    assert cut == ids(made, ANSWERS[0])[:1]
    assert fed(made) == rendered(made, messages(turns))


def test_an_answer_of_nothing_but_its_end_leaves_one_end_of_turn():
    made = engine()
    talk = conversation(made)
    say(talk, USER[0], ended(made, ""))
    say(talk, USER[1], ended(made, ANSWERS[1]))
    expected = rendered(made, messages([(USER[0], "@"), (USER[1], ANSWERS[1])]))
    mark = ids(made, ":@")[-1]
    assert fed(made) == [t for t in expected if t != mark]


def test_a_stop_token_that_ends_no_turn_of_the_template_is_followed_by_the_templates_own():
    made = engine(chatted.TEMPLATE.replace("</s>", "<unk>"))
    talk = conversation(made)
    say(talk, USER[0], ended(made, ANSWERS[0]))
    before = len(fed(made))
    say(talk, USER[1], ended(made, ANSWERS[1]))
    assert fed(made)[before - 1 : before + 3] == [
        made.tokenizer.eos_token_id,
        *ids(made, "<unk><s>user:")[:3],
    ]


def test_a_template_that_drops_the_thinking_of_earlier_answers_does_not_disturb_the_cache():
    made = engine(THOUGHTLESS)
    talk = conversation(made)
    thoughts = [f"think~{answer}" for answer in ANSWERS]
    for text, answer in zip(USER, thoughts, strict=True):
        say(talk, text, ended(made, answer))
    made.tokenizer.chat_template = chatted.TEMPLATE  # which drops nothing
    assert fed(made) == rendered(made, messages(zip(USER, thoughts, strict=True)))


def test_it_is_known_whether_a_template_rewrites_earlier_turns():
    made = engine()
    assert not rewrites(made.tokenizer, Chat()) and not rewrites(made.tokenizer, Chat("Be brief."))
    moving = chatted.TEMPLATE.replace("<s>{{ m['role'] }}", "{% if loop.last %}!{% endif %}<s>{{ m['role'] }}")
    assert rewrites(engine(moving).tokenizer, Chat())
    thinking = engine(THOUGHTLESS).tokenizer
    assert not rewrites(thinking, Chat())
    thinking._think_start = thinking._think_end = "~"
    assert rewrites(thinking, Chat())


def test_a_template_that_does_not_show_answers_is_refused_by_name():
    made = engine(chatted.TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"))
    talk = conversation(made)
    say(talk, USER[0], ended(made, ANSWERS[0]))
    with pytest.raises(UserError, match="does not show an answer as it is"):
        talk.encode(USER[1])


def test_without_a_template_text_goes_in_as_it_is_and_each_later_turn_begins_a_line():
    made = engine(None)
    talk = conversation(made)
    say(talk, USER[0], ids(made, ANSWERS[0]), most=2)
    say(talk, USER[1], ids(made, ANSWERS[1]))
    text = made.tokenizer.decode(fed(made))
    assert text.startswith(f"<s>{USER[0]}{ANSWERS[0]}") and f"\n{USER[1]}{ANSWERS[1]}" in text


@pytest.mark.parametrize("after", [1, 3])
def test_ctrl_c_in_an_answer_leaves_all_layers_with_the_tokens_of_the_transcript(after):
    made = engine()
    talk = conversation(made, rows=24)
    given = []
    with Interrupts() as interrupts:
        settings = chatted.Settings(20)
        for response in talk.answer(talk.encode(USER[0]), settings, lambda: interrupts.noted):
            given.append(response.token)
            if len(given) == after:
                signal.raise_signal(signal.SIGINT)
    assert interrupts.noted and len(given) == after
    assert {c.offset for c in zero_merge(talk.caches.every)} == {len(fed(made))}
    assert fed(made)[-after:] == given
    before = len(fed(made))
    say(talk, USER[1], ended(made, ANSWERS[1]))
    eos = made.tokenizer.eos_token_id
    assert fed(made)[before:] == [eos, *ids(made, f"<s>user:{USER[1]}</s><s>assistant:"), *ended(made, ANSWERS[1])]


def test_ctrl_c_in_the_middle_of_a_call_of_the_model_is_noted_and_raises_nothing(monkeypatch):
    made = engine()
    talk = conversation(made)
    attention = type(made.model.layers[0].self_attn)
    original = attention.__call__

    def pressed(self, *args, **more):
        if self is made.model.layers[1].self_attn:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **more)

    monkeypatch.setattr(attention, "__call__", pressed)
    with Interrupts() as interrupts:
        assert say(talk, USER[0], ended(made, ANSWERS[0]), stopped=lambda: interrupts.noted, step=4) == []
    assert {c.offset for c in zero_merge(talk.caches.every)} == {4}


@pytest.mark.parametrize("policy", [None, "h2o"])
def test_a_turn_whose_reading_was_interrupted_is_read_on_with_the_next_one(policy):
    made = engine()
    talk = conversation(made, rows=24, policy=policy)
    calls = iter([False, True])
    long = " ".join(USER * 3)
    assert say(talk, long, step=8, stopped=lambda: next(calls, True)) == []
    first = rendered(made, [{"role": "user", "content": long}], add_generation_prompt=True)
    assert fed(made) == first[:8] and talk.standing.pending == tuple(first[8:])
    assert talk.seen == 8
    say(talk, USER[1], ended(made, ANSWERS[1]))
    expected = [*first, made.tokenizer.eos_token_id, *ids(made, f"<s>user:{USER[1]}</s><s>assistant:")]
    assert fed(made) == [*expected, *ended(made, ANSWERS[1])]
    assert talk.standing.pending == () and talk.seen == len(fed(made))


def test_an_interrupt_at_the_end_of_a_turns_reading_loses_no_token_that_the_caches_hold():
    made = engine()
    talk = conversation(made)
    done = []
    responses = talk.answer(
        talk.encode(USER[0]), chatted.Settings(8), lambda: done[-1:] == [True], lambda n, total: done.append(n == total)
    )
    given = [r.token for r in responses]
    assert len(given) == 1 and fed(made)[-1:] == given and talk.standing.pending == ()


def test_an_interrupt_before_the_first_call_reads_nothing_and_loses_nothing():
    made = engine()
    talk = conversation(made)
    tokens = talk.encode(USER[0])
    assert list(talk.answer(tokens, chatted.Settings(4), lambda: True)) == []
    assert fed(made) == [] and talk.standing.pending == tuple(tokens)


def test_whoever_stops_listening_to_an_answer_leaves_the_conversation_as_far_as_it_was_heard():
    made = engine()
    talk = conversation(made)
    responses = talk.answer(talk.encode(USER[0]), chatted.Settings(20), lambda: False)
    heard = [next(responses).token for _ in range(3)]
    responses.close()
    assert fed(made)[-3:] == heard and talk.seen == len(fed(made))


def test_rows_and_bytes_stay_while_the_conversation_grows():
    made = engine()
    talk = conversation(made, rows=64)
    bytes_held, active = set(), []
    for turn in range(30):
        say(talk, " ".join(USER * 4), ended(made, ANSWERS[turn % 3]))
        bytes_held.add(talk.caches.nbytes)
        mx.clear_cache()
        active.append(mx.get_active_memory())
    assert talk.seen > 20 * 64 and bytes_held == {talk.caches.plan.nbytes}
    assert max(active[10:]) <= max(active[:10]) * 1.01


@pytest.mark.exhaustive
def test_memory_is_flat_over_fifty_thousand_tokens():
    made = engine()
    talk = conversation(made, rows=256)
    text, peaks = " ".join(USER * 40), []
    for end in (1_000, 10_000, 50_000):
        mx.reset_peak_memory()
        while talk.seen < end:
            say(talk, text, ended(made, ANSWERS[0]), step=512)
            made.model.fed.clear()
        assert talk.caches.nbytes == talk.caches.plan.nbytes
        peaks.append(mx.get_peak_memory())
    assert max(peaks) <= 1.02 * peaks[0]


def test_a_model_with_a_table_of_positions_says_where_they_end():
    mx.random.seed(0)
    args = gpt2.ModelArgs("gpt2", 32, 64, 2, 2, 64, 1e-5, chatted.VOCABULARY)
    made = Engine(gpt2.Model(args), chatted.tokenizer(), "gpt2")
    talk = chatted.Conversation(made, conversation_caches(made), Standing())
    given = say(talk, USER[0], most=200)
    assert talk.seen == 64 and len(given) < 64
    with pytest.raises(UserError, match="64 positions, of which 64 are taken"):
        talk.encode(USER[1])
    fresh = chatted.Conversation(made, conversation_caches(made), Standing())
    with pytest.raises(UserError, match="do not fit; /reset begins a new conversation"):
        fresh.encode(" ".join(USER * 20))
    assert fresh.standing == Standing()


def conversation_caches(made):
    return chatted.caches.fresh(made.model, "zeromerge", chatted.Wish("32", "streaming", None), None, 0)
