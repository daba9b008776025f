"""Which prompts' caches are kept, and which go first: a rule over tokens. Knows no model and no arrays.

Snapshots are taken at the end of a system prompt, at the end of a prompt and at the end of an answer. A prompt
begins with the longest one that it begins with. The least recently used goes first, with three exceptions:

- When a user's turn goes on from the end of an answer, what that conversation left before is first to go: only
  an edit of an old turn would need it. The end of that answer itself, which an edit of the last turn needs, grows
  old at once. (Tools' turns often branch, so they demote nothing.)
- A snapshot that is first to go is moved, not copied, when it is hit after all.
- Ends of system prompts go last, as long as they take no more than a quarter of the room: other conversations
  begin with them.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

SYSTEMS = 4  # one snapshot in so many is a system prompt's that goes last
FEWEST = 8  # tokens that another prompt's beginning must have to be worth going on from
OLDER = 2  # times the number of snapshots: uses by which the end of an answer grows old when a turn follows it

Kind = Literal["system", "prompt", "answer"]


class Hit(NamedTuple):
    """The caches of a snapshot, which hold a prompt's first ``held`` tokens; the caller does not write into them."""

    caches: Any
    held: int


@dataclass(eq=False)
class Snapshot:
    """Caches of one sequence after ``tokens`` (32-bit numbers as bytes), and when they were last of use."""

    tokens: bytes
    caches: Any
    kind: Kind
    used: int
    nbytes: int
    demoted: bool = False

    @property
    def count(self) -> int:
        return len(self.tokens) // 4


class Snapshots:
    """At most ``limit`` snapshots."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._all: list[Snapshot] = []
        self._clock = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots, each by itself: what they share with each other is counted each time."""
        return sum(s.nbytes for s in self._all)

    def use(self, tokens: Sequence[int], user_turn: bool) -> Hit | None:
        """The snapshot of the longest beginning of a prompt, less its last token, which is always computed.

        A beginning of few tokens saves nothing, and a prompt that goes on from one is compacted at other tokens: what
        is answered would depend on whether somebody had asked for a single letter before.

        Args:
            tokens: the prompt.
            user_turn: whether a user speaks last in it, and not a tool.
        """
        whole = packed(tokens[:-1])
        least = min(FEWEST, len(tokens) - 1)  # the same prompt once more is reused, however short
        path = [s for s in self._all if s.count >= least and whole.startswith(s.tokens)]
        if not path:
            return None
        hit = max(path, key=lambda s: s.count)
        if hit.demoted:
            self._all.remove(hit)
        self._touch(hit)
        if user_turn and hit.kind == "answer":
            for snapshot in path:
                snapshot.demoted = snapshot.kind != "system" and snapshot is not hit
            hit.used -= OLDER * self.limit
        return Hit(hit.caches, hit.count)

    def put(self, tokens: Sequence[int], caches: Any, kind: Kind, nbytes: int = 0) -> None:
        """Keep the caches of a sequence after some tokens, if there is room for one at all."""
        key = packed(tokens)
        same = [s for s in self._all if s.tokens == key]
        for snapshot in same:  # such as the end of a prompt that is asked again
            self._all.remove(snapshot)
            kind = "system" if snapshot.kind == "system" else kind
        self.shrink(self.limit - 1)
        if self.limit > 0:
            self._all.append(Snapshot(key, caches, kind, 0, nbytes))
            self._touch(self._all[-1])

    def shrink(self, count: int) -> None:
        """Let go of the worst until no more than ``count`` are left."""
        while len(self._all) > max(0, count):
            systems = sorted((s.used for s in self._all if s.kind == "system"), reverse=True)
            last = systems[: max(1, self.limit // SYSTEMS)]
            self._all.remove(min(self._all, key=lambda s: (0 if s.demoted else 2 if s.used in last else 1, s.used)))

    def clear(self) -> None:
        self._all.clear()

    def _touch(self, snapshot: Snapshot) -> None:
        self._clock += 1
        snapshot.used = self._clock


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes, which are compared fast."""
    return array("I", tokens).tobytes()
