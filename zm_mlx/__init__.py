"""Long contexts in a KV cache of fixed size on Apple Silicon: ZeroMerge for mlx-lm."""

from . import interrupts  # noqa: F401 - before all that takes seconds to load
from .budget import Budget
from .cache import ZeroMergeCache
from .errors import UnsupportedModelError
from .hook import register
from .plan import Plan, make_prompt_cache, plan_cache
from .policy import Policy
from .saved import load_prompt_cache, save_prompt_cache

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
    "save_prompt_cache",
]

register()
