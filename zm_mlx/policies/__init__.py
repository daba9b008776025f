"""Methods: what a token's importance is, which tokens are kept, and how the others are merged. One a file."""

from .paper import Paper
from .policy import Policy

__all__ = ["BY_NAME", "Paper", "Policy", "name_of"]

BY_NAME: dict[str, type[Policy]] = {"zeromerge": Policy, "paper": Paper}


def name_of(policy: Policy) -> str:
    """The name under which a policy's class is found again; its class's own if it is not in ``BY_NAME``."""
    return next((name for name, cls in BY_NAME.items() if cls is type(policy)), type(policy).__name__)
