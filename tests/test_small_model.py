"""The model that ships with the package is small, loads anywhere, and has learned to retrieve."""

import copy
import json
import re
import shlex
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import document, run
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache as full_cache

import zm_mlx
from zm_mlx import generate
from zm_mlx.flags import DEFAULT_MODEL

DISTANCE = 1024
DOCUMENTS, FACTS = 2, 8


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(DEFAULT_MODEL)
    model.set_dtype(mx.float32)  # float16 is slow on a CPU
    return model, tokenizer


def documents(tokenizer):
    """Documents of text that is not in any training corpus (this package's own), with facts and questions."""
    rng = np.random.default_rng(7)
    sources = sorted((Path(zm_mlx.__file__).parent).glob("*.py"))
    text = tokenizer.encode("\n".join(p.read_text() for p in sources), add_special_tokens=False)
    for i in range(DOCUMENTS):
        names = ["".join(rng.choice(list(s)) for s in ("bdgklmn", "aeiou", "prstv", "aeiou")) for _ in range(FACTS)]
        facts = {name.capitalize(): str(rng.integers(10000, 100000)) for name in names}
        filler = iter(text[i * 2000 : (i + 1) * 2000])
        tokens = [tokenizer.bos_token_id] + [next(filler) for _ in range(60)]
        for name, code in facts.items():
            tokens += tokenizer.encode(f"\nThe code for {name} is {code}.\n", add_special_tokens=False)
            tokens += [next(filler) for _ in range(20)]
        tokens += [next(filler) for _ in range(DISTANCE - 140)]
        yield tokens, facts


def answers(model, tokenizer, tokens, facts, caches):
    """Greedy answers to every question, each asked on its own after the document."""
    for begin in range(0, len(tokens), 512):
        model(mx.array(tokens[begin : begin + 512])[None], cache=caches)
        mx.eval([c.state for c in caches])
    found = {}
    for name in facts:
        mine = copy.deepcopy(caches)
        ask = mx.array(tokenizer.encode(f"\nThe code for {name} is", add_special_tokens=False))[None]
        said = []
        for _ in range(7):
            token = mx.argmax(model(ask, cache=mine)[:, -1], axis=-1)
            said.append(token.item())
            ask = token[None]
        found[name] = tokenizer.decode(said).strip()[:5]
    return found


def test_recall_at_distance_1024_survives_export_and_mlx(loaded):
    model, tokenizer = loaded
    right = total = 0
    for tokens, facts in documents(tokenizer):
        assert len(tokens) > DISTANCE
        found = answers(model, tokenizer, tokens, facts, full_cache(model))
        right += sum(found[name] == code for name, code in facts.items())
        total += len(facts)
    assert total == 16 and right >= 15, f"{right} of {total} codes"


def test_zero_merge_answers_as_the_full_cache_while_everything_fits(loaded):
    model, tokenizer = loaded
    tokens, facts = next(documents(tokenizer))
    few = dict(list(facts.items())[:2])
    full = answers(model, tokenizer, tokens, few, full_cache(model))
    assert answers(model, tokenizer, tokens, few, zm_mlx.make_prompt_cache(model, 2048)) == full


def test_small_model_stays_small_and_is_a_plain_llama():
    folder = Path(DEFAULT_MODEL)
    config = json.loads((folder / "config.json").read_text())
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 12e6
    assert config["model_type"] == "llama" and config["max_position_embeddings"] == 4096
    assert 1024 <= config["vocab_size"] <= 2048


def test_tokenizer_round_trips_any_text_and_keeps_digits_single(loaded):
    _, tokenizer = loaded
    text = "def f(x):\n\treturn 'naïve — κ 漢字' + str(90210)\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("90210", add_special_tokens=False)] == list("90210")


@pytest.fixture
def first_command(monkeypatch):
    """Arguments of the first command of the README, as from the root of the checkout."""
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    return shlex.split((root / "README.md").read_text().partition("-m zm_mlx.generate ")[2].partition("\n")[0])


def test_the_first_command_shows_an_answer_that_survives_and_one_that_is_lost(capsys, first_command):
    code, out, _ = run(generate.main, capsys, *first_command, "--json")
    told = document(out)
    handbook = (Path(DEFAULT_MODEL) / "handbook.txt").read_text()
    asked = handbook.splitlines()[-1].split()[-2]
    (answer,) = re.findall(rf"The code for {asked} is (\d{{5}})\.", handbook)
    assert code == 0
    assert told["text"].strip() == told["full"]["text"].strip() == answer
    assert answer not in told["rotating"]["text"]
    assert told["kv_bytes"] < 0.22 * told["full"]["kv_bytes"]
    assert told["rotating"]["kv_bytes"] > 0.95 * told["kv_bytes"]  # the same memory but for bookkeeping


def test_the_handbook_is_a_prompt_of_several_codes_that_ends_where_the_answer_begins(loaded):
    text = (Path(DEFAULT_MODEL) / "handbook.txt").read_text()
    codes = dict(re.findall(r"^The code for (\w+) is (\d{5})\.$", text, re.MULTILINE))
    assert len(codes) == 7 and len(set(codes.values())) == 7
    assert re.search(r"\n\nThe code for (\w+) is$", text)[1] in codes  # no line end: the answer follows a space
    assert 3000 <= len(loaded[1].encode(text)) <= 4000
