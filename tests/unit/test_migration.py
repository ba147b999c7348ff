"""docs/migration.md: every new home that it names exists."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from kernel_pytorch.schema import GraphConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
ROWS = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
HOMES = sorted(
    {name for row in ROWS for name in re.findall(r"`((?:backends|cache|choices|errors|graph|schema|verify|report)(?:\.\w+)+)`", row[1])}
)

SETTINGS = {f"graph.{item.name}" for item in fields(GraphConfig)}


def test_the_page_has_rows_of_three_columns() -> None:
    assert len(ROWS) >= 40
    assert {len(row) for row in ROWS} == {3}


@pytest.mark.parametrize("home", HOMES)
def test_a_new_home_exists(home: str) -> None:
    found = importlib.import_module("kernel_pytorch")
    if home in SETTINGS:
        return
    for part in home.split("."):
        name = f"{found.__name__}.{part}" if hasattr(found, "__path__") else ""
        found = importlib.import_module(name) if name and importlib.util.find_spec(name) else getattr(found, part)


@pytest.mark.parametrize("name", sorted({name for row in ROWS for name in re.findall(r"`(\w+Error)`", row[1])}))
def test_a_new_exception_exists(name: str) -> None:
    assert name in vars(importlib.import_module("kernel_pytorch.errors"))
