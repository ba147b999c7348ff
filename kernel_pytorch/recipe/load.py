"""Recipes as objects: loading one runs nothing and reads nothing outside its chain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kernel_pytorch.recipe.sources import RecipeSources
from kernel_pytorch.schema import RootConfig


@dataclass(frozen=True)
class Recipe:
    """chain: this recipe, then its parents, by name. choices: group -> option. sweep: group or key -> values under -m."""

    name: str
    path: Path
    description: str
    chain: tuple[str, ...]
    choices: dict[str, str]
    digest: str
    config: RootConfig
    sweep: dict[str, list[str]]


@dataclass(frozen=True)
class Entry:
    """One line of `list`. recipe is None where the file has mistakes, which are in `errors`."""

    name: str
    path: Path
    recipe: Recipe | None
    errors: tuple[str, ...] = ()


def load_recipe(name: str, sources: RecipeSources | None = None) -> Recipe: ...


def catalogue(sources: RecipeSources | None = None) -> list[Entry]: ...
