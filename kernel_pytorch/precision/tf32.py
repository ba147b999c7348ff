"""TF32 for float32 matmuls on NVIDIA: a switch around the model's own calls, restored exactly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.capabilities import nvidia_has
from kernel_pytorch.optimizer import Applied, Context, Level, Optimizer, Support


class Tf32Matmul(Optimizer):
    """float32 matmuls round their inputs to 10 mantissa bits and use the matrix units."""

    def support(self, backend: Backend) -> Support:
        if backend.vendor != "nvidia":
            return Support(Level.native, f"not applicable: {backend.vendor} has no TF32")
        if nvidia_has(backend.facts.arch, "tf32_matmul"):
            return Support(Level.native)
        return Support(Level.unsupported, f"TF32 needs sm_80 or newer, this is {backend.facts.name} ({backend.facts.arch})")

    def apply(self, model: nn.Module, context: Context) -> Applied:
        if context.backend.vendor != "nvidia":
            return Applied(model, not_applicable=f"{context.backend.vendor} has no TF32: float32 matmuls stay float32")
        if context.emulate:
            return Applied(model, not_applicable="no plain-torch reference of TF32 rounding inside a matmul: float32 is computed")
        if not any(parameter.dtype == torch.float32 for parameter in model.parameters()):
            return Applied(model, not_applicable="the model has no float32 parameters: TF32 changes float32 matmuls only")
        return Applied(model, num_changed=1, kernels=("tf32",), context=tf32_matmul)


@dataclass
class _Switch:
    """The setting is the process's own: calls of several threads share it, and the last to leave restores it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    depth: int = 0
    before: Any = None


_SWITCH = _Switch()


@contextmanager
def tf32_matmul() -> Iterator[None]:
    """TF32 on inside, the earlier setting back when the last of overlapping calls is out, also after an exception."""
    matmul = torch.backends.cuda.matmul
    # The two spellings must not be mixed: torch raises when it finds both in use.
    name, on = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    with _SWITCH.lock:
        if _SWITCH.depth == 0:
            _SWITCH.before = getattr(matmul, name)
            setattr(matmul, name, on)
        _SWITCH.depth += 1
    try:
        yield
    finally:
        with _SWITCH.lock:
            _SWITCH.depth -= 1
            if _SWITCH.depth == 0:
                setattr(matmul, name, _SWITCH.before)
