"""CUDA graphs. Names for users, lazily: importing this package imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernel_pytorch.graph.training import GraphedTrainStep

_HOMES = {"GraphedTrainStep": "kernel_pytorch.graph.training"}

__all__ = ["GraphedTrainStep"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
