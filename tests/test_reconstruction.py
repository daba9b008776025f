"""KVzip's reading: the attention of a repetition, against the model's own attention in float64."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from tiny import f64

from zm_mlx.evaluation import kvzip
from zm_mlx.evaluation.caches import Contender
from zm_mlx.evaluation.kvzip import Span
from zm_mlx.evaluation.prefilled import Prompted, continue_
from zm_mlx.evaluation.recording import record
from zm_mlx.host.probe import probe

TOKENS = tiny.prompt(150, seed=3)[0]


class Tokenizer:
    chat_template = None

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [ord(c) % 96 for c in text]


class Chat(Tokenizer):
    chat_template = "yes"

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        return f"<user>{messages[0]['content']}<end><model>"


@pytest.fixture(scope="module")
def model():
    return tiny.model(head_dim=32, context=2048)


@pytest.mark.parametrize("chunk", [2000, 64])
@pytest.mark.parametrize("limit", [2**26, 2**14])
def test_a_tokens_importance_is_the_most_attention_that_its_repetition_gives_it(monkeypatch, model, chunk, limit):
    monkeypatch.setattr(kvzip, "CHUNK", chunk)
    monkeypatch.setattr("zm_mlx.ops.plain.attention.LOGIT_BYTES", limit)
    recording = record(model, TOKENS, probe(model))
    found = kvzip.reconstruct(model, Tokenizer(), TOKENS, recording)
    expected = [np.ones((2, 150)) for _ in found]
    for begin in range(4, 150, chunk):
        span = Span(begin, min(begin + chunk, 150))
        text = [*TOKENS.tolist(), *kvzip.request(Tokenizer(), TOKENS, span), *TOKENS[span.begin : span.end].tolist()]
        whole = record(model, mx.array(text), probe(model)).layers
        for i, layer in enumerate(whole):
            keys, queries = f64(layer.rows.keys[0]), f64(layer.call.queries[0])[:, 150:]
            columns = [*range(4), *range(span.begin, span.end), *range(150, len(text))]
            for h in range(2):
                logits = queries[2 * h : 2 * h + 2] @ keys[h, columns].T * layer.call.scale
                logits[:, np.array(columns) > np.arange(150, len(text))[:, None]] = -np.inf
                p = np.exp(logits - logits.max(-1, keepdims=True))
                p /= p.sum(-1, keepdims=True)
                expected[i][h, span.begin : span.end] = p.max((0, 1))[4 : 4 + span.end - span.begin]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(f64(x), y, atol=1e-4)


def test_a_later_chunk_is_asked_for_by_the_end_of_the_one_before():
    encode = lambda text: [ord(c) % 96 for c in text]  # noqa: E731
    assert kvzip.request(Tokenizer(), TOKENS, Span(4, 64)) == encode("\n\nRepeat the previous context exactly.\n")
    later = kvzip.request(Tokenizer(), TOKENS, Span(64, 128))
    start = encode("\n\nRepeat the part of the previous context exactly, starting with")
    assert later == [*start, *TOKENS[56:64].tolist(), *encode("\n")]


def test_the_answer_begins_as_the_chat_template_says():
    assert kvzip.answer_begins(Chat()) == "<end><model>" and kvzip.answer_begins(Tokenizer()) == "\n"


def test_the_best_of_all_heads_stay_and_it_goes_on(model):
    prompted = Prompted(model, TOKENS, Tokenizer())
    made = prompted.caches(Contender("kvzip", 0.5))
    assert sum(map(sum, (c.layout.context for c in made))) % 4 == 0 and len({c.layout.context for c in made}) > 1
    for cache in made:
        assert all(tiny.held(cache, h).position.tolist()[:1] == [0] for h in range(2))
    assert mx.isfinite(continue_(model, made, TOKENS[:80])).all()


def test_without_a_tokenizer_or_streaming_it_is_refused(model):
    with pytest.raises(ValueError, match="give Prompted the tokenizer"):
        Prompted(model, TOKENS).caches(Contender("kvzip", 0.5))
    with pytest.raises(ValueError, match="kvzip-streaming does not work: kvzip needs the prompt read a second time"):
        Prompted(model, TOKENS, Tokenizer()).caches(Contender("kvzip-streaming", 0.5))
