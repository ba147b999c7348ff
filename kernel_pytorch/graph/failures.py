"""What goes wrong while a call is tried, and how it is said."""

from __future__ import annotations

from kernel_pytorch.errors import UnsupportedOperationError

# What a model may raise while it is recorded: the plain call then says whether it is the model's own mistake.
CALL_ERRORS = (
    RuntimeError,
    UnsupportedOperationError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    OSError,
)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
