"""CUDA graph capture of the call, whole or in pieces, kept where it measures faster."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from torch import nn

from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.graph.graphed_call import GraphedCall
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.pieces import Pieces
from kernel_pytorch.graph.recorder import CudaRecorder
from kernel_pytorch.graph.regions import Regions
from kernel_pytorch.graph.strategy import terms
from kernel_pytorch.optimizer import Applied, Context, Level, Optimizer, Support

if TYPE_CHECKING:
    from kernel_pytorch.backends.base import Backend


def graph_calls(model: nn.Module, manager: CUDAGraphManager) -> GraphedCall:
    """Puts a GraphedCall around the model's call. When it cannot be recorded as a whole, its submodules are tried, or, when it was
    compiled before, the regions that it was compiled into."""
    compiled = model._compiled_call_impl
    regions = Regions(manager) if compiled is not None else None
    pieces: list[Pieces] = []

    def take_apart(whole: GraphedCall) -> None:
        if not pieces:
            pieces.append(Pieces(whole, regions))

    graphed = GraphedCall(
        model,
        compiled or model._call_impl,
        manager,
        on_cannot=take_apart,
        compiling=nullcontext if regions is None else regions.compiling,
    )
    model._compiled_call_impl = graphed
    return graphed


class CaptureWholeCall(Optimizer):
    """Wraps the model's call in a GraphedCall. The model's class and its names in state_dict stay.

    `Applied.details` holds live objects: `decisions` fills as calls with new arguments are captured and timed, `statistics`
    counts, `workload` has the calls and replays of every kind of call."""

    def __init__(
        self,
        *,
        strategy: GraphDeploymentStrategy,
        num_warmup_calls: int,
        min_speedup: float | None,
        memory_budget_bytes: int | None,
    ) -> None:
        self.strategy = strategy
        self.num_warmup_calls = num_warmup_calls
        self.min_speedup = min_speedup
        self.memory_budget_bytes = memory_budget_bytes

    def support(self, backend: Backend) -> Support:
        if backend.device.type == "cuda":
            return Support(Level.native)
        return Support(Level.native, f"not applicable on {backend.vendor}")

    def apply(self, model: nn.Module, context: Context) -> Applied:
        device = context.backend.device
        if device.type != "cuda":
            return Applied(model, not_applicable=f"CUDA graphs need a CUDA device; this is {device.type}")
        manager = CUDAGraphManager(
            CudaRecorder(device),
            terms(self.strategy, self.min_speedup),
            num_warmup_calls=self.num_warmup_calls,
            memory_budget_bytes=self.memory_budget_bytes,
        )
        graph_calls(model, manager)
        details = {"decisions": manager.decisions, "statistics": manager.statistics, "workload": manager.workload}
        return Applied(model, num_changed=1, kernels=["cuda_graph"], details=details)
