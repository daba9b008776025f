"""Tasks of EleutherAI's lm-evaluation-harness (``pip install lm-eval``): MMLU, GSM8K, RULER, and some thousand others.

The harness words the prompts, draws the examples in them and grades the answers; here the prompt is read,
compressed, and the answer scored or decoded under the cap, a document at a time. As in ``mlx_lm.evaluate``
prompts go through the chat template where there is one.

Traps: most of its tasks have prompts of a few hundred tokens, of which small budgets hold too few rows: such
caches are left out by name. Tasks without a prompt (perplexity of whole texts) have nothing to compress.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import mlx.core as mx

from ...errors import UserError
from ..caches import Contender
from ..grading import losses
from ..greedy import answer
from ..prefilled import continue_
from ..subject import Subject
from ..task import Exam, Item, Metric, Values

MAX_TOKENS = 256  # of an answer, where a task does not say
SEED = 1234  # of the examples in prompts, as the harness draws them
LOGLIKELIHOOD, GENERATE = "loglikelihood", "generate_until"


@dataclass(frozen=True)
class Harness:
    """One task of the harness.

    Args:
        task: the harness's own object, whose requests are built.
        metrics: those that are means over documents.
        chat: prompts are chat templates' output, which has the tokens that begin a sequence.
    """

    task: Any
    metrics: Sequence[Metric]
    chat: bool
    version: int = 1

    @property
    def name(self) -> str:
        return f"lm-eval {self.task.task_name}"

    def items(self, items: Sequence[Item]) -> Sequence[Item]:
        """One for each document of the task, whatever the texts and seeds."""
        by_document = groupby(self.task.instances, key=lambda x: x.doc_id)
        return [_item(f"{self.task.task_name} {number}", list(found)) for number, found in by_document]

    def exam(self, subject: Subject, item: Item) -> Exam:
        return _Exam(self, subject, item.row)


class _Exam:
    """One document: its requests, which may have different prompts."""

    def __init__(self, harness: Harness, subject: Subject, requests: Sequence[Any]) -> None:
        self.harness, self.subject, self.requests = harness, subject, requests

    def measure(self, contender: Contender) -> Values:
        for request in self.requests:
            request.resps = [self._response(request, contender)]
        values: Values = {}
        for ensemble in self.harness.task._filters:
            ensemble.apply(self.requests)
            graded = self.harness.task.process_results(
                self.requests[0].doc, [r.filtered_resps[ensemble.name] for r in self.requests]
            )
            for metric in self.harness.metrics:
                name, _, filtered = metric.key.partition(",")
                if filtered in ("", ensemble.name) and name in graded:
                    values[metric.key] = float(graded[name])
        return values

    def _response(self, request: Any, contender: Contender) -> Any:
        """What the harness takes as the model's: log p of a continuation and whether it is greedy, or a text."""
        context, asked = request.args
        prompt = self._tokens(context)
        if len(prompt) < 2:
            raise ValueError("a prompt has fewer than two tokens: there is nothing to compress")
        if request.request_type == GENERATE:
            most, target = int(asked.get("max_gen_toks", MAX_TOKENS)), []
        else:
            target = self._tokens(context + asked)[len(prompt) :]
            most = len(target)
        room = self.subject.context
        if room is not None and len(prompt) + most > room:
            raise ValueError(f"{len(prompt)} tokens and {most} of an answer are more than the model's {room}")
        caches = self.subject.prompted(prompt[:-1]).caches(contender)
        if request.request_type == GENERATE:
            until = asked.get("until") or []
            return answer(self.subject, caches, prompt[-1], most, [until] if isinstance(until, str) else until)
        return self._likelihood(caches, prompt[-1], target)

    def _likelihood(self, caches: list[Any], last: int, target: Sequence[int]) -> tuple[float, bool]:
        if not target:
            raise ValueError("a continuation has no token of its own behind the prompt")
        logits = continue_(self.subject.model, caches, [last, *target[:-1]])
        greedy = bool(mx.all(logits.argmax(axis=-1) == mx.array(list(target))).item())
        return -float(losses(logits, target).sum()), greedy

    def _tokens(self, text: str) -> list[int]:
        return list(self.subject.tokenizer.encode(text, add_special_tokens=not self.harness.chat))


def require() -> None:
    """Raises ``UserError`` where the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs the harness: pip install lm-eval")


def harnessed(names: Sequence[str], tokenizer: Any, documents: int) -> list[Harness]:
    """The tasks of the harness by their names (or the files that define them), each with its first documents.

    Raises:
        UserError: the harness does not know a task or cannot load its data, or a task asks for what caches of
            prompts do not change.
    """
    from lm_eval.tasks import TaskManager

    try:
        found = TaskManager().load(list(names))["tasks"]
    except Exception as error:  # data sets are fetched, and may fail in any way
        raise UserError(f"--lm-eval {' '.join(names)}: {error}") from error
    return [_harness(task, tokenizer, documents) for task in found.values()]


def _harness(task: Any, tokenizer: Any, documents: int) -> Harness:
    chat = getattr(tokenizer, "chat_template", None) is not None
    task.set_fewshot_seed(SEED)
    task.build_all_requests(limit=documents, apply_chat_template=chat, chat_template=_template(tokenizer))
    kinds = {x.request_type for x in task.instances}
    if kinds - {LOGLIKELIHOOD, GENERATE}:
        raise UserError(f"--lm-eval {task.task_name}: its texts have no prompt to compress ({', '.join(kinds)})")
    metrics = _metrics(task)
    if not metrics:
        raise UserError(f"--lm-eval {task.task_name}: none of its metrics is a mean over documents")
    return Harness(task, metrics, chat)


def _metrics(task: Any) -> list[Metric]:
    """Those that are means over documents, once for each way in which the task filters answers."""
    means = [name for name, how in task.aggregation().items() if getattr(how, "__name__", "") == "mean"]
    filters = [f.name for f in task._filters]
    lower = {name for name, higher in task.higher_is_better().items() if not higher}
    keys = [(name, name if len(filters) == 1 else f"{name},{f}") for name in means for f in filters]
    return [Metric(key, f"{task.task_name} {key}", lower=name in lower) for name, key in keys]


def _template(tokenizer: Any) -> Callable[..., str]:
    def apply(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    return apply


def _item(name: str, requests: list[Any]) -> Item:
    digest = hashlib.sha256(repr([x.arguments for x in requests]).encode()).hexdigest()[:16]
    return Item(name, digest, 0, 0, list, row=requests)
