"""What the executor raises; all of them are RuntimeErrors, as MLX raises for Metal's own complaints."""


class MetalHostError(RuntimeError):
    """Something is wrong with a kernel."""


class MetalCompileError(MetalHostError):
    """The source is not Metal, or clang cannot compile it."""


class MetalFault(MetalHostError):
    """A launch went wrong. `kind` is one of the names below, `line` is None where nobody knows it."""

    KINDS = (
        "none",
        "out of bounds",
        "input write",
        "unwritten",
        "race",
        "divergence",
        "threadgroup memory",
        "stack overflow",
        "arithmetic",
        "misuse",
        "time",
    )

    def __init__(self, message: str, kind: str, line: str | None) -> None:
        super().__init__(message)
        self.kind = kind
        self.line = line
