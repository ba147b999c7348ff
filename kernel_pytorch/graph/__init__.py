"""CUDA graphs. Names for users, lazily: importing this package imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernel_pytorch.choices import GraphDeploymentStrategy
    from kernel_pytorch.graph.analysis import WorkloadAnalysis
    from kernel_pytorch.graph.manager import CUDAGraphManager
    from kernel_pytorch.graph.training import GraphedTrainStep

_HOMES = {
    "CUDAGraphManager": "kernel_pytorch.graph.manager",
    "GraphDeploymentStrategy": "kernel_pytorch.choices",
    "GraphedTrainStep": "kernel_pytorch.graph.training",
    "WorkloadAnalysis": "kernel_pytorch.graph.analysis",
}

__all__ = ["CUDAGraphManager", "GraphDeploymentStrategy", "GraphedTrainStep", "WorkloadAnalysis"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
