"""`explain` and `diff`: where values come from, what a device would do with them, and how two recipes differ."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from kernel_pytorch.cli import arguments as command_line
from kernel_pytorch.cli.catalogue import recipe_word
from kernel_pytorch.cli.console import LEVEL_STYLE, table, value_text
from kernel_pytorch.cli.describe import changed_values
from kernel_pytorch.cli.words import checked
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.canonical import to_dict
from kernel_pytorch.recipe.compose import Composed, compose
from kernel_pytorch.recipe.explain import Origin, origins
from kernel_pytorch.recipe.keys import flatten, leaves
from kernel_pytorch.recipe.load import load_recipe
from kernel_pytorch.recipe.options import GROUPS
from kernel_pytorch.recipe.sources import RecipeSources, is_path
from kernel_pytorch.registry import device_names
from kernel_pytorch.report.plain import plain
from kernel_pytorch.report.terminal import make_console
from kernel_pytorch.schema import RootConfig, nearest


def explain(words: list[str]) -> int:
    """Prints the origin of every value that is not a default, then the plan."""
    overrides, keys, device = _sort(words)
    overrides, prepared = checked(command_line.Arguments(words=overrides))
    composed = compose(overrides, prepared.sources)
    found = origins(overrides, prepared.sources)
    if keys:
        for key in keys:
            _print_history(key, found)
        return 0
    _print_origins(composed, found)
    _print_plan(composed, device)
    return 0


def _sort(words: list[str]) -> tuple[list[str], list[str], str | None]:
    rest, overrides, keys, device = list(words), [], [], None
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag == "--device":
            if not equals and not rest:
                raise ConfigError("--device needs a value")
            device = value if equals else rest.pop(0)
        elif word.startswith("-"):
            raise ConfigError(f"unknown flag {command_line.shown(flag)}{nearest(flag, ['--device', '--recipes', '--help'])}")
        elif equals or word.startswith(("~", "+")):
            overrides.append(word)
        else:
            keys.append(word)
    if device is not None and device not in (allowed := device_names()):
        raise ConfigError(f"--device: found {device!r}; allowed {', '.join(allowed)}{nearest(device, allowed)}")
    return (*_split_recipe(overrides, keys), device)


def _split_recipe(overrides: list[str], keys: list[str]) -> tuple[list[str], list[str]]:
    """A bare word is a key of the schema or the name of a recipe; anything else is a mistake."""
    known = [key for key in leaves() if not key.endswith("._target_")]
    names = [file.name for file in RecipeSources.from_environment().all()] if set(keys) - set(known) else []
    errors, rest = [], []
    for word in keys:
        if word in known:
            rest.append(word)
        elif word in names or is_path(word):
            overrides = [f"+recipe={word}", *overrides]
        else:
            found = command_line.shown(word)
            errors.append(f"explain: found {found}, which is neither a key nor a recipe{nearest(word, [*known, *names])}")
    if errors:
        raise ConfigError(errors)
    return overrides, rest


def _print_origins(composed: Composed, found: dict[str, list[Origin]]) -> None:
    out = make_console()
    changed = changed_values(composed.config)
    title = composed.recipe or "no recipe"
    out.print(Text(title, style="bold"), f"digest {composed.digest[:12]}, with the command line {composed.effective_digest[:12]}", sep="  ")
    out.print()
    rows = table("value", "is", "set by")
    shown: list[Origin] = []
    for group in GROUPS:
        if len(found[group]) > 1:
            rows.add_row(group, found[group][-1].value, found[group][-1].layer)
            shown.append(found[group][-1])
    for key, value in changed.items():
        if key.partition(".")[0] not in ("sweep", "info") and not key.endswith("._target_"):
            rows.add_row(key, value_text(value), found[key][-1].layer)
            shown.append(found[key][-1])
    out.print(rows if rows.row_count else "Every value is the default.")
    _print_files(out, shown)
    for group, keys in composed.ignored.items():
        out.print(f"ignored: {group}={composed.choices.get(group)} does not read {', '.join(keys)}, left over from a layer below")
    out.print()


def _print_history(key: str, found: dict[str, list[Origin]]) -> None:
    out = make_console()
    rows = table(key, "set by")
    for origin in reversed(found[key]):
        rows.add_row(value_text(origin.value), origin.layer)
    out.print(rows)
    _print_files(out, found[key])


def _print_files(out: Console, shown: Iterable[Origin]) -> None:
    """Where each layer is written, once."""
    files = {origin.layer: origin.file for origin in shown if origin.file is not None}
    rows = table("", "")
    rows.show_header = False
    for layer, file in files.items():
        relative = os.path.relpath(file)
        rows.add_row(layer, plain(relative if len(relative) < len(str(file)) else file))
    if files:
        out.print()
        out.print(rows)


def _print_plan(composed: Composed, device: str | None) -> None:
    from kernel_pytorch.engine.explain import explain_plan

    out = make_console()
    steps, outcome = explain_plan(composed.config, composed.choices, composed.ignored, device)
    rows = table("step", device or "this machine", "why", fixed=(0, 1))
    for step in steps:
        if step.optimizer is not None:
            rows.add_row(f"{step.group}={step.option}", Text(step.support, style=LEVEL_STYLE.get(step.support, "")), plain(step.reason))
    if rows.row_count:
        out.print(rows)
        out.print()
    level, _, reason = outcome.partition(": ")
    out.print(Text(level, style=LEVEL_STYLE.get(level, "")), plain(reason), sep="  ")


def diff(words: Sequence[str]) -> int:
    """Prints the values in which two recipes differ."""
    if len(words) != 2:
        raise ConfigError(f"diff takes two recipes: found {len(words)} words")
    sources = RecipeSources.from_environment()
    errors: list[str] = []
    recipes = []
    for word in words:
        try:
            recipes.append(load_recipe(recipe_word(word), sources))
        except ConfigError as error:
            errors += error.lines
    if errors:
        raise ConfigError(errors)
    first, second = recipes
    out = make_console()
    rows = table("value", first.name, "", second.name, fixed=(0, 2))
    for group in GROUPS:
        before, after = first.choices.get(group, ""), second.choices.get(group, "")
        if before != after:
            rows.add_row(group, before, "->", after)
    before, after = changed_values(first.config), changed_values(second.config)
    defaults = dict(flatten(to_dict(RootConfig())))
    for key in sorted({*before, *after}):
        left, right = before.get(key, defaults.get(key)), after.get(key, defaults.get(key))
        if left != right and not key.startswith("info.") and not key.endswith("._target_"):
            rows.add_row(key, value_text(left), "->", value_text(right))
    out.print(rows if rows.row_count else f"{first.name} and {second.name} are the same: digest {first.digest[:12]}")
    return 0
