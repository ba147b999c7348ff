"""CUDA graph capture of the whole call, kept where it measures faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from kernel_pytorch.graph.graphed_call import GraphedCall
from kernel_pytorch.graph.recorder import CudaRecorder
from kernel_pytorch.optimizer import Applied, Context, Level, Optimizer, Support

if TYPE_CHECKING:
    from kernel_pytorch.backends.base import Backend


class CaptureWholeCall(Optimizer):
    """Wraps the model's call in a GraphedCall. The model's class and its names in state_dict stay.

    `Applied.details["decisions"]` is a live list: it fills as calls with new arguments are captured and timed."""

    def __init__(self, *, num_warmup_calls: int, min_speedup: float) -> None:
        self.num_warmup_calls = num_warmup_calls
        self.min_speedup = min_speedup

    def support(self, backend: Backend) -> Support:
        if backend.device.type == "cuda":
            return Support(Level.native)
        return Support(Level.native, f"not applicable on {backend.vendor}")

    def apply(self, model: nn.Module, context: Context) -> Applied:
        device = context.backend.device
        if device.type != "cuda":
            return Applied(model, not_applicable=f"CUDA graphs need a CUDA device; this is {device.type}")
        graphed = GraphedCall(
            model,
            model._compiled_call_impl or model._call_impl,
            CudaRecorder(device),
            num_warmup_calls=self.num_warmup_calls,
            min_speedup=self.min_speedup,
        )
        model._compiled_call_impl = graphed
        return Applied(model, num_changed=1, kernels=["cuda_graph"], details={"decisions": graphed.decisions})
