"""Speculative decoding gives the tokens of decoding without a draft, whatever is drafted; errors name the flag."""

import importlib
import json
import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from commands import document, run
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from tiny import assert_same_state, feed, model, prompt

import zm_mlx
from zm_mlx import cache_prompt, generate
from zm_mlx.drafting import Draft, caches_for
from zm_mlx.engine import Engine, Settings
from zm_mlx.flags import DEFAULT_MODEL
from zm_mlx.host import saved
from zm_mlx.host.caches import CacheSet
from zm_mlx.host.lookup import PromptLookup
from zm_mlx.host.model_caches import zero_merge
from zm_mlx.loading import Source, load_vocabulary

mlx_lm_generate = importlib.import_module("mlx_lm.generate")
PERIOD = 7


class Noisy:
    """A draft model: the model itself, which now and then is wrong."""

    def __init__(self, made, share=0.4):
        self.made, self.share, self.layers = made, share, made.layers
        self.random = np.random.default_rng(1)

    def __call__(self, tokens, cache=None):
        logits = self.made(tokens, cache=cache)
        return logits + 100 * (mx.random.uniform(shape=logits.shape) if self.random.random() < self.share else 0)


@pytest.fixture(scope="module")
def made():
    return model()


def caches_of(made, rows, length, prefill):
    return zm_mlx.make_prompt_cache(made, rows, prompt_length=length, prefill=prefill)


def plain(made, text, caches, count):
    steps = mlx_lm_generate.generate_step(text, made, max_tokens=count, prompt_cache=caches)
    return [int(token) for token, _ in steps]


def speculated(made, text, caches, count, draft, k, **more):
    """Tokens, and how many of them were drafted."""
    steps = mlx_lm_generate.speculative_generate_step(
        text, made, draft, num_draft_tokens=k, max_tokens=count, prompt_cache=caches, **more
    )
    found = [(int(token), drafted) for token, _, drafted in steps]
    return [token for token, _ in found], sum(drafted for _, drafted in found)


# Rows, and a prompt of less, of more, and of more than one piece: each here in one of the ways to read it.
CASES = [(24, 2, "exact"), (24, 70, "streaming"), (64, 300, "exact"), (33, 520, "streaming")]
OTHER_WAY = {"exact": "streaming", "streaming": "exact"}


@pytest.mark.parametrize(
    ("rows", "length", "prefill"),
    [*CASES, *(pytest.param(n, m, OTHER_WAY[way], marks=pytest.mark.exhaustive) for n, m, way in CASES)],
)
def test_tokens_are_those_without_a_draft(made, rows, length, prefill):
    text, count = prompt(length)[0], 60
    expected = plain(made, text, caches_of(made, rows, length, prefill), count)
    assert len(set(expected)) > 2
    accepted = []
    for k, bounded in [(1, True), (3, False), (8, True)]:
        own = caches_of(made, rows, length, prefill)
        drafts = zm_mlx.make_prompt_cache(made, rows) if bounded else make_prompt_cache(made)
        with zm_mlx.rollback([*own, *drafts], k):
            found, drafted = speculated(made, text, [*own, *drafts], count, Noisy(made), k)
        assert found == expected, (k, bounded)
        accepted.append(drafted)
    assert min(accepted) > 0 and max(accepted) < count - 1  # some were accepted, some were not


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
def test_tokens_are_those_without_a_draft_at_two_thousand_rows(made, prefill):
    rows, length, count = 2048, 2500, 40
    text = prompt(length)[0]
    expected = plain(made, text, caches_of(made, rows, length, prefill), count)
    own, drafts = caches_of(made, rows, length, prefill), zm_mlx.make_prompt_cache(made, 256)
    with zm_mlx.rollback([*own, *drafts], 5):
        found, drafted = speculated(made, text, [*own, *drafts], count, Noisy(made), 5)
    assert found == expected and drafted


@pytest.mark.parametrize("step", [1, 2, 3, 512])
def test_the_ends_of_prompts_are_no_decoding_however_short(made, step):
    """A call of a prompt may be as short as one that verifies drafts."""
    text, count = prompt(62)[0], 40
    own = caches_of(made, 24, 62, "streaming")
    steps = mlx_lm_generate.generate_step(text, made, max_tokens=count, prompt_cache=own, prefill_step_size=step)
    expected = [int(token) for token, _ in steps]
    for draft, more in ((made, zm_mlx.make_prompt_cache(made, 24)), (PromptLookup(), [])):
        own = caches_of(made, 24, 62, "streaming")
        with zm_mlx.rollback([*own, *more], 8):
            found, _ = speculated(made, text, [*own, *more], count, draft, 8, prefill_step_size=step)
        assert found == expected


@pytest.mark.parametrize("policy", [zm_mlx.Policy(), zm_mlx.Policy(score="attention")], ids=["paper", "attention"])
def test_other_policies_give_their_tokens_too(made, policy):
    text, count = prompt(100)[0], 60
    own = [zm_mlx.make_prompt_cache(made, 30, policy=policy) for _ in range(2)]
    expected = plain(made, text, own[0], count)
    with zm_mlx.rollback(own[1], 4):
        assert speculated(made, text, own[1], count, PromptLookup(), 4)[0] == expected


def test_the_draft_that_is_always_right_is_always_accepted(made):
    """Also once its own caches have compacted: they are rolled back as the model's are."""
    text = prompt(60)[0]
    own, drafts = (zm_mlx.make_prompt_cache(made, 32) for _ in range(2))
    with zm_mlx.rollback([*own, *drafts], 3):
        _, drafted = speculated(made, text, [*own, *drafts], 80, made, 3)
    assert drafted == 60


@pytest.mark.parametrize("k", [1, 6])
def test_caches_end_with_the_state_of_plain_feeding(made, k):
    text = prompt(50)[0]
    own, drafts, fed = (zm_mlx.make_prompt_cache(made, 32) for _ in range(3))
    with zm_mlx.rollback([*own, *drafts], k):
        tokens, _ = speculated(made, text, [*own, *drafts], 70, Noisy(made), k)
    feed(made, fed, text[None, :-1])
    seen = own[0].offset
    assert seen in (50 + 69, 50 + 70)  # the last token was drafted, or not
    feed(made, fed, mx.array([[*text[-1:].tolist(), *tokens]])[:, : seen - 49], 1)
    for a, b in zip(own, fed, strict=True):
        assert_same_state(a, b)


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("taken", [1, 2, 5, 6, 11])
def test_who_stops_reading_finds_the_caches_with_what_was_given_and_no_more(made, lookup, taken):
    """Whether the iterator is closed within the scope or forgotten until after it."""
    text = mx.array([1, 2, 3, 4, 5, 6, 7] * 6)
    for close in (True, False):
        own = zm_mlx.make_prompt_cache(made, 30)
        drafts = [] if lookup else zm_mlx.make_prompt_cache(made, 30)
        with zm_mlx.rollback([*own, *drafts], 4):
            steps = mlx_lm_generate.speculative_generate_step(
                text, made, PromptLookup() if lookup else made, num_draft_tokens=4, prompt_cache=[*own, *drafts]
            )
            for _ in range(taken):
                next(steps)
            if close:
                steps.close()
        steps.close()
        assert {c.offset for c in own} <= {text.size + taken - 1, text.size + taken}
        assert len({c.offset for c in own}) == 1


def test_a_draft_model_s_caches_outside_of_the_scope_are_refused(made):
    """mlx-lm does not look at them, and what they could not take back would stay."""
    own, drafts = (zm_mlx.make_prompt_cache(made, 30) for _ in range(2))
    with zm_mlx.rollback(own, 2), pytest.raises(ValueError, match="rollback"):
        speculated(made, prompt(9)[0], [*own, *drafts], 9, made, 2)
    with pytest.raises(ValueError, match="rollback"):
        speculated(made, prompt(9)[0], [*make_prompt_cache(made), *drafts], 9, made, 2)


@pytest.mark.parametrize("draft", ["model", "lookup"])
def test_outside_of_the_scope_generation_does_not_start(made, draft):
    own = zm_mlx.make_prompt_cache(made, 30)
    more = make_prompt_cache(made) if draft == "model" else []
    with pytest.raises(ValueError, match=r"trimmable|rollback"):
        speculated(made, prompt(9)[0], [*own, *more], 9, made if draft == "model" else PromptLookup(), 2)


def test_full_caches_speculate_as_before(made):
    text = prompt(40)[0]
    expected = plain(made, text, make_prompt_cache(made), 40)
    for draft, more in ((Noisy(made), make_prompt_cache(made)), (PromptLookup(), [])):
        found, _ = speculated(made, text, [*make_prompt_cache(made), *more], 40, draft, 3)
        assert found == expected


# ---- prompt lookup


def test_a_lookup_proposes_what_followed_the_longest_last_match():
    lookup = PromptLookup([1, 2, 3, 9, 5, 2, 3, 7, 8, 4])
    assert lookup.propose(3) == []  # 8, 4 is new
    lookup.extend([2, 3])
    assert lookup.propose(3) == [7, 8, 4]  # the last time, not the first
    lookup = PromptLookup([1, 2, 3, 9, 5, 2, 3, 7, 1, 2, 3])
    assert lookup.propose(2) == [9, 5]  # three tokens that are the same count more than two
    assert lookup.propose(0) == []


def test_a_lookup_goes_on_with_a_period():
    assert PromptLookup([5, 6, 7, 5, 6, 7, 5, 6]).propose(7) == [7, 5, 6, 7, 5, 6, 7]
    assert PromptLookup([4, 4, 4, 4]).propose(3) == [4, 4, 4]


def test_a_lookup_takes_no_more_tokens_than_are_asked_for(made):
    text = mx.array(list(range(PERIOD)) * 6)
    for count in (1, 2, 5, 9):
        own = zm_mlx.make_prompt_cache(made, 64)
        with zm_mlx.rollback(own, 8):
            found, _ = speculated(made, text, own, count, PromptLookup(), 8)
        assert len(found) == count


def test_sampled_tokens_keep_their_distribution():
    """Drafts are compared with what is drawn, so they change no probability."""
    made = model(vocab=4, layers=1)
    text = mx.array([0, 1, 2, 0, 1, 2, 0, 1])
    sampler = mlx_lm.sample_utils.make_sampler(1.5)
    found = {}
    for speculative in (False, True):
        mx.random.seed(3)
        counts = Counter()
        for _ in range(200):
            own = zm_mlx.make_prompt_cache(made, 24)
            if speculative:
                with zm_mlx.rollback(own, 2):
                    tokens, _ = speculated(made, text, own, 2, PromptLookup(), 2, sampler=sampler)
            else:
                steps = mlx_lm_generate.generate_step(text, made, max_tokens=2, prompt_cache=own, sampler=sampler)
                tokens = [int(token) for token, _ in steps]
            counts[tuple(tokens)] += 1
        found[speculative] = counts
    pairs = set(found[False]) | set(found[True])
    distance = sum(abs(found[False][p] - found[True][p]) for p in pairs) / 400
    assert distance < 0.3  # two samples of 200 over 16 pairs differ by about 0.15


# ---- the engine and the command


def engine_of(made):
    return Engine(made, load_vocabulary(Source(DEFAULT_MODEL)).tokenizer, "tiny")


@pytest.mark.parametrize("lookup", [True, False])
def test_an_interrupt_of_the_engine_leaves_caches_that_go_on(lookup, monkeypatch):
    made = model(vocab=4096)
    text = prompt(60, vocab=90)[0].tolist()
    own, expected = (zm_mlx.make_prompt_cache(made, 40) for _ in range(2))
    draft = Draft(4) if lookup else Draft(4, "x", made, caches_for(made, "x", CacheSet("zeromerge", own, own)))
    steps = engine_of(made).generate(text, own, Settings(max_tokens=50), draft=draft)
    given = [next(steps).token for _ in range(6)]
    take, calls = type(own[1]).attend, iter(range(100))

    def fail(self, *args):
        if self is own[1] and next(calls) == 1:  # in the middle of the second call of the model from here
            raise KeyboardInterrupt
        return take(self, *args)

    monkeypatch.setattr(type(own[1]), "attend", fail)
    with pytest.raises(KeyboardInterrupt):
        for response in steps:
            given.append(response.token)
    monkeypatch.undo()
    held = {c.offset for c in own}
    assert len(held) == 1 and not any(c.pending or c.is_trimmable() for c in [*own, *draft.every])
    known = [*text, *given][: held.pop()]
    assert len(known) >= len(text) + len(given) - 1 - 5
    feed(made, expected, mx.array([known[:59]]))
    feed(made, expected, mx.array([known[59:]]), 1)
    for a, b in zip(own, expected, strict=True):
        assert_same_state(a, b)


def test_a_draft_model_gets_the_budget_of_the_model_where_it_is_served(made):
    own = zm_mlx.make_prompt_cache(made, 48)
    main = CacheSet("zeromerge", own, own)
    bounded = caches_for(made, "x", main)
    assert [c.layout.rows for c in zero_merge(bounded.every)] == [c.layout.rows for c in own]
    assert not zero_merge(caches_for(made, "x", CacheSet("full", make_prompt_cache(made), [])).every)
    made.make_cache = lambda: [RotatingKVCache(16), *make_prompt_cache(model())[1:]]
    try:
        with pytest.raises(zm_mlx.errors.UserError, match=r"--draft-model x: .*RotatingKVCache"):
            caches_for(made, "x", main)
    finally:
        del made.make_cache


QUOTED = "one two three four five six seven eight nine ten, " * 6


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """The small model in float32, so that its tokens are the same in calls of any length."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(DEFAULT_MODEL, folder)
    for file in folder.glob("*.safetensors"):
        weights = {name: x.astype(mx.float32) for name, x in mx.load(str(file)).items()}
        mx.eval(weights)
        mx.save_safetensors(str(file), weights)
    return str(folder)


@pytest.mark.parametrize("prefill", ["streaming", "exact"])
@pytest.mark.parametrize(
    "draft", [["--prompt-lookup"], ["--prompt-lookup", "--num-draft-tokens", "2"], ["--draft-model"]]
)
def test_the_command_s_text_is_that_without_a_draft(capsys, wide, prefill, draft):
    argv = ["--model", wide, "--prompt", QUOTED, "--kv-budget", "48", "--prefill", prefill, "-m", "40", "--json"]
    code, out, err = run(generate.main, capsys, *argv)
    assert code == 0, err
    more = [*draft, wide] if draft == ["--draft-model"] else draft
    code, speculated, err = run(generate.main, capsys, *argv, *more)
    assert code == 0, err
    expected, found = document(out), document(speculated)
    assert found["text"] == expected["text"]
    assert found["draft"]["accepted_tokens"] > 0
    assert "tokens came from it" in speculated


def test_full_caches_take_a_draft_and_no_limit_takes_one(capsys, wide):
    for cache in ("full", "zeromerge"):
        argv = ["--model", wide, "--prompt", QUOTED, "--cache", cache, "-m", "30", "--draft-model", wide, "--json"]
        code, out, err = run(generate.main, capsys, *argv)
        assert code == 0, err
        assert document(out)["generation_tokens"] == 30
    assert "draft" in document(out)


def test_a_draft_model_with_other_tokens_is_refused_by_its_flag(capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(DEFAULT_MODEL, other)
    file = other / "tokenizer.json"
    contents = json.loads(file.read_text())
    vocabulary = contents["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)
    vocabulary[words[-1]], vocabulary[words[-2]] = vocabulary[words[-2]], vocabulary[words[-1]]
    file.write_text(json.dumps(contents))
    code, _, err = run(generate.main, capsys, "--prompt", "x", "--draft-model", str(other))
    assert code == 2 and "--draft-model" in err and "tokenizer" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--draft-model", "nowhere/at-all-x"], "--draft-model nowhere/at-all-x"),
        (["--draft-model", ""], "--draft-model needs a name"),
        (["--draft-model", DEFAULT_MODEL, "--prompt-lookup"], "give one of them"),
        (["--num-draft-tokens", "3"], "--num-draft-tokens needs --draft-model or --prompt-lookup"),
        (["--prompt-lookup", "--num-draft-tokens", "0"], "--num-draft-tokens must be"),
        (["--prompt-lookup", "--num-draft-tokens", "many"], "--num-draft-tokens must be"),
        (["--prompt-lookup", "--compare"], "--compare does not go with --prompt-lookup"),
        (["--draft-model", DEFAULT_MODEL, "--cache", "rotating"], "--cache rotating does not go with --draft-model"),
    ],
)
def test_drafts_that_do_not_work_are_one_line(capsys, argv, words):
    code, _, err = run(generate.main, capsys, "--prompt", "x", *argv)
    assert code == 2 and words in err and len(err.splitlines()) == 1


def test_a_saved_prompt_goes_on_with_prompt_lookup(capsys, wide, tmp_path):
    from zm_mlx import cache_prompt

    file = str(Path(tmp_path) / "a.safetensors")
    code, _, err = run(
        cache_prompt.main, capsys, "--model", wide, "--prompt", QUOTED, "--kv-budget", "48", "--prompt-cache-file", file
    )
    assert code == 0, err
    argv = ["--prompt", QUOTED, "--prompt-cache-file", file, "-m", "30", "--json"]
    texts = [document(run(generate.main, capsys, *argv, *more)[1])["text"] for more in ([], ["--prompt-lookup"])]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("known", [True, False])
def test_a_draft_model_goes_on_from_a_saved_prompt_that_it_has_or_has_not_read(capsys, tmp_path, wide, known):
    """The tokens are those without a draft; where the file says the prompt's tokens, the draft reads them too."""
    file = str(tmp_path / "saved.safetensors")
    code, _, err = run(
        cache_prompt.main, capsys, "--model", wide, "--prompt", QUOTED, "--prompt-cache-file", file, "--kv-budget", "48"
    )
    assert code == 0, err
    if not known:
        caches, metadata = saved.read(file)
        saved.save_prompt_cache(file, caches, {k: v for k, v in metadata.items() if k != "tokens"})
    argv = ["--prompt-cache-file", file, "--prompt", "one two three four", "-m", "40", "--json"]
    code, out, err = run(generate.main, capsys, *argv)
    assert code == 0, err
    expected, accepted = document(out)["text"], {}
    for name, draft in {"model": ["--draft-model", wide], "lookup": ["--prompt-lookup"]}.items():
        code, out, err = run(generate.main, capsys, *argv, *draft)
        assert code == 0, err
        assert document(out)["text"] == expected
        accepted[name] = document(out)["draft"]["accepted_tokens"]
    assert accepted["model"] == 30 if known else accepted["model"] < 30  # all that 40 tokens can be
