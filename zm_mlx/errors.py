"""Errors of this package that are not plain ``ValueError``."""


class UnsupportedModelError(ValueError):
    """A model whose attention cannot run on this cache; the message names the model and the reason."""


class UserError(Exception):
    """What someone at a command line can mend; the message is one line that says how."""


class MemoryGuardError(UserError):
    """A request whose predicted peak does not fit into this machine's memory; the message says what would."""
