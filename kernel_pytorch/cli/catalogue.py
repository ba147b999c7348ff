"""`list`, `validate` and `copy`: recipes as files."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from rich.text import Text

from kernel_pytorch.cli.console import table
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.load import catalogue, load_recipe
from kernel_pytorch.recipe.sources import FILE_NAMESPACE, SUFFIXES, RecipeFile, RecipeSources
from kernel_pytorch.report.plain import plain
from kernel_pytorch.report.terminal import make_console


def list_recipes(words: list[str]) -> int:
    """One line a recipe; a file with mistakes is listed with them, and the others are not affected."""
    if words:
        raise ConfigError(f"list takes no words, found {words[0]!r}; `describe {words[0]}` prints one")
    rows = table("recipe", "what it does", "hardware", "digest", fixed=(0, 2, 3))
    for entry in catalogue(RecipeSources.from_environment()):
        if entry.recipe is None:
            rows.add_row(entry.name, Text("error: " + "; ".join(plain(line) for line in entry.errors), style="red"), "", "")
            continue
        hardware = ", ".join(entry.recipe.config.info.hardware) or entry.recipe.config.backend.hardware
        rows.add_row(entry.name, plain(entry.recipe.description), plain(hardware), entry.recipe.digest[:12])
    make_console().print(rows)
    return 0


def validate(words: list[str]) -> int:
    """All mistakes of all recipes, one a line on stderr; one line on stdout for each that has none."""
    if not words:
        raise ConfigError("validate takes at least one NAME or FILE")
    errors: list[str] = []
    for word in words:
        try:
            recipe = load_recipe(recipe_word(word), RecipeSources.from_environment())
        except ConfigError as error:
            errors += error.lines
        else:
            print(f"{plain(word)}: valid, digest {recipe.digest[:12]}")
    sys.stdout.flush()
    if errors:
        raise ConfigError(errors)
    return 0


def copy(words: list[str]) -> int:
    """Writes a recipe to a new file, with its parents named so that they are found from anywhere."""
    if len(words) != 2:
        raise ConfigError(f"copy takes RECIPE DEST: found {len(words)} words")
    sources = RecipeSources.from_environment()
    name = recipe_word(words[0])
    load_recipe(name, sources)
    file = sources.find(name)
    target = Path(words[1]).expanduser()
    if target.is_dir():
        target = target / file.path.name
    if target.suffix not in SUFFIXES:
        raise ConfigError(f"{target}: a recipe file ends in .yaml")
    text = _with_absolute_parents(file, sources, target)
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(f"{target}: is there already and is not overwritten; choose another name") from None
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}") from None
    shown = os.path.relpath(target)
    print(f"{shown} written; run it with +recipe={shown if shown.startswith('.') else './' + shown}")
    return 0


_PARENT = re.compile(r"^(\s*-\s+)(?!override\b|_self_)[\"']?([A-Za-z][\w-]*)[\"']?(\s*(?:#.*)?)$")


def _with_absolute_parents(file: RecipeFile, sources: RecipeSources, target: Path) -> str:
    """`- h100_bf16` stands for a recipe of the same folder; the copy lies elsewhere, so it says `- /recipe/h100_bf16`."""
    lines, inside = [], False
    for line in file.path.read_text(encoding="utf-8").splitlines():
        if re.match(r"defaults\s*:", line):
            inside = True
            if "[" in line:
                raise ConfigError(f"{file.name}: copy reads a defaults list of one entry a line; write it so")
        elif inside and line and not line[0].isspace() and not line.startswith(("-", "#")):
            inside = False
        match = _PARENT.match(line) if inside else None
        if match:
            parent = sources.parent(file, match[2])
            if not parent.namespace.startswith(FILE_NAMESPACE):
                line = f"{match[1]}/recipe/{parent.name}{match[3]}"
            elif target.resolve().parent != parent.path.resolve().parent:
                raise ConfigError(
                    f"{file.name}: its parent {match[2]!r} is found beside it only; copy to that folder, {parent.path.parent}"
                )
        lines.append(line)
    return "\n".join(lines) + "\n"


def recipe_word(word: str) -> str:
    """`recipe=a`, `+recipe=a` and `a` are the same recipe."""
    return re.sub(r"^\+{0,2}recipe=", "", word)
