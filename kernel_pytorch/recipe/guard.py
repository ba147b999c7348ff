"""What a recipe may say. A recipe is pure data: it picks options, sets keys of the schema, and names no code.

Checked before Hydra sees the file. All mistakes of one file are told at once, each `FILE: KEY: found X; allowed Y`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernel_pytorch.errors import RecipeError
from kernel_pytorch.recipe.keys import HYDRA_WORDS, annotations, coerce, flatten, nest, owner, quoted, unknown
from kernel_pytorch.recipe.options import options
from kernel_pytorch.recipe.sources import RecipeFile, RecipeSources, name_problem, shown
from kernel_pytorch.recipe.text import parse, read_bytes
from kernel_pytorch.schema import RECIPE_GROUPS, InfoConfig, nearest

# The run groups that a recipe may touch, only to tighten them.
GATES = ("verify", "measure")
TOP_KEYS = (*RECIPE_GROUPS, *GATES, "info", "sweep", "defaults")
OVERRIDABLE = (*RECIPE_GROUPS, *GATES)

_REASONS = {
    "model": "a recipe works on any model; write model=OPTION on the command line",
    "data": "a recipe works on any data; write data=OPTION on the command line",
    "seed": "write seed=N on the command line",
    "hydra": "a recipe does not configure Hydra",
}
_PARENT = re.compile(r"(/recipe/)?(?:([^/]+)/)?([^/]+)")


@dataclass(frozen=True)
class RecipeBody:
    """One checked file. parent: the entry of its defaults list. choices: group -> option of this file alone.
    values: dotted key -> value of this file alone, without `info` and `sweep`."""

    file: RecipeFile
    parent: str | None
    choices: dict[str, str]
    values: dict[str, Any]
    info: dict[str, Any]
    sweep: dict[str, list[Any]]

    def as_hydra(self) -> dict[str, Any]:
        """The config that Hydra merges. `info` is given whole, so that nothing of the parent's is inherited."""
        # Hydra takes a bare name as one of the group `recipe`; ours is one of the same folder.
        here = f"/recipe/{self.file.namespace}/" if self.file.namespace else "/recipe/"
        parent = self.parent if self.parent is None or self.parent.startswith("/") else here + self.parent
        defaults: list[Any] = [parent] if parent else []
        defaults += [{f"override /{group}": option} for group, option in self.choices.items()]
        empty = {"name": "", "description": "", "hardware": [], "proven_on": []}
        body = nest(self.values) | {"info": {name: self.info.get(name, empty.get(name)) for name in annotations(InfoConfig)}}
        # OmegaConf's Dict[str, List[str]] takes texts; the schema says so too.
        sweep = {"sweep": {key: [sweep_text(value) for value in values] for key, values in self.sweep.items()}} if self.sweep else {}
        return {"defaults": [*defaults, "_self_"], **body, **sweep}


def read_recipe(file: RecipeFile, sources: RecipeSources) -> RecipeBody:
    """Reads and checks one file. Raises RecipeError with every mistake in it; parents are not opened."""
    try:
        if problem := name_problem(file.path.stem):
            raise RecipeError(f"file name: {problem}")
        tree = parse(read_bytes(file.path, sources.folder_of(file)))
        errors: list[str] = []
        parent, choices = _defaults(tree.pop("defaults", []), errors)
        errors += _forbidden(tree)
        errors += _top_keys(tree)
        body = {key: value for key, value in tree.items() if key in TOP_KEYS}
        sweep = body.pop("sweep", {})
        errors += check_sweep(sweep)
        values = {key: value for key, value in flatten(body) if not any(word in HYDRA_WORDS for word in key.split("."))}
        for key, value in values.items():
            problem = coerce(key, value)[1]
            errors += [f"{key}: {problem}"] if problem else []
        if errors:
            raise RecipeError(errors)
    except RecipeError as error:
        raise RecipeError([f"{shown(file.path)}: {line}" for line in error.lines]) from error
    info = nest({key: value for key, value in values.items() if key.startswith("info.")}).get("info", {})
    values = {key: value for key, value in values.items() if not key.startswith("info.")}
    return RecipeBody(file, parent, choices, values, info, sweep)


def _top_keys(tree: dict[str, Any]) -> Iterator[str]:
    for key in tree:
        if key in TOP_KEYS or key in HYDRA_WORDS:
            continue
        hint = f" ({_REASONS[key]})" if key in _REASONS else nearest(key, TOP_KEYS)
        yield f"{key}: found {'an unknown key' if key not in _REASONS else 'this key'}; allowed {', '.join(TOP_KEYS)}{hint}"


def _forbidden(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, below in value.items():
            if key in HYDRA_WORDS:
                yield f"{path}{key}: found a name of code; allowed no {key}: choose an option with defaults: - override /GROUP: OPTION"
            yield from _forbidden(below, f"{path}{key}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _forbidden(item, f"{path.removesuffix('.')}[{index}].")


def _defaults(entries: Any, errors: list[str]) -> tuple[str | None, dict[str, str]]:
    parent: str | None = None
    choices: dict[str, str] = {}
    own_body = False
    if not isinstance(entries, list):
        errors.append(f"defaults: found {quoted(entries)}; allowed a list")
        return None, {}
    for index, entry in enumerate(entries):
        key = f"defaults[{index}]"
        if entry == "_self_":
            if own_body:
                errors.append(f"{key}: found '_self_' twice; allowed once")
            own_body = True
        elif isinstance(entry, str):
            if problem := _parent_problem(entry):
                errors.append(f"{key}: {problem}")
            elif parent is not None:
                errors.append(f"{key}: found a second parent {quoted(entry)}; allowed one parent recipe")
            elif own_body or choices:
                errors.append(f"{key}: found the parent {quoted(entry)} after other entries; allowed first, so that this file overrides it")
            else:
                parent = entry
        else:
            _override(key, entry, choices, errors)
    return parent, choices


def _parent_problem(entry: str) -> str | None:
    match = _PARENT.fullmatch(entry)
    wanted = "allowed NAME for a recipe in the same folder, /recipe/NAME for a shipped one, /recipe/TEAM/NAME for another"
    if not match or (match[2] and not match[1]):
        return f"found {quoted(entry)}; {wanted}"
    problem = next((problem for part in match.groups()[1:] if part and (problem := name_problem(part))), None)
    return f"found {quoted(entry)}; {wanted}" if problem else None


def _override(key: str, entry: Any, choices: dict[str, str], errors: list[str]) -> None:
    if not isinstance(entry, dict) or len(entry) != 1:
        errors.append(f"{key}: found {quoted(entry)}; allowed a parent recipe, 'override /GROUP: OPTION' or _self_")
        return
    word, option = next(iter(entry.items()))
    match = re.fullmatch(r"override\s+/(\w+)", word)
    if not match:
        hint = (
            f" (write 'override /{bare}: {option}')" if (bare := word.removeprefix("override ").strip().lstrip("/")) in OVERRIDABLE else ""
        )
        errors.append(f"{key}: found {quoted(word)}; allowed 'override /GROUP: OPTION'{hint}")
        return
    group = match[1]
    if group not in OVERRIDABLE:
        hint = f" ({_REASONS[group]})" if group in _REASONS else nearest(group, OVERRIDABLE)
        errors.append(f"{key}: found the group {group!r}; allowed {', '.join(OVERRIDABLE)}{hint}")
        return
    names = tuple(name for name in options(group) if not (group in GATES and name == "off"))
    if group in GATES and (option is False or option == "off"):
        errors.append(f"{key}: found 'override /{group}: off'; allowed {', '.join(names)}: a recipe may only tighten {group}")
    elif isinstance(option, bool):
        errors.append(f"{key}: found the boolean {quoted(option)} (YAML reads on, off, yes and no as booleans); allowed {', '.join(names)}")
    elif not isinstance(option, str) or option not in names:
        hint = nearest(option, names) if isinstance(option, str) else ""
        errors.append(f"{key}: /{group}: found {quoted(option)}; allowed {', '.join(names)}{hint}")
    elif group in choices:
        errors.append(f"{key}: found a second 'override /{group}'; allowed one a group")
    else:
        choices[group] = option


def check_sweep(sweep: Any) -> Iterator[str]:
    """Mistakes of a `sweep:` block: a group or a key of the seven groups, each with a list of values that it takes."""
    if not isinstance(sweep, dict):
        yield f"sweep: found {quoted(sweep)}; allowed a mapping of GROUP or KEY to a list"
        return
    for key, values in sweep.items():
        where = f"sweep.{key}"
        top = key.split(".")[0]
        if top not in RECIPE_GROUPS or key.startswith("precision.quality"):
            hint = f" ({_REASONS[top]})" if top in _REASONS else nearest(top, RECIPE_GROUPS)
            yield f"{where}: found a key that a recipe does not sweep; allowed {', '.join(RECIPE_GROUPS)} and keys below them{hint}"
        elif any(word in HYDRA_WORDS for word in key.split(".")):
            yield f"{where}: found a name of code; allowed a group or a key of the schema"
        elif "." in key and (problem := unknown(key)):
            yield f"{where}: {problem}"
        elif not isinstance(values, list) or not values:
            yield f"{where}: found {quoted(values)}; allowed a list with at least one value"
        else:
            yield from (f"{where}[{index}]: {problem}" for index, value in enumerate(values) if (problem := _sweep_value(key, value)))


def _sweep_value(key: str, value: Any) -> str | None:
    if isinstance(value, (list, dict)):
        return f"found {quoted(value)}; allowed one plain value"
    if owner(key) and "." in key:
        return coerce(key, value)[1]
    names = options(key)
    if value in names and isinstance(value, str):
        return None
    return f"found {quoted(value)}; allowed {', '.join(names)}" + (nearest(value, names) if isinstance(value, str) else "")


def sweep_text(value: Any) -> str:
    """A sweep value as the schema's texts hold it."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
