"""What both compile steps pass to torch.compile, and where they cannot run."""

from __future__ import annotations

from typing import Any

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.optimizer import Level, Support
from kernel_pytorch.schema import CompileMode


def compile_support(backend: Backend) -> Support:
    """Inductor writes C++ for the CPU and Triton for GPUs; without their compilers there is nothing to run."""
    facts = backend.facts
    if backend.vendor == "cpu":
        if not facts.has_cxx_compiler:
            return Support(
                Level.unsupported, "torch.compile on a CPU needs a C++ compiler (g++ or clang++), none was found; use compile=none"
            )
        return Support(Level.native)
    if not facts.has_triton:
        return Support(Level.unsupported, f"torch.compile on {facts.name} needs triton, which it does not support; use compile=none")
    return Support(Level.native)


def compile_keywords(backend: Backend, mode: CompileMode) -> dict[str, Any]:
    """`options` for torch.compile. Raises AssertionError if a backend's options turn CUDA graphs on."""
    options = {"triton.cudagraphs": False, **backend.compile_options(mode.value)}
    assert options["triton.cudagraphs"] is False, "CUDA graphs belong to the group graph"
    return {"options": options}
