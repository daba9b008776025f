"""Methods: what a token's importance is, which tokens are kept, and how the others are merged. One a file."""

from .adakv import AdaKV
from .cam import CaM
from .expected_attention import ExpectedAttention
from .h2o import H2O
from .key_norm import KeyNorm
from .kvzip import KVzip
from .paper import Paper
from .policy import Policy, Score
from .pyramidkv import PyramidKV
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM
from .tova import Tova
from .zeromerge import ZeroMerge

__all__ = ["BY_NAME", "DEFAULT", "OFFERED", "Paper", "Policy", "ZeroMerge", "name_of", "named"]

BY_NAME: dict[str, type[Policy]] = {
    "zeromerge": ZeroMerge,
    "compensated": Policy,
    "paper": Paper,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "tova": Tova,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "key_norm": KeyNorm,
    "expected_attention": ExpectedAttention,
    "cam": CaM,
    "kvzip": KVzip,
}
DEFAULT = "zeromerge"
# Those that a cache can follow by itself: neither their importance nor their rows depend on what it does not know.
OFFERED = tuple(n for n, cls in BY_NAME.items() if cls.needs is None and cls.fitted is Policy.fitted)


def named(name: str, score: Score | None = None) -> Policy:
    """The policy of a name with its own settings, or with another ``score``.

    Raises:
        ValueError: the policy's importance is no score's.
    """
    cls = BY_NAME[name]
    if score is None:
        return cls()
    if cls.importance is not Policy.importance:
        raise ValueError(f"{name} has an importance of its own and takes no score")
    return cls(score=score)


def name_of(policy: Policy) -> str:
    """The name under which a policy's class is found again; its class's own if it is not in ``BY_NAME``."""
    return next((name for name, cls in BY_NAME.items() if cls is type(policy)), type(policy).__name__)
