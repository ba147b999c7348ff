"""A model that does not fit on the device: it stays on the host, and its blocks come to the device when they are called."""

from __future__ import annotations

from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.engine.steps import Step, active
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.memory.offload import OffloadWeights
from kernel_pytorch.optimizer import tensor_bytes
from kernel_pytorch.precision.quantize import QuantizeLinears
from kernel_pytorch.report.result import Report


def offload_of(steps: list[Step], backend: Backend) -> OffloadWeights | None:
    """The step that makes a model run which does not fit; None when the recipe has none that works on `backend`."""
    found = (optimizer for _, optimizer in active(steps) if isinstance(optimizer, OffloadWeights))
    return next((step for step in found if step.lanes(backend) is not None), None)


def staged(model: nn.Module, offload: OffloadWeights, steps: list[Step], backend: Backend, report: Report) -> nn.Module:
    """A clone of `model`, which lies on the host, that runs on the device: it stands for the eager model from here on.

    Raises UnsupportedOperationError for a recipe that allocates formats: what each layer tolerates is measured on the whole model."""
    for step, optimizer in active(steps):
        if isinstance(optimizer, QuantizeLinears) and optimizer.allocation.strategy is not None:
            raise UnsupportedOperationError(
                f"precision={step.option} with allocation.strategy={optimizer.allocation.strategy.value} measures what layers tolerate on a"
                " model that is on the device, and this one is on the host; allocate where it fits, and give weight.assign here"
            )
    clone = structural_clone(model)
    offload.stage(clone, backend.device)
    available = backend.available_memory_bytes()
    room = f"; {available:,} bytes were available" if available is not None else ""
    report.warnings.append(
        f"the model's {tensor_bytes(model):,} bytes stay on the host{room}: eager copies each block to the device when it is called, and"
        " frees it after"
    )
    return clone
