"""What every run shares, from the command line and from Python: names of the machine, the recipe and the errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.detect import Resolution
from kernel_pytorch.engine.run import Job
from kernel_pytorch.errors import CompilationError, KernelPyTorchError
from kernel_pytorch.report.environment import environment
from kernel_pytorch.report.result import Report
from kernel_pytorch.schema import RootConfig


def make_job(config: RootConfig, choices: dict[str, str], ignored: dict[str, list[str]], resolution: Resolution) -> Job:
    """A Job for the backend that was resolved."""
    return Job(config, choices, ignored, resolution.backend, resolution.native, resolution.reason)


def describe_machine(report: Report, backend: Backend) -> None:
    """Fills the report's environment."""
    facts = backend.facts
    report.environment = {
        **environment(),
        "device": facts.name,
        "arch": facts.arch,
        "isa": list(facts.isa),
        "vendor": facts.vendor,
        "memory_bytes": facts.memory_bytes,
        "driver": facts.details.get("driver"),
        "threads": torch.get_num_threads(),
    }


def conclude(report: Report, error: BaseException) -> None:
    """Writes a failure's verdict, exit code and one-line message into the report."""
    if isinstance(error, KeyboardInterrupt):
        report.verdict, report.exit_code, report.error = "interrupted", 130, "interrupted"
        return
    known = isinstance(error, KernelPyTorchError)
    report.verdict = error.verdict if known else "error"
    report.exit_code = error.exit_code if known else 1
    text = str(error) if known else f"{type(error).__name__}: {error}"
    report.error = " ".join(text.split())[:2000]


def translate(error: Exception, backend: Backend) -> KernelPyTorchError | None:
    """Our error for what torch raised when memory ran out or a compiler failed; None for everything else."""
    if isinstance(error, KernelPyTorchError):
        return None
    if isinstance(error, torch.OutOfMemoryError):
        return backend.out_of_memory(
            f"{backend.facts.name} ran out of memory",
            required_bytes=_requested_bytes(str(error)),
            available_bytes=backend.available_memory_bytes() or 0,
        )
    if isinstance(error, _compiler_errors()):
        return CompilationError(f"torch.compile failed: {_first_line(error)}")
    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        return backend.failure(f"{backend.facts.name}: {_first_line(error)}")
    return None


def _compiler_errors() -> tuple[type[BaseException], ...]:
    from torch._dynamo import exc

    found: list[type[BaseException]] = [exc.TorchDynamoException]
    inductor: Callable[..., Any] | None = getattr(__import__("torch._inductor.exc", fromlist=["exc"]), "InductorError", None)
    if isinstance(inductor, type):
        found.append(inductor)
    return tuple(found)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _requested_bytes(message: str) -> int:
    """The allocation that failed, as torch words it; 0 when the message does not say."""
    found = re.search(r"Tried to allocate ([\d.]+) (KiB|MiB|GiB|bytes)", message)
    if found is None:
        return 0
    return int(float(found[1]) * {"bytes": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}[found[2]])
