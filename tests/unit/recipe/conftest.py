"""A folder of recipes that a test writes, known as the namespace `team`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kernel_pytorch.recipe.sources import RecipeSources

Write = Callable[[str, "str | bytes"], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "team"
    path.mkdir()
    return path


@pytest.fixture
def write(folder: Path) -> Write:
    def write_file(name: str, text: str | bytes) -> Path:
        path = folder / f"{name}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return write_file


@pytest.fixture
def sources(folder: Path) -> RecipeSources:
    return RecipeSources.from_environment([f"team={folder}"], environ={})
