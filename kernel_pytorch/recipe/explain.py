"""Where every value came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_pytorch.recipe.sources import RecipeSources


@dataclass(frozen=True)
class Origin:
    """One layer that set a key. layer: `schema`, `config.yaml`, `precision=bf16`, `recipe a100_fp8` or `command line`."""

    layer: str
    file: Path | None
    value: Any


def origins(overrides: Sequence[str], sources: RecipeSources | None = None) -> dict[str, list[Origin]]: ...
