"""mlx-lm's batched generation with these caches: each sequence's greedy tokens as alone, within its budget."""

import importlib
from functools import cache
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest
import tiny
from architectures import SLIDING, build
from mlx_lm.models import cache as mlx_lm_cache
from test_saved import falcon

import zm_mlx
from zm_mlx.host.batch import ZeroMergeBatch
from zm_mlx.host.model_caches import members, zero_merge
from zm_mlx.phases import PIECE
from zm_mlx.policies import H2O, Policy

mlx_lm_generate = importlib.import_module("mlx_lm.generate")

LENGTHS = [1, 2, 3, 17, 64, 129, 333, 600]
BUDGETS = [96, 64, 48, 128, 96, 48, 96, 64]
NEW = 14
STEP = 37


def prompts(lengths=tuple(LENGTHS)):
    return [tiny.prompt(n, seed=n)[0].tolist() for n in lengths]


@cache
def model():
    return tiny.model()


def alone(made, tokens, caches, new=NEW, step=STEP):
    """Greedy tokens after a prompt, as ``mlx_lm.stream_generate`` makes them."""
    steps = mlx_lm_generate.generate_step(
        mx.array(tokens), made, max_tokens=new, prompt_cache=caches, prefill_step_size=step
    )
    return [token for token, _ in steps]


@cache
def expected():
    pairs = zip(prompts(), BUDGETS, strict=True)
    return [alone(model(), p, zm_mlx.make_prompt_cache(model(), b)) for p, b in pairs]


def generator(made, **more):
    return mlx_lm_generate.BatchGenerator(made, **{"max_tokens": NEW, "prefill_step_size": STEP, **more})


class Run:
    """The tokens of the sequences of a generator, and the caches they ended with."""

    def __init__(self, generator):
        self.generator = generator
        self.tokens = {}
        self.ended = {}

    def insert(self, tokens, caches, **more):
        (uid,) = self.generator.insert([tokens], caches=[caches], **more)
        self.tokens[uid] = []
        return uid

    def step(self):
        """One step; whether anything was to do."""
        read, made = self.generator.next()
        for r in made:
            self.tokens[r.uid].append(r.token)
            if r.finish_reason:
                self.ended[r.uid] = r.prompt_cache
        return bool(read or made)

    def finish(self):
        while self.step():
            pass
        return self


# ---- alone and in any batch


@pytest.mark.parametrize("more", [{}, {"prefill_batch_size": 3, "completion_batch_size": 4}], ids=["all", "few"])
def test_tokens_are_those_of_each_prompt_alone(more):
    run = Run(generator(model(), **more))
    uids = [run.insert(p, zm_mlx.make_prompt_cache(model(), b)) for p, b in zip(prompts(), BUDGETS, strict=True)]
    run.finish()
    assert [run.tokens[u] for u in uids] == expected()


def test_the_prompts_are_compressed_and_a_full_cache_says_something_else():
    """Or the tests around would compare nothing."""
    for p, found in list(zip(prompts(), expected(), strict=True))[-3:]:
        assert alone(model(), p, mlx_lm_cache.make_prompt_cache(model())) != found


def test_sequences_that_join_late_and_leave_early_change_no_other():
    run = Run(generator(model(), prefill_batch_size=2))
    order = [7, 0, 6, 5, 1, 4, 3, 2]
    uids, gone = {}, []
    for i in order:
        uids[i] = run.insert(prompts()[i], zm_mlx.make_prompt_cache(model(), BUDGETS[i]))
        gone.append(run.insert(prompts()[i][::-1], zm_mlx.make_prompt_cache(model(), 48)))
        for _ in range(4):
            run.step()
        if len(gone) == 3:  # some of them in the middle of their prompts
            run.generator.remove(gone)
            gone = []
    run.generator.remove(gone)
    run.finish()
    assert [run.tokens[uids[i]] for i in range(8)] == expected()


def test_a_sequence_of_all_tokens_but_one_removed_in_its_prompt_goes_on_from_its_cache():
    tokens = prompts()[6]
    run = Run(generator(model()))
    other = run.insert(prompts()[7], zm_mlx.make_prompt_cache(model(), BUDGETS[7]))
    uid = run.insert(tokens, zm_mlx.make_prompt_cache(model(), BUDGETS[6]))
    run.step()
    run.step()
    caches, read = run.generator.remove([uid], return_prompt_caches=True)[uid]
    assert read == tokens[: 2 * STEP]
    reference = zm_mlx.make_prompt_cache(model(), BUDGETS[6])
    tiny.feed(model(), reference, mx.array(tokens)[None, : 2 * STEP], STEP)
    for c in reference:
        c.finish_prompt()
    assert run.finish().tokens[other] == expected()[7]
    assert alone(model(), tokens[2 * STEP :], caches) == alone(model(), tokens[2 * STEP :], reference)


def test_segments_of_a_prompt_give_the_tokens_of_the_whole():
    run = Run(generator(model()))
    parts = []
    for p in prompts()[4:]:
        first, second = len(p) // 5, len(p) // 2
        parts.append([p[:first], p[first:second], p[second:]])
    caches = [zm_mlx.make_prompt_cache(model(), b) for b in BUDGETS[4:]]
    uids = run.generator.insert_segments(parts, caches=caches)
    run.tokens = {u: [] for u in uids}
    run.finish()
    assert [run.tokens[u] for u in uids] == expected()[4:]


def test_continued_caches_give_the_tokens_of_each_alone_and_stay_as_they_were():
    run = Run(generator(model()))
    uids = [run.insert(p, zm_mlx.make_prompt_cache(model(), b)) for p, b in zip(prompts(), BUDGETS, strict=True)]
    run.finish()
    saved = [run.ended[u] for u in uids]
    turns = prompts([40, 1, 5, 90, 2, 7, 33, 64])
    again = [run.insert(t, caches) for t, caches in zip(turns, saved, strict=True)]
    run.finish()
    for uid, turn, caches in zip(again, turns, saved, strict=True):
        assert run.tokens[uid] == alone(model(), turn, caches)


def test_a_snapshot_in_mid_stream_goes_on_as_the_sequence_does():
    run = Run(generator(model(), max_tokens=40))
    uids = [run.insert(p, zm_mlx.make_prompt_cache(model(), 64)) for p in prompts([200, 90])]
    while len(run.tokens[uids[0]]) < 10:
        run.step()
    caches, read = run.generator.extract_cache(uids)[uids[0]]
    begin = len(read) - 200  # the token that was sampled, and is not in the cache yet
    whole = run.finish().tokens[uids[0]]
    assert begin >= 10
    assert alone(model(), [whole[begin]], caches, 20) == whole[begin + 1 :][:20]


def test_exact_prompts_in_a_batch_are_compressed_as_alone():
    def caches(p):
        return zm_mlx.make_prompt_cache(model(), 64, prompt_length=len(p), prefill="exact")

    some = prompts([600, 70, 1, 2, 150])
    run = Run(generator(model(), prefill_batch_size=3))
    uids = [run.insert(p, caches(p)) for p in some]
    run.finish()
    assert [run.tokens[u] for u in uids] == [alone(model(), p, caches(p)) for p in some]


def test_policies_budgets_and_layouts_side_by_side():
    kinds = [
        {"kv_budget": 48, "policy": Policy()},
        {"kv_budget": 96, "policy": H2O()},
        {"kv_budget": None, "head_rows": [[40, 90], [70, 30]]},
        {"kv_budget": 4096},
    ]
    some = prompts([150, 151, 152, 153])
    run = Run(generator(model()))
    uids = [run.insert(p, zm_mlx.make_prompt_cache(model(), **k)) for p, k in zip(some, kinds, strict=True)]
    run.finish()
    found = [alone(model(), p, zm_mlx.make_prompt_cache(model(), **k)) for p, k in zip(some, kinds, strict=True)]
    assert [run.tokens[u] for u in uids] == found


def test_a_prompt_in_one_call_of_several_chunks_counts_its_rows_down():
    """``PromptProcessingBatch`` of direct users: one call of ``prompt`` runs many chunks, some rows end before."""
    made, some = model(), prompts([100, 41, 1, 37])
    batch = mlx_lm_generate.PromptProcessingBatch(
        made,
        list(range(4)),
        [zm_mlx.make_prompt_cache(made, 48) for _ in some],
        prefill_step_size=20,
        max_tokens=[9] * 4,
    )
    decoding = batch.generate(some)
    found = [[r.token for r in decoding.next()] for _ in range(8)]
    for i, p in enumerate(some):
        assert [row[i] for row in found] == alone(made, p, zm_mlx.make_prompt_cache(made, 48), 8, step=20)


# ---- models with other caches beside ours


@pytest.mark.parametrize("name", [*SLIDING, "falcon_h1"])
def test_models_with_bounded_caches_of_their_own(name):
    made = falcon() if name == "falcon_h1" else build(name)
    some = prompts([70, 9, 40, 1])
    run = Run(generator(made, max_tokens=8, prefill_step_size=16, prefill_batch_size=2))
    uids = [run.insert(p, zm_mlx.make_prompt_cache(made, b)) for p, b in zip(some, [24, 32, 24, 32], strict=True)]
    run.step()
    assert any(isinstance(c, ZeroMergeBatch) for c in members(run.generator._prompt_batch.prompt_cache))
    run.finish()
    for uid, p, b in zip(uids, some, [24, 32, 24, 32], strict=True):
        assert run.tokens[uid] == alone(made, p, zm_mlx.make_prompt_cache(made, b), 8, 16)


# ---- the way in


class Tokenizer(SimpleNamespace):
    """What ``batch_generate`` asks of a tokenizer."""

    eos_token_ids = ()

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def test_batch_generate_takes_the_caches_and_leaves_them_empty():
    caches = [zm_mlx.make_prompt_cache(model(), b) for b in BUDGETS]
    response = mlx_lm.batch_generate(
        model(),
        Tokenizer(),
        prompts(),
        prompt_caches=caches,
        max_tokens=NEW,
        return_prompt_caches=True,
        return_token_ids=True,
        prefill_step_size=STEP,
    )
    assert response.token_ids == expected()
    assert all(c.empty() for own in caches for c in own)
    assert [own[0].offset for own in response.caches] == [n + NEW for n in LENGTHS]


# ---- memory


def piece_bytes(made):
    """Keys, values, scores, readings and queries of one piece, in all layers (float32)."""
    layer = made.args
    width = 2 * layer.head_dim * layer.num_key_value_heads + layer.head_dim * layer.num_attention_heads
    return PIECE * layer.num_hidden_layers * 4 * (width + 2 * layer.num_key_value_heads)


def test_memory_is_that_of_sequences_and_snapshots_at_every_step():
    """Joins, splits, snapshots in prompts and in answers, ends; beyond that a piece for each prompt being read."""
    made = tiny.model(head_dim=32, hidden=32)
    plan, piece = zm_mlx.plan_cache(made, 512), piece_bytes(made)
    run = Run(generator(made, max_tokens=12, prefill_step_size=256, prefill_batch_size=3, completion_batch_size=6))
    waiting = prompts([900, 700, 1200, 80, 1500, 640])
    snapshots, spare, most_reading = [], [], 0

    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    for step in range(200):
        if waiting:
            run.insert(waiting.pop(0), plan.caches(made))
        if not run.step():
            break
        reading, decoding = run.generator._prompt_batch.uids, run.generator._generation_batch.uids
        if step % 4 == 2:  # of one that is read, and of one that is answered
            taken = run.generator.extract_cache([*reading[:1], *decoding[:1]])
            snapshots = [*snapshots, *(caches for caches, _ in taken.values())][-4:]
        mx.synchronize(run.generator.stream)
        held = len(reading) + len(decoding) + len(snapshots) + len(run.ended)
        allowed = 1.05 * held * plan.nbytes + len(reading) * piece
        spare.append(allowed - (mx.get_active_memory() - before))
        most_reading = max(most_reading, len(reading))
    assert len(run.ended) == 6
    assert most_reading == 3
    assert min(spare) >= 0
    for own in [*snapshots, *run.ended.values()]:
        assert sum(c.nbytes for c in zero_merge(own)) <= plan.nbytes
