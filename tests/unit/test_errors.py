"""The one hierarchy: what derives from what, with which exit code and verdict; docs/architecture.md's table of verdicts."""

from __future__ import annotations

import inspect

import pytest

from kernel_pytorch import errors
from kernel_pytorch.errors import (
    AdapterError,
    AmdError,
    AmdOutOfMemoryError,
    BackendError,
    CompilationError,
    ConfigError,
    DeviceNotFoundError,
    KernelPyTorchError,
    MemoryReturnError,
    MissingExtraError,
    NoEffectError,
    NvidiaError,
    NvidiaOutOfMemoryError,
    OutOfMemoryError,
    PerformanceError,
    RecipeError,
    UnsupportedOperationError,
    VerificationError,
    WorkerError,
)

# Class -> what it derives from, exit code, verdict.
TABLE: dict[type[KernelPyTorchError], tuple[tuple[type, ...], int, str]] = {
    KernelPyTorchError: ((Exception,), 1, "error"),
    ConfigError: ((KernelPyTorchError,), 2, "invalid"),
    RecipeError: ((ConfigError,), 2, "invalid"),
    MissingExtraError: ((ConfigError,), 2, "invalid"),
    AdapterError: ((ConfigError,), 2, "invalid"),
    BackendError: ((KernelPyTorchError,), 1, "error"),
    UnsupportedOperationError: ((BackendError,), 3, "unsupported"),
    DeviceNotFoundError: ((UnsupportedOperationError,), 3, "unsupported"),
    OutOfMemoryError: ((UnsupportedOperationError,), 3, "unsupported"),
    CompilationError: ((BackendError,), 1, "error"),
    MemoryReturnError: ((BackendError,), 1, "error"),
    NvidiaError: ((BackendError,), 1, "error"),
    NvidiaOutOfMemoryError: ((NvidiaError, OutOfMemoryError), 3, "unsupported"),
    AmdError: ((BackendError,), 1, "error"),
    AmdOutOfMemoryError: ((AmdError, OutOfMemoryError), 3, "unsupported"),
    NoEffectError: ((KernelPyTorchError,), 4, "no_effect"),
    VerificationError: ((KernelPyTorchError,), 5, "numerics"),
    PerformanceError: ((KernelPyTorchError,), 6, "performance"),
    WorkerError: ((KernelPyTorchError,), 1, "error"),
}


def test_the_table_has_every_class_and_there_are_few() -> None:
    defined = {value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__}
    assert set(TABLE) == defined
    assert len(defined) <= 25


@pytest.mark.parametrize("cls", TABLE, ids=lambda cls: cls.__name__)
def test_a_class_has_its_place_and_its_exit_code(cls: type[KernelPyTorchError]) -> None:
    bases, exit_code, verdict = TABLE[cls]
    assert cls.__bases__ == bases
    assert (cls.exit_code, cls.verdict, cls.report) == (exit_code, verdict, None)
    assert (cls.__doc__ or "").strip().endswith((".", "ran."))


def test_a_mistake_a_line() -> None:
    assert ConfigError("one").lines == ["one"]
    assert str(RecipeError(["one", "two"])) == "one\ntwo"


def test_out_of_memory_keeps_both_figures_and_says_them() -> None:
    error = OutOfMemoryError("it does not fit", required_bytes=3_000_000, available_bytes=1_024)
    assert str(error) == "it does not fit: 3,000,000 bytes required, 1,024 available"
    assert (error.required_bytes, error.available_bytes) == (3_000_000, 1_024)
