"""Where recipes are: shipped, in named folders, in installed packages, or one file named by its path."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RecipeFile:
    """name: what `recipe=` takes (`a100_fp8`, `team/nightly`, `./mine.yaml`). namespace: empty for a shipped one."""

    name: str
    namespace: str
    path: Path


@dataclass(frozen=True)
class RecipeSources:
    @classmethod
    def from_environment(cls, extra: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> RecipeSources: ...

    def all(self) -> list[RecipeFile]: ...

    def find(self, name: str) -> RecipeFile: ...
