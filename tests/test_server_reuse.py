"""The server's rule of what prompts stay: nothing is lost that a plain LRU would have kept, and repeats are safe."""

import random
from collections import OrderedDict

import pytest

from zm_mlx.serving import reuse
from zm_mlx.serving.reuse import FEWEST, Snapshots


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Beginnings of one token count here."""
    monkeypatch.setattr(reuse, "FEWEST", 1)


class Lru:
    """Ends of prompts and answers, the least recently used goes first; a hit counts as a use."""

    def __init__(self, limit):
        self.limit, self.held = limit, OrderedDict()

    def use(self, tokens, user_turn):
        found = [key for key in self.held if len(key) < len(tokens) and tuple(tokens[: len(key)]) == key]
        if not found:
            return None
        best = max(found, key=len)
        self.held.move_to_end(best)
        return None, len(best)

    def put(self, tokens, caches, kind):
        self.held[tuple(tokens)] = None
        self.held.move_to_end(tuple(tokens))
        while len(self.held) > self.limit:
            self.held.popitem(last=False)


def reused(store, stream):
    """Percent of prompt tokens that a store saves over requests (system, prompt, answer, user_turn)."""
    saved = total = 0
    for system, prompt, answer, user_turn in stream:
        hit = store.use(prompt, user_turn)
        saved, total = saved + (hit[1] if hit else 0), total + len(prompt)
        if system and (hit is None or hit[1] < system):
            store.put(prompt[:system], None, "system")
        store.put(prompt[:-1], None, "prompt")
        if answer is not None:
            store.put(prompt + answer, None, "answer")
    return 100 * saved / total


def chat(seed, stripped=False):
    """192 requests, 4 conversations at a time over 3 system prompts; 15 % asked again, 7 % with an edited question."""
    draw = random.Random(seed)
    words = iter(range(10**9))
    systems = [[next(words) for _ in range(draw.randint(200, 500))] for _ in range(3)]

    def text(low, high):
        return [next(words) for _ in range(draw.randint(low, high))]

    def begin():
        return {"system": (s := draw.choice(systems)), "turns": [], "left": draw.randint(3, 12), "n": len(s)}

    talks = [begin() for _ in range(4)]
    requests = []
    while len(requests) < 192:
        i = draw.randrange(4)
        talk = talks[i]
        kind = draw.random()
        if talk["turns"] and kind < 0.15:
            talk["turns"][-1] = (talk["turns"][-1][0], None)
        elif talk["turns"] and kind < 0.22:
            talk["turns"][-1] = (text(20, 120), None)
        else:
            talk["turns"].append((text(20, 120), None))
        prompt = list(talk["system"])
        for question, answer in talk["turns"]:
            prompt += question + (answer or [])
        answer = text(50, 250)
        requests.append((talk["n"], prompt, None if stripped else answer, True))
        talk["turns"][-1] = (talk["turns"][-1][0], answer)
        if len(talk["turns"]) >= talk["left"]:
            talks[i] = begin()
    return requests


def agent(seed):
    """Agents with a long system prompt: loops of tool calls, side questions, and sub-agents with a prompt of theirs."""
    draw = random.Random(seed)
    words = iter(range(10**9))

    def text(low, high):
        return [next(words) for _ in range(draw.randint(low, high))]

    main, sub = text(4000, 4000), text(2500, 2500)
    requests = []
    for _ in range(4):
        prompt = main + text(200, 800)
        user = True
        for _ in range(draw.randint(8, 16)):
            answer = text(40, 200)
            requests.append((len(main), list(prompt), answer, user))
            if draw.random() < 0.15:  # a side question about what there is so far, such as a title
                requests.append((len(main), prompt + answer + text(20, 40), text(10, 20), True))
            if draw.random() < 0.12:
                small = sub + text(100, 300)
                for _ in range(draw.randint(2, 4)):
                    reply = text(40, 120)
                    requests.append((len(sub), list(small), reply, False))
                    small = small + reply + text(200, 900)
            prompt = prompt + answer + text(200, 1500)
            user = False
    return requests


STREAMS = {"chat": chat, "chat, thinking dropped": lambda seed: chat(seed, stripped=True), "agent": agent}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("limit", [4, 10, 30])
def test_the_rule_saves_at_least_what_a_plain_lru_saves(name, limit):
    streams = [STREAMS[name](seed) for seed in range(3)]
    rule = sum(reused(Snapshots(limit), s) for s in streams) / len(streams)
    plain = sum(reused(Lru(limit), s) for s in streams) / len(streams)
    assert rule >= plain - 1, f"{rule:.1f} % against {plain:.1f} %"


def test_thirty_snapshots_save_nearly_what_unlimited_ones_would():
    for name, stream in STREAMS.items():
        streams = [stream(seed) for seed in range(3)]
        rule, upper = (sum(reused(kind(limit), s) for s in streams) for kind, limit in ((Snapshots, 30), (Lru, 10**9)))
        assert rule >= 0.97 * upper, f"{name}: {rule / 3:.1f} % of {upper / 3:.1f} %"


def test_the_last_token_of_a_prompt_is_never_reused():
    store = Snapshots(4)
    store.put([1, 2, 3], "caches", "prompt")
    assert store.use([1, 2, 3], True) is None
    assert store.use([1, 2, 3, 4], True) == ("caches", 3)


def test_a_conversation_that_went_on_gives_up_its_past_first():
    store = Snapshots(4)
    store.put([1], None, "system")
    store.put([1, 2], None, "prompt")
    store.put([1, 2, 3], "old", "answer")
    store.put([9], "other", "prompt")
    assert store.use([1, 2, 3, 4, 5], True).held == 3
    store.put([1, 2, 3, 4], None, "prompt")
    store.put([1, 2, 3, 4, 5, 6], None, "answer")
    assert store.use([9, 9], True) == ("other", 1)  # older than what was demoted, and still there
    assert store.use([1, 7], True).held == 1


def test_tools_turns_demote_nothing():
    store = Snapshots(3)
    store.put([1, 2], "answer", "answer")
    store.put([9], "other", "prompt")
    assert store.use([1, 2, 3], False).held == 2
    store.put([1, 2, 3], None, "prompt")
    store.put([1, 2, 3, 4], None, "answer")
    assert store.use([9, 9], True) is None
    assert store.use([1, 2, 8], False).held == 2


def test_a_hit_on_what_is_first_to_go_moves_it():
    store = Snapshots(8)
    store.put([1], "prompt", "prompt")
    store.put([1, 2], "answer", "answer")
    assert store.use([1, 2, 3], True).held == 2
    assert len(store) == 2
    assert store.use([1, 7], True) == ("prompt", 1)
    assert len(store) == 1


def test_the_end_of_an_answer_serves_an_edit_of_the_turn_behind_it_but_not_for_long():
    store = Snapshots(4)
    store.put([9], "other", "prompt")
    store.put([1, 2], "answer", "answer")
    assert store.use([1, 2, 3], True).held == store.use([1, 2, 4], True).held == 2
    store.put([1, 2, 4], None, "prompt")
    store.put([1, 2, 4, 5], None, "answer")
    store.put([8], None, "prompt")
    assert store.use([9, 9], True) == ("other", 1)  # older, and still there
    assert store.use([1, 2, 6], True) is None


def test_system_prompts_go_last():
    store = Snapshots(2)
    store.put([1], "system", "system")
    for n in range(5):
        store.put([7, n], None, "prompt")
    assert store.use([1, 5], True) == ("system", 1)


def test_the_end_of_a_system_prompt_stays_one_when_a_prompt_ends_there_too():
    store = Snapshots(2)
    store.put([1], None, "system")
    store.put([1], "new", "prompt")
    assert len(store) == 1
    for n in range(5):
        store.put([7, n], None, "prompt")
    assert store.use([1, 5], True) == ("new", 1)


def test_a_beginning_of_few_tokens_is_nothing_to_go_on_from(monkeypatch):
    monkeypatch.setattr(reuse, "FEWEST", FEWEST)
    store, tokens = Snapshots(8), list(range(40))
    store.put(tokens[: FEWEST - 1], "few", "prompt")
    assert store.use(tokens, True) is None
    assert store.use(tokens[:FEWEST], True) == ("few", FEWEST - 1)  # the same prompt once more
    store.put(tokens[:FEWEST], "enough", "prompt")
    assert store.use(tokens, True) == ("enough", FEWEST)


def test_no_room_means_no_snapshot():
    store = Snapshots(0)
    store.put([1], None, "prompt")
    assert len(store) == 0 and store.use([1, 2], True) is None
