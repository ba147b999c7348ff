"""The one exception hierarchy. Every class carries the exit code that the command line ends with.

Nothing here imports torch: the command line raises these before torch is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class KernelPyTorchError(Exception):
    """Base of everything this library raises on purpose.

    exit_code: what the command line returns. verdict: the word written to result.json.
    report: the Report of the run so far, set by the engine; None when nothing ran.
    """

    exit_code = 1
    verdict = "error"
    report: Any = None


class ConfigError(KernelPyTorchError):
    """One or more mistakes in what the user wrote; `lines` holds one message a mistake."""

    exit_code = 2
    verdict = "invalid"

    def __init__(self, lines: str | Sequence[str]) -> None:
        self.lines = [lines] if isinstance(lines, str) else list(lines)
        super().__init__("\n".join(self.lines))


class RecipeError(ConfigError):
    """A recipe file that is missing, unreadable, unsafe, cyclic or not pure data."""


class MissingExtraError(ConfigError):
    """An optional package is not installed; the message names the extra that brings it."""


class AdapterError(ConfigError):
    """An installed package registers a backend or a device that cannot be used; the message names the package."""


class BackendError(KernelPyTorchError):
    """A device or its software stack failed while it was doing something it supports."""


class UnsupportedOperationError(BackendError):
    """The hardware or the software on this machine cannot do what a step asks for."""

    exit_code = 3
    verdict = "unsupported"


class DeviceNotFoundError(UnsupportedOperationError):
    """This machine has no device of the vendor that was asked for."""


class OutOfMemoryError(UnsupportedOperationError):
    """The model or a tensor does not fit; both figures are in bytes."""

    def __init__(self, message: str, *, required_bytes: int, available_bytes: int) -> None:
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes
        super().__init__(f"{message}: {required_bytes:,} bytes required, {available_bytes:,} available")


class NoEffectError(KernelPyTorchError):
    """A step or a pattern that was asked for by name changed nothing."""

    exit_code = 4
    verdict = "no_effect"


class VerificationError(KernelPyTorchError):
    """The result is not right: one of the two gates failed; the message names the module."""

    exit_code = 5
    verdict = "numerics"


class PerformanceError(KernelPyTorchError):
    """The result is right but missed a speed or memory gate."""

    exit_code = 6
    verdict = "performance"


class CompilationError(BackendError):
    """A compiler (Inductor, Triton, C++) rejected code that we gave it."""


class MemoryReturnError(BackendError):
    """A tensor was returned to a memory manager twice, or to one that never handed it out."""


class NvidiaError(BackendError):
    """An NVIDIA device or CUDA failed. Leaves derive from this and from the kind of failure."""


class NvidiaOutOfMemoryError(NvidiaError, OutOfMemoryError):
    """A tensor does not fit on an NVIDIA device; both figures are in bytes."""


class AmdError(BackendError):
    """An AMD device or ROCm failed. Leaves derive from this and from the kind of failure."""


class AmdOutOfMemoryError(AmdError, OutOfMemoryError):
    """A tensor does not fit on an AMD device; both figures are in bytes."""


class WorkerError(KernelPyTorchError):
    """The process that ran a recipe ended without a result."""
