"""Long contexts in a KV cache of fixed size on Apple Silicon: ZeroMerge for mlx-lm."""

from . import interrupts  # noqa: F401 - before all that takes seconds to load
from .budget import Budget
from .errors import UnsupportedModelError
from .host.cache import ZeroMergeCache
from .host.hook import register
from .host.lookup import PromptLookup
from .host.plan import Plan, make_prompt_cache, plan_cache
from .host.prefill import prefill
from .host.rollback import rollback
from .host.saved import load_prompt_cache, save_prompt_cache
from .host.speculating import register as register_speculation
from .policies import Policy

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Plan",
    "Policy",
    "PromptLookup",
    "UnsupportedModelError",
    "ZeroMergeCache",
    "load_prompt_cache",
    "make_prompt_cache",
    "plan_cache",
    "prefill",
    "rollback",
    "save_prompt_cache",
]

register()
register_speculation()
