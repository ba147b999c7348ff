"""A validated config as JSON types, and back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.validate import build
from kernel_pytorch.schema import RootConfig


def to_dict(config: RootConfig) -> dict[str, Any]:
    """JSON types only, every field, enums by their value."""
    return plain(config)


def plain(value: Any) -> Any:
    """A schema value as JSON types."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(below) for key, below in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_dict(data: dict[str, Any]) -> RootConfig:
    """The config that `to_dict` was given. Raises ConfigError with one line a mistake."""
    config, problems = build(RootConfig, data)
    if problems:
        raise ConfigError([f"{key}: {problem}" for key, problem in problems])
    return config
