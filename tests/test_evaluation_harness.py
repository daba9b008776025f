"""The lm-evaluation-harness's tasks: what it is told of the model is the model's, and of the cache that is judged."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from commands import document, run
from evaluated import PROSE, subject

from zm_mlx import evaluate
from zm_mlx.errors import UserError
from zm_mlx.evaluation.caches import Contender
from zm_mlx.evaluation.greedy import answer
from zm_mlx.evaluation.tasks import harness
from zm_mlx.flags import DEFAULT_MODEL

FULL, SMALL = Contender("full"), Contender("zeromerge", 0.3)
PROMPT = PROSE[:1500]


@dataclass
class Request:
    """As the harness's ``Instance``."""

    request_type: str
    arguments: tuple
    doc: dict
    doc_id: int = 0
    resps: list = field(default_factory=list)
    filtered_resps: dict = field(default_factory=dict)

    @property
    def args(self):
        return self.arguments


class Asked:
    """As the harness's ``Task``, of requests by hand; it notes what it is to grade, and grades by ``length``."""

    task_name = "asked"

    def __init__(self, requests):
        self.instances, self.seen = requests, []
        self._filters = [SimpleNamespace(name=name, apply=self._pass(name)) for name in ("none", "first")]

    def _pass(self, name):
        def apply(requests):
            for request in requests:
                request.filtered_resps[name] = request.resps[0] if name == "none" else request.resps[0][:1]

        return apply

    def aggregation(self):
        def mean(values):
            return sum(values) / len(values)

        return {"length": mean, "corpus": max}

    def higher_is_better(self):
        return {"length": False, "corpus": True}

    def process_results(self, doc, results):
        self.seen.append(results)
        return {"length": len(results[0]), "corpus": 7}


def asked(*requests, chat=False):
    """The task, and the exam of its only document."""
    task = Asked(list(requests))
    found = harness.Harness(task, harness._metrics(task), chat)
    (item,) = found.items([])
    return task, found.exam(subject(), item)


def tokens(text, special=True):
    return list(subject().tokenizer.encode(text, add_special_tokens=special))


def logits_behind(prompt, target):
    """[n, V] of each token of the target, by the model alone."""
    every = subject().model(mx.array([prompt + target]))[0]
    return np.array(every[len(prompt) - 1 : -1], np.float64)


def test_a_continuation_is_scored_as_the_model_alone_scores_it():
    task, exam = asked(Request("loglikelihood", (PROMPT, " ships"), {}), Request("loglikelihood", (PROMPT, " sea"), {}))
    exam.measure(FULL)
    for (found, greedy), text in zip(task.seen[0], (" ships", " sea"), strict=True):
        prompt = tokens(PROMPT)
        target = tokens(PROMPT + text)[len(prompt) :]
        logits = logits_behind(prompt, target)
        exact = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        assert found == pytest.approx(sum(exact[i, t] for i, t in enumerate(target)), abs=1e-4)
        assert greedy == (logits.argmax(axis=-1).tolist() == target)


def test_a_compressed_prompt_is_what_is_scored():
    task, exam = asked(Request("loglikelihood", (PROMPT, " ships"), {}))
    exam.measure(FULL)
    exam.measure(SMALL)
    (full,), (small,) = task.seen[0], task.seen[2]
    assert full[0] != pytest.approx(small[0], abs=1e-4)


def test_metrics_that_are_no_means_are_left_out_and_every_filter_counts():
    task, exam = asked(Request("generate_until", (PROMPT, {"max_gen_toks": 5}), {}))
    values = exam.measure(FULL)
    text = task.seen[0][0]
    assert values == {"length,none": len(text), "length,first": len(text[:1])}
    assert all(metric.lower for metric in harness._metrics(task))


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request("loglikelihood", ("", " sea"), {}), "nothing to compress"),
        (Request("loglikelihood", (PROMPT, ""), {}), "no token of its own"),
    ],
)
def test_what_has_no_prompt_or_no_answer_is_refused(request_, match):
    with pytest.raises(ValueError, match=match):
        asked(request_, chat=True)[1].measure(FULL)


def test_an_answer_ends_at_its_stop_text_or_its_length():
    prompt = tokens(PROMPT)
    whole = greedy(prompt, 12)
    assert whole == subject().tokenizer.decode(naive(prompt, 12))
    stop = whole[len(whole) // 2 :][:3]
    assert greedy(prompt, 12, [stop]) == whole[: whole.find(stop)]
    assert greedy(prompt, 12, ["never this"]) == whole


def greedy(prompt, most, until=()):
    return answer(subject(), subject().prompted(prompt[:-1]).caches(FULL), prompt[-1], most, until)


def naive(prompt, count):
    found = list(prompt)
    for _ in range(count):
        found.append(int(subject().model(mx.array([found]))[0, -1].argmax().item()))
    return found[len(prompt) :]


def test_a_text_without_prompt_or_means_is_refused_by_name():
    rolling = Asked([Request("loglikelihood_rolling", (PROMPT,), {})])
    rolling.set_fewshot_seed = rolling.build_all_requests = lambda *_, **__: None
    with pytest.raises(UserError, match="asked: its texts have no prompt"):
        harness._harness(rolling, subject().tokenizer, 1)
    corpus = Asked([Request("generate_until", (PROMPT, {}), {})])
    corpus.set_fewshot_seed = corpus.build_all_requests = lambda *_, **__: None
    corpus.aggregation = lambda: {"bleu": max}
    with pytest.raises(UserError, match="none of its metrics is a mean"):
        harness._harness(corpus, subject().tokenizer, 1)


def test_without_the_harness_the_flag_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    code, _, err = run(evaluate.main, capsys, "--lm-eval", "hellaswag")
    assert code == 2 and "pip install lm-eval" in err


TASK = """
task: facts
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}\\n\\nThe code of Titan is"
{answer}
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 8}}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""


CHOICE = 'doc_to_target: 0\ndoc_to_choice: "{{[code, wrong]}}"'
TEXT = 'doc_to_target: " {{code}}"'


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "metric", "right"), [("generate_until", "exact_match", TEXT), ("multiple_choice", "acc", CHOICE)]
)
def test_the_harness_itself_runs(kind, metric, right, tmp_path, capsys):
    data, task = tmp_path / "facts.jsonl", tmp_path / "facts.yaml"
    filler = (Path(DEFAULT_MODEL) / "handbook.txt").read_text()[:3000]
    rows = [{"text": f"The code of Titan is {c}.\n{filler}", "code": c, "wrong": "00000"} for c in ("61234", "40717")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task.write_text(TASK.format(data=data, kind=kind, metric=metric, answer=right))
    flags = ["--lm-eval", str(task), "--caches", "zeromerge", "streaming_llm", "--budgets", "0.3"]
    code, out, err = run(evaluate.main, capsys, *flags, "--output", str(tmp_path / "out.jsonl"), "--json")
    assert code == 0, err  # needs pip install lm-eval
    found = document(out)["results"]
    means = {r["cache"]: r["metrics"][metric]["mean"] for r in found}
    assert means["full"] == 1 and means["zeromerge"] == 1
