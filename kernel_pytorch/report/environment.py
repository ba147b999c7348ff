"""What a result depends on besides the recipe: versions, from package metadata alone (nothing is imported)."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("kernel-pytorch", "torch", "triton", "torchao", "transformers", "hydra-core", "omegaconf", "pydantic", "numpy")


def environment() -> dict[str, Any]:
    """Python, platform and package versions; None for a package that is not installed.

    device, driver and threads are None here: the engine, which has the machine in its hands, fills them in."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": versions["torch"],
        "triton": versions["triton"],
        "device": None,
        "driver": None,
        "threads": None,
        "logical_cpus": os.cpu_count(),
        "versions": versions,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
