"""The model that is served, and what its sequences get: a plan, empty caches, slots."""

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import server as mlx_lm_server
from mlx_lm.server import ModelProvider

from .. import flags, prompts
from ..budget import Budget
from ..calibration.table import TableError
from ..drafting import Asked, Draft, require_same_tokens
from ..drafting import load as load_draft
from ..errors import UnsupportedModelError, UserError
from ..flags import DEFAULT_MODEL
from ..host import ranks
from ..host.caches import Wish, zeromerge
from ..host.memory import free_bytes
from ..host.model_caches import zero_merge
from ..host.part import least
from ..host.plan import Plan, context_of, plan_cache
from ..loading import NO_LIMIT, Source, folder_of, load_split, load_vocabulary, widen
from ..state.coding import CodingError
from .slots import Cost, Slots, measure, require, require_memory

ROWS = 2048  # per head, where nothing else is asked for: a server does not know its prompts


@dataclass(frozen=True)
class Served:
    """A loaded model as requests need it.

    Args:
        key: mlx-lm's key of the model, adapter and draft.
        plan: what each sequence gets.
        caches: empty ones, to be copied.
        slots: how many sequences there may be.
        vocabulary: tokens that the logits have.
        context: tokens that the model was trained on, where it says so.
        rewrites: whether its chat template shows an answer otherwise once another turn follows.
        draft: that proposes tokens, for one sequence at a time.
    """

    key: Any
    model: nn.Module
    tokenizer: Any
    plan: Plan
    caches: list[Any]
    slots: Slots
    vocabulary: int
    context: int | None
    rewrites: bool
    draft: Draft | None = None

    def fresh(self) -> list[Any]:
        """Caches for one more sequence; they take memory with its first token."""
        return copy.deepcopy(self.caches)


class Provider(ModelProvider):  # type: ignore[misc]
    """mlx-lm's, with a plan and slots for each model that it loads.

    Args:
        args: flags of the server, checked; ``model`` is set.
        source: how messages call the model of ``args``, and its tokenizer's settings.
        itemsize: bytes of a number in a saved prompt's rows, which decide how the small model computes.
    """

    def __init__(self, args: argparse.Namespace, source: Source, itemsize: int | None = None) -> None:
        super().__init__(args)
        self.served: Served | None = None
        self._source, self._itemsize = source, itemsize
        self._asked = Asked(args.draft_model, False, args.num_draft_tokens or None, args.trust_remote_code)
        self._tokenizer_config |= source.tokenizer_config
        for name in {args.model, _resolved(args.model)}:  # /v1/models shows the latter: it is the same model
            self._model_map[name] = args.model
            self._adapter_map[name] = args.adapter_path

    def key_of(self, asked: Any) -> Any:
        """The key of the model that a request names; the draft model is the server's own model's alone."""
        return self._key(asked.model, asked.adapter)

    def _key(self, model: str, adapter: str | None) -> Any:
        name = self._model_map.get(model, model)
        draft = self.cli_args.draft_model if name == self.cli_args.model else None
        return (name, self._adapter_map.get(model, adapter), draft)

    def load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> Any:
        """mlx-lm's; which draft a model has is not for a request to say."""
        key = self._key(model_path, adapter_path)
        if self.model_key != key:
            self._load(*key)
        return self.model, self.tokenizer

    def check(self, asked: Any) -> None:
        """Refuse a model that does not exist, in the thread of the client: a network that is asked may be slow.

        Raises:
            UserError: there is no such model.
        """
        model, adapter, _ = self.key_of(asked)  # not every name is a place: the server's own model has several
        load_vocabulary(Source(model, "model", adapter, self.cli_args.trust_remote_code))

    def reset(self) -> None:
        """Forget the model; mlx-lm calls it before it loads another."""
        super().reset()
        self.served = None

    def _load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> None:
        """mlx-lm's; a name that cannot be loaded is refused before the model in use is dropped.

        Raises:
            UserError: there is no such model, or it does not fit; ``UnsupportedModelError`` as for a plan.
        """
        source = Source(
            model_path,
            self._source.asked if model_path == self._source.name else "model",
            adapter_path,
            self.cli_args.trust_remote_code,
        )
        vocabulary = ranks.agreed(lambda: load_vocabulary(source))
        asked = self._asked if draft_model_path is not None else Asked()
        if asked.source is not None:
            require_same_tokens(asked.source, vocabulary, source.name)
        try:
            ranks.agreed(lambda: self._load_here(source, asked))
        except BaseException:
            self.reset()
            raise

    def _load_here(self, source: Source, asked: Asked) -> None:
        mlx_lm_server.sharded_load = load_split
        try:
            super()._load(source.name, source.adapter)
        except UserError:  # of how it is split
            raise
        except Exception as error:  # the loader and the Hub fail in many ways
            raise UserError(f"{source.words}: cannot be loaded ({type(error).__name__}: {error})") from error
        if source.name == DEFAULT_MODEL and widen(self.model, self._itemsize):
            mx.eval(self.model.parameters())
        self.served = self._serve(source.name, asked)
        self.model_key = self.served.key

    def _serve(self, name: str, asked: Asked) -> Served:
        """The model as requests need it.

        Raises:
            UserError: its caches or its draft's do not fit, or do not give rejected tokens back.
        """
        plan = plan_of(self.model, self.cli_args, name)
        main = zeromerge(self.model, plan)
        draft = load_draft(asked, main)
        beside = None
        if draft is not None:
            require_bounded(draft)
            beside = draft.beside(-1)
        caches = [*main.every, *(draft.every if draft else [])]
        mx.eval([c.operations.turn for c in zero_merge(caches) if c.operations.turn is not None])
        cost, vocabulary = measure(self.model, plan, copy.deepcopy(main.every), beside)
        most = self.cli_args.decode_concurrency + self.cli_args.prompt_cache_size
        prompts = 1 if draft else self.cli_args.prompt_concurrency
        slots = Slots.of(memory(self.cli_args, self.model), cost, prompts, most)
        require(plan, slots, beside)
        require_memory(self.model, plan, slots, self.cli_args.prefill_step_size, self.cli_args.force, beside)
        self.tokenizer.model_max_length = NO_LIMIT  # longer prompts are refused, without transformers' words
        rewrites = self.tokenizer.has_chat_template and _rewrites(self.tokenizer)
        return Served(
            key=(*self.model_key[:2], asked.model),
            model=self.model,
            tokenizer=self.tokenizer,
            plan=plan,
            caches=caches,
            slots=slots,
            vocabulary=vocabulary,
            context=context_of(self.model),
            rewrites=rewrites,
            draft=draft,
        )


def plan_of(model: nn.Module, args: argparse.Namespace, name: str) -> Plan:
    """What each sequence gets.

    Raises:
        UserError: the budget or the table does not work.
    """
    head_rows = flags.head_rows(args.head_rows, folder_of(name))
    wish = Wish(args.kv_budget, "streaming", head_rows, args.score, args.policy, args.kv_bits, args.kv_group_size)
    try:
        return plan_cache(
            model,
            wish.budget or min(ROWS, context_of(model) or ROWS),
            prefill="streaming",
            head_rows=wish.head_rows,
            policy=wish.method,
            room=False,  # the guard judges
        )
    except UnsupportedModelError:
        raise
    except TableError as error:
        raise UserError(f"--head-rows: {error}") from error
    except CodingError as error:
        raise UserError(f"--kv-bits: {error}") from error
    except (ValueError, OverflowError) as error:
        raise UserError(f"--kv-budget: {error}") from error


def require_bounded(draft: Draft) -> None:
    """Refuse a draft model whose caches grow, which no slot holds.

    Raises:
        UserError: this package does not serve it.
    """
    if draft.caches is None or draft.caches.plan is None:
        raise UserError(
            f"--draft-model {draft.name}: zm_mlx does not serve this model, so its caches would grow with every token, "
            "and --max-kv-memory would not hold: take another draft model, or none"
        )


def memory(args: argparse.Namespace, model: nn.Module) -> int:
    """Bytes for all KV caches: as given, or half of what is free now that the model is loaded.

    Raises:
        UserError: nothing is given, and the system does not say what is free.
    """
    if args.max_kv_memory is not None:
        return int(Budget.parse(args.max_kv_memory).value)
    free = least(model, free_bytes())
    if free is None:
        raise UserError("--max-kv-memory is needed: this system does not say how much memory is free")
    return free // 2


def _rewrites(tokenizer: Any) -> bool:
    try:
        return prompts.rewrites(tokenizer, prompts.Chat())
    except UserError:  # a template that refuses such a conversation shows nothing
        return True


def _resolved(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


__all__ = ["ROWS", "Cost", "Provider", "Served"]
