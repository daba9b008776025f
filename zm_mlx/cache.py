"""ZeroMergeCache: a KV cache of fixed size for one layer, behind mlx-lm's cache protocol."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask

from . import backend, decode
from .errors import UnsupportedModelError
from .layout import Layout, whole_rows
from .policy import Policy
from .raw import attend_raw
from .stores import Held, Kept, Recent, held, to_model, to_storage

FORMAT = 1  # of a saved state
FACTS = ("table", "left", "live", "staged", "exact", "prompt_begin", "prompt_length", "_scale")

Prefill = Literal["exact", "streaming"]
Shape = tuple[int, int, int, int]  # batch, KV heads, head dim, value dim


class ZeroMergeCache:
    """The keys and values of one layer in N rows per head, however many tokens are seen.

    ``update_and_fetch`` takes new keys and values and hands them back; the attention hook
    (``zm_mlx.hook``) then calls ``attend``, which stores them, attends over all rows, scores the
    rows and compacts. A model that skips the hook raises at its next update.

    A compaction happens each time ``staging`` tokens have arrived, counted from the first token,
    never by calls: the state does not depend on how a prompt is cut into chunks. The first
    compaction that merges anything comes with token ``min(rows)``.

    Args:
        rows: N, rows per KV head; one number for all heads or one a head.
        policy: the settings of the method.
        prefill: "streaming" compacts as tokens arrive; "exact" keeps the prompt whole until
            ``prompt_length`` tokens were seen (or ``finish_prompt`` is called, or a one-token call
            shows that decoding has begun) and compacts once.
        prompt_length: tokens of the prompt to come; "exact" needs it.
        kernels: "metal" or "ops" instead of what ``zm_mlx.backend`` would choose.

    Raises:
        ValueError: rows below the smallest number that works, or a bad prefill or prompt_length.
    """

    def __init__(
        self,
        rows: int | Sequence[int],
        *,
        policy: Policy | None = None,
        prefill: Prefill = "streaming",
        prompt_length: int | None = None,
        kernels: backend.Mode | None = None,
    ) -> None:
        if prefill not in ("exact", "streaming"):
            raise ValueError(f"prefill must be 'exact' or 'streaming', not {prefill!r}")
        self.policy = policy or Policy()
        self.kernels = backend.mode(kernels)
        if policy is not None and not isinstance(policy, Policy):
            raise ValueError(f"policy must be a zm_mlx.Policy, not {policy!r}")
        table = whole_rows(rows, 1)
        self.table = tuple(table) if isinstance(rows, Iterable) else table[0]
        self._layout_of(len(table))
        if prefill == "exact" and prompt_length is None:
            raise ValueError("prefill='exact' ends with the prompt: give prompt_length, or take prefill='streaming'")
        self._start()
        if prefill == "exact":
            self._begin_exact(prompt_length)

    def _start(self) -> None:
        self.layout: Layout | None = None
        self.recent: Recent | None = None
        self.kept: Kept | None = None
        self.left = 0  # tokens that left the recent store for the kept one
        self.live = 0  # filled rows of the recent store
        self.staged = 0  # tokens since the last compaction
        self.exact = False
        self.prompt_begin = 0  # tokens seen before the prompt of an exact prefill
        self.prompt_length: int | None = None
        self._queries: mx.array | None = None  # the last W of an exact prefill, which score the prompt
        self._sinks: mx.array | None = None
        self._scale = 0.0
        self._pending: tuple[mx.array, mx.array] | None = None
        self._shape: Shape | None = None
        self._step: decode.Step | None = None  # attention for one token, bound until the next compaction

    def _layout_of(self, heads: int) -> Layout:
        p = self.policy
        return Layout.of(self.table, heads, residual=p.residual, proximity=p.proximity, staging=p.staging)

    # ---- prompts

    @property
    def prefill(self) -> Prefill:
        """How tokens are taken at the moment."""
        return "exact" if self.exact else "streaming"

    def begin_prompt(self, length: int) -> None:
        """Take the next ``length`` tokens as one prompt, kept whole and compacted once at its end.

        A prompt that has not come to its announced end ends here.

        Raises:
            ValueError: length is not positive.
        """
        self.finish_prompt()
        self._begin_exact(length)
        if self.recent is not None and self.live + length > self.recent.keys.shape[2]:
            self._reserve(self.live + length)

    def finish_prompt(self) -> None:
        """End an exact prefill now: score the prompt by its last queries and compact it once.

        Does nothing while streaming. With fewer than N tokens seen nothing is merged.
        """
        if not self.exact:
            return
        self.exact = False
        if self.layout is None or self._prompt_seen == 0:
            if self.layout is not None:
                self._reserve(self.layout.recent)
            return
        self._score_kept_queries()
        self._queries = self._sinks = None
        seen, whole = self.left + self.live, self.layout.capacity
        self.staged = (seen - whole) % self.layout.staging if seen <= whole else 0
        self._compact()

    @property
    def _prompt_seen(self) -> int:
        return self.left + self.live - self.prompt_begin

    @property
    def _is_decoding(self) -> bool:
        """Whether a one-token call comes from decoding, though the announced prompt is not complete.

        Prefills end in one or two such calls; any other that would exceed the budget is none of theirs.
        """
        assert self.layout is not None and self.prompt_length is not None
        return self.prompt_length - self._prompt_seen > 2 and self.left + self.live >= self.layout.capacity

    @property
    def _first_scored(self) -> int | None:
        """The token of an exact prompt from which on tokens are scored as they come; None: its end is not known."""
        if self.prompt_length is None:
            return None
        return 0 if self.policy.window is None else max(0, self.prompt_length - self.policy.window)

    def _begin_exact(self, length: int | None) -> None:
        if length is not None and not (isinstance(length, int) and length >= 1):
            raise ValueError(f"prompt_length must be 1 token or more, not {length!r}")
        self.exact, self.prompt_begin, self.prompt_length = True, self.offset, length

    # ---- the update, in two halves around the model's own call of attention

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take new keys [B, H, L, D] and values [B, H, L, Dv]; they are returned as they are.

        Raises:
            UnsupportedModelError: the last update never reached the attention hook.
            ValueError: shape or dtype differ from what the cache holds.
        """
        if self._pending is not None:
            raise UnsupportedModelError(
                "the attention of this model does not go through zm_mlx: its last update was never attended. "
                "Make the cache with zm_mlx.make_prompt_cache(model, ...), which says whether the model can be served"
            )
        if self.recent is None:
            self._allocate(keys, values)
        elif (shape := _shape_of(keys, values)) != self._shape or keys.dtype != self.recent.keys.dtype:
            new, old = (*shape, keys.dtype), (*(self._shape or ()), self.recent.keys.dtype)
            raise ValueError(f"new keys and values {new} (batch, heads, dims, dtype) do not fit {old}")
        self._pending = (keys, values)
        return keys, values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention of new queries [B, Hq, L, D] over all rows and the new tokens; stores the tokens.

        Called by the hook with the very objects that ``update_and_fetch`` returned. The mask is not
        used: attention is causal, and the probe of ``zm_mlx.hook`` refuses models that mean more.

        Returns:
            [B, Hq, L, Dv] in the dtype of the queries.

        Raises:
            UnsupportedModelError: called twice for one update, or with other keys or values.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            raise UnsupportedModelError("attention is called more than once for one update of its cache")
        if keys is not pending[0] or values is not pending[1]:
            raise UnsupportedModelError("attention does not use the keys and values of its cache as they are")
        assert self.layout is not None
        length = keys.shape[2]
        if queries.shape[2] != length or queries.shape[1] % self.layout.heads:
            raise UnsupportedModelError(
                f"queries {queries.shape} do not match the {length} new tokens of {self.layout.heads} KV heads"
            )
        if length == 1 and self.exact and self._is_decoding:
            self.finish_prompt()
        take = self._decode if length == 1 and not self.exact else self._prefill
        if self.layout.in_model_order:
            return take(queries, keys, values, scale, sinks)
        queries, keys, values = (to_storage(x, self.layout, 1) for x in (queries, keys, values))
        sinks = None if sinks is None else to_storage(sinks, self.layout, 0)
        return to_model(take(queries, keys, values, scale, sinks), self.layout, 1)

    def _decode(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """One token: ``_prefill`` for it, with as little Python as it takes."""
        assert self.layout is not None and self.recent is not None and self.kept is not None
        recent, kept, live = self.recent, self.kept, self.live
        recent.keys[:, :, live : live + 1] = keys
        recent.values[:, :, live : live + 1] = values
        self.live = live + 1
        if self._step is None:
            self._step = backend.bind(queries, kept, recent, scale=scale, sinks=sinks, **self._how())
        out, kept_score, recent_score = self._step(queries, kept.score, recent, live + 1)
        self.kept = Kept(kept[0], kept[1], kept[2], kept_score, *kept[4:])
        self.recent = Recent(recent[0], recent[1], recent_score)
        self.staged += 1
        if self.staged == self.layout.staging:
            self.staged = 0
            self._compact()
            return self._with_state(out)
        return out  # which needs the new rows, and with which a step evaluates the scores

    def _prefill(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """Any number of tokens, in blocks that end where something happens."""
        length = keys.shape[2]
        outputs: list[mx.array] = []
        begin = 0
        while begin < length:
            end = min(length, begin + self._room())
            block = [x[:, :, begin:end] for x in (queries, keys, values)]
            if outputs:  # one block after the other, or the logits of all exist at once
                block = mx.depends(block, outputs[-1:])
            self._append(*block[1:])
            outputs.append(self._attend_block(block[0], scale, sinks))
            begin = end
        return self._with_state(outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2))

    def _with_state(self, out: mx.array) -> mx.array:
        """out, evaluated with all arrays: decode evaluates only its token, and the others would pile up as graph."""
        done: mx.array = mx.depends(out, [x for x in self._arrays() if x is not None])
        return done

    def _room(self) -> int:
        """Tokens until the next event: the scored part of an exact prompt, its end, or a full staging region."""
        assert self.layout is not None
        if self.exact:
            if self.prompt_length is None or self._first_scored is None:
                return 2**62
            seen = self._prompt_seen
            return (self._first_scored if seen < self._first_scored else self.prompt_length) - seen
        return self.layout.staging - self.staged

    def _append(self, keys: mx.array, values: mx.array) -> None:
        assert self.recent is not None
        end = self.live + keys.shape[2]
        if end > self.recent.keys.shape[2]:  # only in an exact prefill of unknown length
            self._reserve(end + end // 2)
        self.recent.keys[:, :, self.live : end] = keys
        self.recent.values[:, :, self.live : end] = values
        self.live = end

    def _attend_block(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        """Attend, commit the scores, compact where a compaction is due."""
        assert self.layout is not None
        if not self.exact:
            out, *scores = backend.attend(queries, **self._attention(scale, sinks))
            self._commit(*scores)
            self.staged += queries.shape[2]
            if self.staged == self.layout.staging:
                self.staged = 0
                self._compact()
            return out
        if self._first_scored is not None and self._prompt_seen > self._first_scored:
            out, *scores = backend.attend(queries, **self._attention(scale, sinks))
            self._commit(*scores)
        else:
            out = self._attend_whole(queries, scale, sinks)
            self._keep_queries(queries, scale, sinks)
        if self.prompt_length is not None and self._prompt_seen == self.prompt_length:
            self.finish_prompt()
        return out

    def _keep_queries(self, queries: mx.array, scale: float, sinks: mx.array | None) -> None:
        """Let older scores fade, and keep the last W queries: they score the prompt if it ends here."""
        assert self.kept is not None and self.recent is not None
        both = [queries] if self._queries is None else [self._queries, queries]
        self._queries = mx.contiguous(mx.concatenate(both, axis=2)[:, :, -(self.policy.window or 0) :])
        self._scale, self._sinks = scale, sinks
        if self.prompt_begin:
            fade = self.policy.decay ** queries.shape[2]
            self._commit(fade * self.kept.score, fade * self.recent.score)

    def _score_kept_queries(self) -> None:
        """Add what the kept queries give, as far as they are among the last W of the prompt."""
        assert self.kept is not None and self.recent is not None
        scored = 0 if self._first_scored is None else max(0, self._prompt_seen - self._first_scored)
        window = self.policy.window
        if self._queries is None or scored == window:
            return
        queries = self._queries if window is None else self._queries[:, :, scored - window :]
        how = self._attention(self._scale, self._sinks)
        how["kept"], how["recent"] = (x._replace(score=mx.zeros_like(x.score)) for x in (self.kept, self.recent))
        how["live"] -= scored
        mass = backend.score(queries, tokens=queries.shape[2], **how)
        fade = self.policy.decay**scored
        old = (self.kept.score, self.recent.score)
        self._commit(*(x + fade * y for x, y in zip(old, mass, strict=True)))

    def _attend_whole(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        """Attention in an exact prefill: mlx's own, as long as all rows are in the recent store."""
        assert self.recent is not None
        if self.left:
            return backend.attend(queries, **self._attention(scale, sinks))[0]
        keys, values = (x[:, :, : self.live] for x in self.recent[:2])
        return attend_raw(queries, keys, values, scale, sinks)

    def _how(self) -> dict[str, Any]:
        """What all operations of ``backend`` need besides the arrays."""
        return {"left": self.left, "layout": self.layout, "policy": self.policy, "kernels": self.kernels}

    def _attention(self, scale: float, sinks: mx.array | None) -> dict[str, Any]:
        """The arguments of ``backend.attend`` and ``backend.score`` besides the queries."""
        rows = {"kept": self.kept, "recent": self.recent, "live": self.live}
        return {**self._how(), **rows, "scale": scale, "sinks": sinks}

    def _commit(self, kept_score: mx.array, recent_score: mx.array) -> None:
        """Take over the new scores of all rows."""
        assert self.kept is not None and self.recent is not None
        self.kept = Kept(*self.kept[:3], kept_score, *self.kept[4:])
        self.recent = Recent(*self.recent[:2], recent_score)

    def _compact(self) -> None:
        """Leave the newest ``proximity`` (and already staged) rows in the recent store; compress the others."""
        assert self.layout is not None and self.recent is not None and self.kept is not None
        self._step = None
        leaving = max(0, self.live - self.layout.proximity - self.staged)
        if leaving:
            self.kept = backend.compact(self.kept, self.recent, leaving=leaving, **self._how())
        self.left, self.live = self.left + leaving, self.live - leaving
        rows = self.layout.recent
        if leaving or self.recent.keys.shape[2] > rows:
            self.recent = self.recent.part(leaving, self.live, rows)

    # ---- arrays

    def _allocate(self, keys: mx.array, values: mx.array) -> None:
        batch, heads, _, dim = keys.shape
        self.layout = self._layout_of(heads)
        # Compactions are aligned so that none merges anything before token ``capacity``.
        self.staged = -self.layout.capacity % self.layout.staging
        rows = self.layout.recent
        if self.exact and self.prompt_length is not None:
            rows = max(rows, self.prompt_length)
        self._shape = _shape_of(keys, values)
        self.recent = Recent.empty(*self._shape, keys.dtype, rows=rows)
        self.kept = Kept.empty(batch, self.layout, dim, values.shape[3], keys.dtype)

    def _reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows in the recent store."""
        assert self.recent is not None
        self.recent = self.recent.part(0, self.live, rows)

    def _arrays(self) -> list[mx.array | None]:
        stores = (*self.recent, *self.kept) if self.recent and self.kept else ()
        return [*stores, self._queries, self._sinks]

    def held(self, head: int, batch: int = 0) -> Held:
        """The live rows of one KV head (in the model's order): kept rows, then recent ones."""
        if self.layout is None or self.recent is None or self.kept is None:
            raise ValueError("the cache is empty")
        return held(self.kept, self.recent, self.layout, self.left, self.live, head, batch)

    # ---- mlx-lm's protocol

    @property
    def offset(self) -> int:
        """Tokens seen, which is the position of the next token."""
        return self.left + self.live + (0 if self._pending is None else self._pending[0].shape[2])

    @property
    def keys(self) -> mx.array | None:
        """The recent keys (mlx-lm's pipelines assign it to order their communication)."""
        return None if self.recent is None else self.recent.keys

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        assert self.recent is not None
        self.recent = self.recent._replace(keys=keys)

    @property
    def state(self) -> list[mx.array | str | None]:
        """All arrays, and everything else as one JSON string."""
        facts = {name: getattr(self, name) for name in FACTS}
        return [*self._arrays(), json.dumps({"format": FORMAT, **facts, "policy": self.policy.as_dict()})]

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        *arrays, text = state
        facts = json.loads(text)
        if facts.pop("format") != FORMAT:
            raise ValueError("the cache was saved by another version of zm_mlx")
        self.policy = Policy(**facts.pop("policy"))
        self._start()
        self.kernels = backend.mode()
        for name in FACTS:
            setattr(self, name, facts[name])
        self.table = self.table if isinstance(self.table, int) else tuple(self.table)
        # In-place writes must not reach the arrays of whoever handed over the state.
        arrays = [None if x is None else mx.array(x) for x in arrays]
        stores: list[Any] = arrays[:-2]
        self._queries, self._sinks = arrays[-2:]
        if stores:
            self.recent, self.kept = Recent(*stores[:3]), Kept(*stores[3:])
            self._shape = _shape_of(self.recent.keys, self.recent.values)
            self.layout = self._layout_of(self.recent.keys.shape[1])

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> "ZeroMergeCache":
        """A cache with this state (how mlx-lm's ``load_prompt_cache`` makes one)."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in self._arrays() if x is not None)

    def size(self) -> int:
        """Filled rows of the fullest head."""
        return self.live + (min(self.left, max(g.rows for g in self.layout.groups)) if self.layout else 0)

    def empty(self) -> bool:
        return self.recent is None

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """A causal mask over the new tokens alone; the hook needs none."""
        return create_attention_mask(length, 0, return_array, window_size)

    def is_trimmable(self) -> bool:
        """Never: what was merged cannot be taken back."""
        return False

    def trim(self, n: int) -> int:
        """Trims nothing, and says so by returning 0."""
        return 0

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """Refuses: --kv-bits would silently replace this cache.

        Raises:
            ValueError: always.
        """
        raise ValueError("--kv-bits does not work with a ZeroMerge cache: leave it out, or use the full cache")


def _shape_of(keys: mx.array, values: mx.array) -> Shape:
    batch, heads, _, dim = keys.shape
    return batch, heads, dim, values.shape[3]
