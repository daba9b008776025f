"""The thread that generates: admits requests as slots come free, runs the batch, keeps snapshots, outlives errors."""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.server import Response, ResponseGenerator, _format_top_logprobs, _make_logits_processors, _make_sampler

from .. import launched
from ..errors import UnsupportedModelError, UserError
from ..host.ranks import drawn_by_first
from . import status
from .drafted import Drafted
from .job import Job, Prompt
from .orders import Orders
from .preparing import Preparing, seeded
from .provider import Provider, Served
from .refusal import ClientLeft, Refusal
from .reuse import Snapshots
from .waiting import PATIENCE, Waiting, busy

IDLE = 0.1  # seconds that the thread sleeps at most when there is nothing to do


@dataclass(frozen=True)
class Running:
    """A request in the batch: what it asks, the tokens that a snapshot brought, and what makes text of its answer."""

    job: Job
    prompt: Prompt
    held: int
    words: Any


Opening = Callable[[Served, Snapshots], None]


class Generator(ResponseGenerator):  # type: ignore[misc]
    """mlx-lm's, with a loop of its own around mlx-lm's ``BatchGenerator``.

    Args:
        provider: of the models.
        opening: called once the first model is loaded, such as to add a saved prompt's snapshot.

    Attributes:
        loaded: of the first model; its exception is what the server cannot start for.
        report: what ``/v1/kv`` says, as of the last change.
    """

    def __init__(self, provider: Provider, opening: Opening = lambda served, snapshots: None) -> None:
        self.loaded: Future[Served] = Future()
        self.waiting = Waiting()
        self.snapshots = Snapshots(0)
        self.report: dict[str, Any] = {}
        self.beat = time.monotonic()
        self._opening = opening
        self._prepare = Preparing(self)
        self._running: dict[int, Running] = {}
        self._batch: Any = None
        super().__init__(provider, None)  # starts the thread

    # ---- threads of clients

    def generate(
        self, request: Any, generation_args: Any, progress_callback: Callable[[int, int], None] | None = None
    ) -> tuple[Any, Iterator[Any]]:
        """Wait for a slot; then mlx-lm's context of an answer and its responses, as they come.

        Raises:
            Refusal: the request cannot be served, at all or now. ``ClientLeft``: nobody waits for the answer.
        """
        job = Job(request, generation_args, getattr(request, "client_left", lambda: False))
        served = self.model_provider.served
        if served is not None and served.key == self.model_provider.key_of(job.args.model):
            job.prompt = self._prepare(job, served)
        elif served is not None:
            self._check_model(job.args.model)
        self._check_alive()
        self.waiting.put(job)
        items = job.items(lambda: self._check_waiting(job))
        return next(items), _responses(items, progress_callback)

    def _check_alive(self) -> None:
        if self._stop or not self.generation_available():
            raise Refusal(503, "the server is stopping" if self._stop else "the server cannot generate any more")

    def _check_model(self, asked: Any) -> None:
        try:
            self.model_provider.check(asked)
        except UserError as error:
            raise Refusal(404, str(error), "model_not_found") from error

    def _check_waiting(self, job: Job) -> None:
        if time.monotonic() - job.born > PATIENCE and self.waiting.take(job):
            raise busy(f"no slot came free in {PATIENCE:.0f} seconds")
        self._check_alive()

    # ---- the thread that generates

    def _run_generate(self) -> None:
        """The life of the thread: mlx-lm's ends with the first exception."""
        try:
            self.model_provider.load_default()
            self._open(self.model_provider.served)
            self._opening(self.model_provider.served, self.snapshots)
            self._publish()
            self.loaded.set_result(self.model_provider.served)
        except BaseException as error:
            self._generation_failed = True
            self.loaded.set_exception(error)
            return
        going = True
        while going:
            self.beat = time.monotonic()
            try:
                going = self._round()
            except Exception as error:
                launched.fail(error)
                logging.exception("a step failed; its requests fail, others go on")
                self._abandon(Refusal(500, f"generation failed: {type(error).__name__}: {error}"))
                time.sleep(IDLE)
        self._abandon(Refusal(503, "the server is stopping"))
        for job in self.waiting.drain():
            job.put(Refusal(503, "the server is stopping"))
        self.snapshots.clear()
        self.model_provider.reset()  # arrays end in the thread that made them
        gc.collect()

    def _round(self) -> bool:
        """What is to be done next; ``False`` once the server is to end."""
        orders = self._orders()
        if orders.stop:
            self._stop = True
            return False
        self._forget(orders.gone)
        for job in orders.jobs:
            self._admit(job)
        if self._running:
            self._step()
        elif self._rank == 0:
            self.waiting.wait(IDLE)
        else:  # MLX waits for a message as busily as it can
            time.sleep(IDLE)
        return True

    def _orders(self) -> Orders:
        """What rank 0 decides, on all ranks."""
        if self._rank:
            return Orders.heard(self._share_object(None), self._stop_of)
        orders = Orders(stop=self._stop)
        if not orders.stop:
            orders.gone = [uid for uid, running in self._running.items() if running.job.abandoned]
            orders.jobs = list(self._admissible(len(self._running) - len(orders.gone)))
        self._share_object(orders.told())
        return orders

    def _stop_of(self, prompt: Prompt, args: Any) -> Any:
        return self._make_state_machine(prompt.key, self.model_provider.tokenizer, args.stop_words)[0]

    def _forget(self, gone: list[int]) -> None:
        """Take the sequences out of the batch whose clients have gone."""
        if gone:
            self._batch.remove(gone)
            for uid in gone:
                del self._running[uid]
            self._publish()

    def _admissible(self, running: int) -> Iterator[Job]:
        """Requests to let in, in the order they came, as long as a slot is free or a snapshot's can be taken.

        Args:
            running: sequences in the batch.
        """
        while (job := self.waiting.first()) is not None:
            key = self.model_provider.key_of(job.args.model)
            served = self.model_provider.served
            if job.abandoned:
                self.waiting.take(job)
            elif served is None or served.key != key:
                if not running:  # the model in use answers others first
                    yield job
                return
            elif running >= (1 if served.draft else min(served.slots.total, self.cli_args.decode_concurrency)):
                return
            elif self.waiting.take(job) and self._prepared(job, served):
                running += 1
                yield job

    def _prepared(self, job: Job, served: Served) -> bool:
        """Whether a request is tokenised; one that cannot be is refused."""
        try:
            if job.prompt is None or job.prompt.key != served.key:
                job.prompt = self._prepare(job, served)
        except Refusal as refusal:
            job.put(refusal)
        except Exception as error:
            logging.exception("a request cannot be read")
            job.put(Refusal(500, f"{type(error).__name__}: {error}"))
        else:
            return True
        return False

    def _admit(self, job: Job) -> None:
        served = self.model_provider.served
        if served is None or served.key != self.model_provider.key_of(job.args.model):
            self._switch(job)
        elif job.prompt is not None:
            self._insert(job, job.prompt, served)

    def _switch(self, job: Job) -> None:
        """Load the model that a request names, or refuse the request."""
        asked = job.args.model
        self._close()
        try:
            self.model_provider.load(asked.model, asked.adapter, asked.draft)
        except (UserError, UnsupportedModelError) as error:
            if self.waiting.take(job):
                job.put(Refusal(404, str(error), "model_not_found"))
        except Exception as error:
            logging.exception("a model cannot be loaded")
            if self.waiting.take(job):
                job.put(Refusal(500, f"model {asked.model} cannot be loaded: {type(error).__name__}: {error}"))
        if self.model_provider.served is not None and self._batch is None:
            self._open(self.model_provider.served)

    def _open(self, served: Served) -> None:
        """An empty batch for a model, and room for its snapshots."""
        limit = min(served.slots.total, self.cli_args.prompt_cache_size)
        if self.cli_args.prompt_cache_bytes is not None:
            limit = min(limit, self.cli_args.prompt_cache_bytes // served.slots.cost.sequence)
        if self._batch is None and self._snapshots_of != served.key:
            self.snapshots = Snapshots(limit)
            self._snapshots_of = served.key
        if served.draft is not None and served.draft.model is not None:
            draft, step = served.draft, self.cli_args.prefill_step_size
            self._batch = Drafted(served.model, draft.model, draft.count, step)
            return
        self._batch = BatchGenerator(
            served.model,
            completion_batch_size=self.cli_args.decode_concurrency,
            prefill_batch_size=served.slots.prompts,
            prefill_step_size=self.cli_args.prefill_step_size,
            stream=mx.default_stream(mx.default_device()),
        )

    _snapshots_of: Any = None

    def _close(self) -> None:
        if self._batch is not None:
            self._batch.close()
        self._batch = None
        mx.clear_cache()

    def _insert(self, job: Job, prompt: Prompt, served: Served) -> None:
        """Put a request into the batch, behind the longest snapshot that its prompt begins with."""
        args = job.args
        try:
            hit = self.snapshots.use(prompt.tokens, prompt.user_turn)
            self.snapshots.shrink(served.slots.total - len(self._running) - 1)
            held = 0 if hit is None else hit.held
            sampler = _make_sampler(args, served.tokenizer)
            if args.seed is not None:
                sampler = seeded(sampler, args.seed)
            (uid,) = self._batch.insert_segments(
                segments=[prompt.segments(held)],
                max_tokens=[args.max_tokens],
                caches=[served.fresh() if hit is None else hit.caches],
                all_tokens=[prompt.tokens[:held]],
                samplers=[drawn_by_first(sampler) if self._is_distributed else sampler],
                logits_processors=[_make_logits_processors(args)],
                stop_sequences=[prompt.stop],
            )
        except Exception as error:
            launched.fail(error)
            logging.exception("a request cannot be taken")
            job.put(Refusal(500, f"{type(error).__name__}: {error}"))
        else:
            prompt.context.prompt_cache_count = held
            self._running[uid] = Running(job, prompt, held, served.tokenizer.detokenizer)
            job.put(prompt.context)
            self._publish()

    def _step(self) -> None:
        """One step of the batch: some tokens of each prompt under way, one token of each answer."""
        prompts, tokens = self._batch.next()
        for response in prompts:
            running = self._running[response.uid]
            running.job.put(response.progress)
            done = running.held + response.progress[0]
            if response.end_of_segment and not response.end_of_prompt and done in running.prompt.marks:
                self._keep(response.uid, done)
        for response in tokens:
            self._answer(self._running[response.uid], response)
        if tokens and not self._running:
            mx.clear_cache()
        self._publish(often=all(response.finish_reason is None for response in tokens))

    def _keep(self, uid: int, done: int) -> None:
        """A snapshot of a prompt under way, if a slot is free for it or another's can be taken."""
        prompt = self._running[uid].prompt
        room = self.model_provider.served.slots.total - len(self._running)
        if room < 1 or self.snapshots.limit < 1:
            return
        caches, _ = self._batch.extract_cache([uid])[uid]
        self.snapshots.shrink(room - 1)
        self._put(prompt.tokens[:done], caches, prompt.marks[done])

    def _answer(self, running: Running, response: Any) -> None:
        """One token for a client; the last one gives its slot back, or leaves it to a snapshot."""
        job, words, served = running.job, running.words, self.model_provider.served
        if response.finish_reason != "stop":  # the token that ends an answer is not shown
            words.add_token(response.token)
        if response.finish_reason is not None:
            words.finalize()
        text, top = words.last_segment, job.args.top_logprobs
        logprob = response.logprobs[response.token].item() if job.args.logprobs else 0.0
        likely = _format_top_logprobs(response.logprobs, top, served.tokenizer)
        job.put(Response(text, response.token, logprob, response.finish_reason, likely))
        if response.finish_reason is None:
            return
        del self._running[response.uid]
        job.end()
        if running.prompt.keeps_answer:
            self._put(response.all_tokens, response.prompt_cache, "answer")

    def _put(self, tokens: list[int], caches: list[Any], kind: Any) -> None:
        mx.eval([c.state for c in caches])
        self.snapshots.put(tokens, caches, kind, sum(c.nbytes for c in caches))

    def _abandon(self, refusal: Refusal) -> None:
        """Fail all requests in the batch and begin with an empty one; those that wait are not concerned."""
        for running in self._running.values():
            running.job.put(refusal)
        self._running.clear()
        self._close()
        if not self._stop and self.model_provider.served is not None:
            self._open(self.model_provider.served)
            self._publish()

    def _publish(self, often: bool = False) -> None:
        """Say what there is, for other threads to read; ``often`` is for calls that come with every token."""
        if not often or time.monotonic() - self.report.get("time", 0.0) > IDLE:
            self.report = status.report(self.model_provider.served, self.snapshots, self._batch, len(self._running))


def _responses(items: Iterator[Any], progress: Callable[[int, int], None] | None) -> Iterator[Any]:
    for item in items:
        if not isinstance(item, tuple):
            yield item
        elif progress is not None:
            progress(*item)


__all__ = ["ClientLeft", "Generator"]
