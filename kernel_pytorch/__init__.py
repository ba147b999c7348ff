"""KernelPyTorch: declarative optimization recipes for PyTorch. Importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernel_pytorch.engine.api import Optimized, load, optimize
    from kernel_pytorch.recipe.load import Recipe, load_recipe
    from kernel_pytorch.report.result import Report

__version__ = "0.1.0"

_HOMES = {
    "optimize": "kernel_pytorch.engine.api",
    "Optimized": "kernel_pytorch.engine.api",
    "load": "kernel_pytorch.engine.api",
    "load_recipe": "kernel_pytorch.recipe.load",
    "Recipe": "kernel_pytorch.recipe.load",
    "Report": "kernel_pytorch.report.result",
}

__all__ = ["Optimized", "Recipe", "Report", "__version__", "load", "load_recipe", "optimize"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
