"""A validated config as JSON types, and back."""

from __future__ import annotations

from typing import Any

from kernel_pytorch.schema import RootConfig


def to_dict(config: RootConfig) -> dict[str, Any]: ...


def from_dict(data: dict[str, Any]) -> RootConfig: ...
