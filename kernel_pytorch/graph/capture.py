"""CUDA graph capture of the call, whole or in pieces, kept where it measures faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from kernel_pytorch.backends.capabilities import matrix_rows
from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.graph.bucketed_call import BucketedCall
from kernel_pytorch.graph.graphed_call import GraphedCall
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.pieces import Pieces
from kernel_pytorch.graph.recorder import CudaRecorder
from kernel_pytorch.graph.regions import Regions
from kernel_pytorch.graph.replayer import replayer_class
from kernel_pytorch.graph.rival import EagerRival, is_compiled
from kernel_pytorch.graph.strategy import terms
from kernel_pytorch.optimizer import Applied, Context, Level, Optimizer, Support
from kernel_pytorch.schema import BucketingConfig

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
        rival=EagerRival(manager) if manager.terms.tries_eager and is_compiled(model) else None,
    )
    model._compiled_call_impl = graphed
    return graphed


def bucket_calls(
    model: nn.Module, graphed: GraphedCall, dynamic_dims: Sequence[str], bucketing: BucketingConfig, tile: int | None
) -> BucketedCall:
    """Puts padding around a model's GraphedCall, so that one graph serves a bucket of sizes."""
    manager = graphed.manager

    @contextmanager
    def without_pieces() -> Iterator[None]:
        before, manager.pieces_off = manager.pieces_off, True
        try:
            yield
        finally:
            manager.pieces_off = before

    bucketed = BucketedCall(
        model,
        graphed,
        dynamic_dims,
        bucketing,
        plain=graphed.plain,
        straight=graphed,
        replay=graphed.replay,
        checking=without_pieces,
        tile=tile,
        static_inputs=True,
        num_captures=lambda: manager.statistics["captures"],
        busy=manager.recorder.busy,
        hold=manager.recorder.hold,
    )
    model._compiled_call_impl = bucketed
    return bucketed


class CaptureWholeCall(Optimizer):
    """Wraps the model's call in a GraphedCall. The model's class and its names in state_dict stay.

    `Applied.details` holds live objects: `decisions` fills as calls with new arguments are captured and timed, `statistics`
    counts, `workload` has the calls and replays of every kind of call; with dynamic dims, `dynamic` has what padding came to.
    `replayer` says whether calls are checked and replayed in C++, or why in Python."""

    def __init__(
        self,
        *,
        strategy: GraphDeploymentStrategy,
        num_warmup_calls: int,
        min_speedup: float | None,
        memory_budget_bytes: int | None,
        dynamic_dims: list[str],
        bucketing: BucketingConfig,
    ) -> None:
        self.strategy = strategy
        self.num_warmup_calls = num_warmup_calls
        self.min_speedup = min_speedup
        self.memory_budget_bytes = memory_budget_bytes
        self.dynamic_dims = dynamic_dims
        self.bucketing = bucketing

    def support(self, backend: Backend) -> Support:
        if backend.device.type != "cuda":
            return Support(Level.native, f"not applicable on {backend.vendor}")
        unread = not self.dynamic_dims and self.bucketing != BucketingConfig()
        return Support(Level.native, "graph.bucketing is not read: graph.dynamic_dims names no dims" if unread else "")

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
        graphed = graph_calls(model, manager)
        built, why = replayer_class()
        details: dict[str, Any] = {"decisions": manager.decisions, "statistics": manager.statistics, "workload": manager.workload}
        details["replayer"] = f"Python: {why}" if built is None else "C++"
        if self.dynamic_dims:
            tile = matrix_rows(context.backend.facts.arch)
            details["dynamic"] = bucket_calls(model, graphed, self.dynamic_dims, self.bucketing, tile).report
        return Applied(model, num_changed=1, kernels=["cuda_graph"], details=details)
