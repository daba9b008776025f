"""ZeroMergeCache: a KV cache of fixed size for one layer, behind mlx-lm's cache protocol."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask

from .. import phases
from ..errors import UnsupportedModelError
from ..ops.choose import Mode, Operations, mode
from ..ops.remembering import again
from ..packed import Contents, Packed, pack, unpack
from ..phases import ExactPrompt, Phase, Prefill, Streaming
from ..policies import Policy
from ..state.layout import LayerShape, Layout
from ..state.rows import Dense
from ..state.state import Call, State, to_model, to_storage

if TYPE_CHECKING:
    from .batch import ZeroMergeBatch
    from .rollback import Log


class ZeroMergeCache:
    """The keys and values of one layer in N rows per head, however many tokens are seen.

    ``update_and_fetch`` takes new keys and values and hands them back; the attention hook
    (``zm_mlx.host.hook``) then calls ``attend``, which stores them, attends over all rows, scores the
    rows and compacts. A model that skips the hook raises at its next update.

    A compaction happens each time ``staging`` tokens have arrived, counted from the first token,
    never by calls: the state does not depend on how a prompt is cut into chunks. The first
    compaction that merges anything comes with token ``min(layout.rows)``.

    Args:
        layout: the rows of the layer, as ``policy.layout(rows, heads)`` divides them.
        policy: the method and its settings.
        prefill: "streaming" compacts as tokens arrive; "exact" keeps the prompt whole until
            ``prompt_length`` tokens were seen (or ``finish_prompt`` is called, or a one-token call
            shows that decoding has begun) and compacts once.
        prompt_length: tokens of the prompt to come; "exact" needs it.
        kernels: "metal" or "ops" instead of what ``zm_mlx.ops.choose`` would choose.

    Attributes:
        layer: the state; ``None`` before the first token.
        phase: how tokens are taken at the moment.
        rereading: the next calls read the newest tokens a second time, as many as they bring, and store nothing
            (see ``zm_mlx.prefill``).
        reread: whether any were.
        log: the last calls, which can be undone; ``None`` outside of ``zm_mlx.rollback``.

    Raises:
        ValueError: an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        policy: Policy | None = None,
        prefill: Prefill = "streaming",
        prompt_length: int | None = None,
        kernels: Mode | None = None,
        turn: mx.array | None = None,
    ) -> None:
        if not isinstance(layout, Layout):
            raise ValueError(
                f"layout must be a Layout, as zm_mlx.Policy().layout(rows, heads) makes it, not {layout!r}"
            )
        if policy is not None and not isinstance(policy, Policy):
            raise ValueError(f"policy must be a zm_mlx.Policy, not {policy!r}")
        if prefill not in ("exact", "streaming"):
            raise ValueError(f"prefill must be 'exact' or 'streaming', not {prefill!r}")
        self._start(Operations(layout, policy or Policy(), mode(kernels), turn))
        if self.policy.reads and not layout.reading:
            raise ValueError(
                "this policy needs rows with room for a second reading: policy.layout(rows, heads) makes them"
            )
        if prefill == "exact":
            if prompt_length is None:
                raise ValueError(
                    "prefill='exact' ends with the prompt: give prompt_length, or take prefill='streaming'"
                )
            self.begin_prompt(prompt_length)

    def _start(self, operations: Operations) -> None:
        self.operations = operations
        self.layer: State | None = None
        self.phase: Phase = Streaming()
        self.rereading = self.reread = False
        self.log: Log | None = None
        self._pending: Dense | None = None  # keys and values of an update that was not attended yet

    @property
    def layout(self) -> Layout:
        return self.operations.layout

    @property
    def policy(self) -> Policy:
        return self.operations.policy

    @property
    def kernels(self) -> Mode:
        return self.operations.kernels

    @kernels.setter
    def kernels(self, kernels: Mode) -> None:
        self.operations = replace(self.operations, kernels=kernels)
        self.unbind()

    @property
    def pending(self) -> bool:
        """Whether an update was not attended yet."""
        return self._pending is not None

    @property
    def shape(self) -> LayerShape | None:
        """What a token takes here; ``None`` before the first."""
        return None if self.layer is None else self.layer.shape

    # ---- prompts

    @property
    def prefill(self) -> Prefill:
        """How tokens are taken at the moment."""
        return self.phase.name

    @property
    def remaining(self) -> int | None:
        """Tokens to the announced end of an exact prompt; ``None`` while streaming."""
        if not isinstance(self.phase, ExactPrompt) or self.prefill == "streaming":  # a piece has no announced end
            return None
        return self.phase.before + self.phase.length - self.offset

    def begin_prompt(self, length: int) -> None:
        """Take the next ``length`` tokens as one prompt, kept whole and compacted once at its end.

        A prompt that has not come to its announced end ends here.

        Raises:
            ValueError: length is not positive.
        """
        self.layer, self.phase = phases.begin(length, self.phase, self.layer, self.operations)
        if self.log is not None:
            self.log.forget(self.offset)

    def finish_prompt(self) -> None:
        """End an exact prefill now: score the prompt by its last queries and compact it once.

        Does nothing while streaming. With fewer than N tokens seen nothing is merged.
        """
        if isinstance(self.phase, ExactPrompt):
            self.layer = self.layer and self.phase.finish(self.layer, self.operations)
            self.phase = Streaming()
            if self.log is not None:
                self.log.forget(self.offset)

    def drop_update(self) -> None:
        """Forget an update that will not be attended, because an exception ended its call of the model."""
        self._pending = None

    def unbind(self) -> None:
        """Forget what decoding steps have bound, which the next one binds again."""
        if isinstance(self.phase, Streaming):
            self.phase = Streaming()

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
        new = Dense(keys, values)
        if self.layer is None:
            self.layer = self._empty(new)
        elif not self.layer.takes(new):
            shape, batch = self.layer.shape, self.layer.recent.shape[0]
            raise ValueError(
                f"new keys {keys.shape} and values {values.shape} in {keys.dtype} do not fit {batch} x {shape}"
            )
        self._pending = new
        return keys, values

    def _empty(self, new: Dense) -> State:
        heads = new.shape[1]
        if heads != self.layout.heads:
            raise ValueError(
                f"a table of rows per head needs {heads} numbers, one for each KV head, not {self.layout.heads}"
            )
        return State.empty(self.layout, new, self.phase.recent_rows(self.layout))

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None = None,
        cap: float | None = None,
    ) -> mx.array:
        """Attention of new queries [B, Hq, L, D] over all rows and the new tokens; stores the tokens.

        Called by the hook with the very objects that ``update_and_fetch`` returned. Attention is
        causal; the hook refuses other masks.

        Returns:
            [B, Hq, L, Dv] in the dtype of the queries.

        Raises:
            UnsupportedModelError: called twice for one update, or with other keys or values.
        """
        pending, self._pending = self._pending, None
        if pending is None or self.layer is None:
            raise UnsupportedModelError("attention is called more than once for one update of its cache")
        if keys is not pending.keys or values is not pending.values:
            raise UnsupportedModelError("attention does not use the keys and values of its cache as they are")
        layout, length = self.operations.layout, keys.shape[2]
        if queries.shape[2] != length or queries.shape[1] % layout.heads:
            raise UnsupportedModelError(
                f"queries {queries.shape} do not match the {length} new tokens of {layout.heads} KV heads"
            )
        if not layout.in_model_order:
            queries, pending = to_storage(queries, layout, 1), pending.map(lambda x: to_storage(x, layout, 1))
            sinks = None if sinks is None else to_storage(sinks, layout, 0)
        call = Call(queries, scale, sinks, cap)
        if self.rereading:
            out, self.layer = self.operations.read_again(call, pending, self.layer)
            self.reread = True
        else:
            before, phase = self.layer, self.phase
            take = phases.take if self.log is None else self.log.take
            out, self.layer, self.phase = take(phase, call, pending, before, self.operations)
            if self.policy.score == "reread" and not self.reread:
                self._warn_if_lost(before, self.layer, length > 1, isinstance(phase, ExactPrompt))
        return out if layout.in_model_order else to_model(out, layout, 1)

    def attend_again(self, queries: mx.array, scale: float) -> mx.array:
        """Attention of a later layer's queries [B, Hq, L, D] over what those of the last ``attend`` saw.

        Raises:
            UnsupportedModelError: that was not remembered (see ``zm_mlx.host.sharing``).
        """
        layout = self.operations.layout
        out = again(self.operations, to_storage(queries, layout, 1), scale)
        return to_model(out, layout, 1)

    def _warn_if_lost(self, before: State, after: State, prompt: bool, exact: bool) -> None:
        """Say it if a prompt was compressed for the first time, and nothing of it was read a second time before."""
        capacity = self.layout.capacity
        first = exact or (prompt and before.seen <= capacity)
        if first and after.departed > before.departed and after.seen > capacity:
            warnings.warn(
                "zm_mlx: this prompt was compressed by attention alone, though its policy has score='reread': "
                "zm_mlx.prefill(model, tokens[:-1], caches) reads it twice, and mlx-lm goes on with the last token",
                stacklevel=2,
            )

    # ---- mlx-lm's protocol

    @property
    def offset(self) -> int:
        """Tokens seen, which is the position of the next token."""
        seen = 0 if self.layer is None else self.layer.seen
        return seen + (0 if self._pending is None else self._pending.keys.shape[2])

    @property
    def keys(self) -> mx.array | None:
        """The recent keys (mlx-lm's pipelines assign it to order their communication)."""
        return None if self.layer is None else self.layer.newest.keys

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        if self.layer is not None:
            self.layer = self.layer.with_newest(self.layer.newest._replace(keys=keys))

    @property
    def state(self) -> Packed:
        """All arrays, and everything else as one JSON string."""
        return pack(Contents(self.layout, self.policy, self.phase, self.layer, self.operations.turn))

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        layout, policy, phase, layer, turn = unpack(state)
        self._start(Operations(layout, policy, mode(), turn))
        self.phase, self.layer = phase, layer

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> "ZeroMergeCache":
        """A cache with this state (how mlx-lm's ``load_prompt_cache`` makes one)."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> "ZeroMergeCache":
        """A copy that takes no memory until one of the two is written; mlx-lm makes many."""
        twin = copy.copy(self)
        twin.layer = self.layer and self.layer.branch()
        twin.log = None  # a copy is in no scope
        return twin

    @classmethod
    def merge(cls, caches: "Sequence[ZeroMergeCache]") -> "ZeroMergeBatch":
        """A batch of copies of caches, one a sequence; errors are those of ``ZeroMergeBatch.merge``."""
        from .batch import ZeroMergeBatch  # which is made of this class

        return ZeroMergeBatch.merge(caches)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return 0 if self.layer is None else sum(x.nbytes for x in [*self.layer.arrays(), *self.phase.arrays])

    def size(self) -> int:
        """Filled rows of the fullest head."""
        if self.layer is None:
            return 0
        return self.layer.filled + min(self.layer.departed, max(g.rows for g in self.layout.groups))

    def empty(self) -> bool:
        return self.layer is None

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """A causal mask over the new tokens alone; the hook needs none."""
        return create_attention_mask(length, 0, return_array, window_size)

    def is_trimmable(self) -> bool:
        """Within ``zm_mlx.rollback`` alone: what was merged can be taken back as long as what it was before is kept."""
        return self.log is not None

    def trim(self, n: int) -> int:
        """Take back the last n tokens, as ``Log.trim``; outside of ``zm_mlx.rollback`` none, which returning 0 says."""
        return 0 if self.log is None else self.log.trim(self, n)

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """Refuses: --kv-bits would silently replace this cache.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "--kv-bits (kv_bits) of mlx-lm does not work with a ZeroMerge cache: leave it out, and make the cache with "
            "zm_mlx.make_prompt_cache(model, kv_bits=8)"
        )
