"""Operations of a cache whose rows a later layer uses, too: they remember what a call's attention used.

The cache may have compacted by the time that the later layer asks. So the states that its own attention used are kept
until the last later layer has asked, block by block, and the later queries go over the same.
"""

from dataclasses import dataclass, field, fields

import mlx.core as mx

from ..errors import UnsupportedModelError
from ..state.rows import after
from ..state.state import Bound, Call, Scores, State
from .choose import Operations


@dataclass(frozen=True)
class Remembering(Operations):
    """Operations that remember which states a call's attention used, by the lengths of its blocks.

    Args:
        before: the state that the call found, until they are forgotten.
        asking: later layers that have not asked yet.
    """

    before: list[State] = field(default_factory=list, compare=False)
    heard: list[tuple[int, State]] = field(default_factory=list, compare=False)
    asking: list[None] = field(default_factory=list, compare=False)

    @classmethod
    def of(cls, operations: Operations, before: State | None, layers: int) -> "Remembering":
        own = {f.name: getattr(operations, f.name) for f in fields(Operations)}
        return cls(**own, before=[] if before is None else [before], asking=[None] * layers)

    def attend(self, call: Call, state: State) -> tuple[mx.array, Scores]:
        self.heard.append((call.length, state))
        return super().attend(call, state)

    def attend_whole(self, call: Call, state: State) -> mx.array:
        self.heard.append((call.length, state))
        return plain(self).attend_whole(call, state)

    def bind(self, call: Call, state: State, turned: bool = False) -> Bound:
        self.heard.append((1, state))
        return plain(self).bind(call, state, turned)  # which lasts for more than this call

    def blocks(self) -> list[tuple[int, State]]:
        """What was heard; nothing was if the call's one token took what an earlier one had bound."""
        return self.heard or [(1, x._replace(filled=x.filled + 1)) for x in self.before]

    def asked(self) -> None:
        """Forget the states once no later layer will ask for them: they hold memory."""
        self.asking.pop()
        if not self.asking:
            self.heard.clear()
            self.before.clear()


def plain(operations: Operations) -> Operations:
    """The same without a memory."""
    return Operations(**{f.name: getattr(operations, f.name) for f in fields(Operations)})


def again(operations: Operations, queries: mx.array, scale: float) -> mx.array:
    """Attention of queries [B, H * G, L, D], in the order of storage, over what those of the last call saw."""
    if not isinstance(operations, Remembering) or not operations.asking:
        raise UnsupportedModelError("a layer uses the keys and values of another one, which kept none for it")
    outputs: list[mx.array] = []
    begin, once = 0, plain(operations)
    for length, state in operations.blocks():
        block = queries[:, :, begin : begin + length]
        outputs.append(once.attend_whole(Call(after(block, *outputs[-1:]), scale), state))
        begin += length
    operations.asked()
    if begin != queries.shape[2]:
        raise UnsupportedModelError(f"{queries.shape[2]} queries come after {begin} of the layer that they belong to")
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
