"""One number for what a recipe means."""

from __future__ import annotations

from kernel_pytorch.schema import RootConfig


def digest(config: RootConfig) -> str: ...
