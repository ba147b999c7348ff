"""Recipes as objects: loading one runs nothing and reads nothing outside its chain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_pytorch.errors import ConfigError, RecipeError
from kernel_pytorch.recipe.chain import inherited_sweep, read_chain
from kernel_pytorch.recipe.digest import digest
from kernel_pytorch.recipe.explain import Layers, layers
from kernel_pytorch.recipe.guard import RecipeBody, sweep_text
from kernel_pytorch.recipe.keys import nest
from kernel_pytorch.recipe.sources import RecipeFile, RecipeSources, is_path
from kernel_pytorch.recipe.validate import Validated, validate
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


def load_recipe(name: str, sources: RecipeSources | None = None) -> Recipe:
    """The recipe of a name or a path, checked. Raises RecipeError with one line a mistake."""
    sources = sources or RecipeSources.from_environment()
    file = sources.find(name)
    return _load(file, sources.with_file(name) if is_path(name) else sources)


def catalogue(sources: RecipeSources | None = None) -> list[Entry]:
    """Every recipe of every source; a file with mistakes is an entry with its errors."""
    sources = sources or RecipeSources.from_environment()
    entries = [Entry(f"{folder.prefix}*", folder.path, None, (folder.problem,)) for folder in sources.folders if folder.problem is not None]
    for file in sources.all():
        try:
            entries.append(Entry(file.name, file.path, _load(file, sources)))
        except RecipeError as error:
            entries.append(Entry(file.name, file.path, None, tuple(error.lines)))
    return entries


def validate_layers(found: Layers) -> Validated:
    """The config of layers alone, without Hydra."""
    sweep = {key.removeprefix("sweep."): value for key, value in found.values.items() if key.startswith("sweep.")}
    tree: dict[str, Any] = nest({key: value for key, value in found.values.items() if not key.startswith("sweep.")})
    if sweep:
        tree["sweep"] = {key: [sweep_text(value) for value in values] for key, values in sweep.items()}
    return validate(tree, found)


def _load(file: RecipeFile, sources: RecipeSources) -> Recipe:
    return recipe_of(read_chain(file, sources))


def recipe_of(chain: list[RecipeBody]) -> Recipe:
    """The recipe of a chain that was read. Raises RecipeError with one line a mistake."""
    found = layers(chain, {}, {})
    try:
        config = validate_layers(found).config
    except ConfigError as error:
        raise RecipeError(error.lines) from error
    sweep = {key: [sweep_text(value) for value in values] for key, values in inherited_sweep(chain).items()}
    names = tuple(body.file.name for body in chain)
    return Recipe(names[0], chain[0].file.path, config.info.description, names, found.choices, digest(config), config, sweep)
