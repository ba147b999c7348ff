# ruff: noqa: E501  (one alphabet a line)
"""Whatever a file holds, reading it ends with plain data or with a RecipeError, and with nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_pytorch.errors import RecipeError
from kernel_pytorch.recipe.guard import read_recipe
from kernel_pytorch.recipe.sources import Folder, RecipeFile, RecipeSources
from kernel_pytorch.recipe.text import MAX_BYTES, control_characters, parse

PIECES = st.sampled_from(
    ["a: ", "- ", "? ", "[", "]", "{", "}", ",", "\n", "  ", "'", '"', "#", "&a", "*a", "!!str", "<<", "%YAML", "---", "...", "${x}", ".nan", "1:30", "0x1", "9", "_target_", "defaults", "precision", "override /graph", "on", "null", ">", "-", "\t", "~", "=", "\\x24", "\\e", "\\n"]
)  # fmt: skip


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(below) for key, below in value.items())
    if isinstance(value, list):
        return all(plain(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return (
        value is None
        or type(value) in (bool, int)
        or (type(value) is str and "${" not in value and not control_characters(value.replace("\n", "")))
    )


def outcome(data: bytes) -> tuple[dict[str, Any], list[str]]:
    try:
        return parse(data), []
    except RecipeError as error:
        return {}, error.lines


def is_right(data: bytes) -> bool:
    body, lines = outcome(data)
    return plain(body) and all(line and control_characters(line) is None for line in lines)


@settings(derandomize=True, max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=40).map(lambda pieces: "".join(pieces).encode()))
def test_pieces_of_yaml(data: bytes) -> None:
    assert is_right(data)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.binary(max_size=MAX_BYTES // 64))
def test_any_bytes(data: bytes) -> None:
    assert is_right(data)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(categories=["L", "N", "P"]), max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from(["precision", "weight", "format", "dtype", "include", "x", "_target_"]), below, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["defaults", "precision", "sweep", "info", "verify", "backend", "x"]), TREES, max_size=4))
def test_any_tree(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    import yaml

    folder = tmp_path_factory.mktemp("fuzz", numbered=True)
    path = folder / "tree.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    sources = RecipeSources((Folder("team", folder, "test"),))
    lines: list[str] = []
    try:
        read_recipe(RecipeFile("team/tree", "team", path), sources)
    except RecipeError as error:
        lines = error.lines
    assert all(line.startswith(f"{path}: ") for line in lines)
