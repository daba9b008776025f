"""Long contexts in a KV cache of fixed size on Apple Silicon: ZeroMerge for mlx-lm."""

from . import interrupts  # noqa: F401 - before all that takes seconds to load
from .budget import Budget
from .errors import UnsupportedModelError
from .host.cache import ZeroMergeCache
from .host.hook import register
from .host.plan import Plan, make_prompt_cache, plan_cache
from .host.prefill import prefill
from .host.saved import load_prompt_cache, save_prompt_cache
from .policies import Policy

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Plan",
    "Policy",
    "UnsupportedModelError",
    "ZeroMergeCache",
    "load_prompt_cache",
    "make_prompt_cache",
    "plan_cache",
    "prefill",
    "save_prompt_cache",
]

register()
