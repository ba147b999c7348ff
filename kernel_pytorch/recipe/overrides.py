"""The words of a command line: parsed with Hydra's own grammar, checked against the schema before Hydra composes.

What would reach code or leave the schema is refused unless the user says KERNEL_PYTORCH_TRUST_CONFIG=1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.chain import read_chain
from kernel_pytorch.recipe.guard import RecipeBody
from kernel_pytorch.recipe.keys import HYDRA_WORDS, coerce, flatten, quoted, unknown
from kernel_pytorch.recipe.options import GROUPS, options
from kernel_pytorch.recipe.sources import RecipeSources, is_path
from kernel_pytorch.schema import nearest

TRUST_VARIABLE = "KERNEL_PYTORCH_TRUST_CONFIG"
# What every plain word on the command line may be: a group, the recipe, or the one key that stands at the top.
WORDS = ("recipe", *GROUPS, "seed")

_HYDRA_KEYS = frozenset({"hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"})
# Launchers and sweepers that are Hydra's own, and their keys that are plain numbers.
_HYDRA_GROUPS = {
    "hydra/launcher": ("basic", "joblib", "submitit_local", "submitit_slurm", "ray"),
    "hydra/sweeper": ("basic", "optuna"),
}
_HYDRA_NUMBERS = re.compile(r"hydra\.(launcher|sweeper)\.(n_jobs|n_trials|max_batch_size|timeout_min|cpus_per_task|gpus_per_node|mem_gb)")
_RECIPE_PATH = re.compile(r"\+{0,2}recipe=(.*\.ya?ml)", re.DOTALL)
# Enough of a sweep's values to find every mistake that is not hidden in a range of thousands.
_MAX_CHECKED = 1000


@dataclass
class Words:
    """Checked overrides. hydra: as Hydra is given them. user: the user's own, recipe choice and hydra.* excluded.
    recipes: what `recipe=` named. choices and values: of a single run, by group and by dotted key."""

    hydra: list[str] = field(default_factory=list)
    user: list[str] = field(default_factory=list)
    recipes: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    # Groups and keys that the user set, sweeps included.
    named: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Read:
    """sources: with the folders of recipes named by path. chains: each recipe named, with its parents."""

    words: Words
    sources: RecipeSources
    chains: dict[str, list[RecipeBody]]

    @property
    def chain(self) -> list[RecipeBody]:
        """The chain of a single run; empty without a recipe."""
        return next(iter(self.chains.values()), [])


def _is_hydra(key: str) -> bool:
    return re.split(r"[./]", key)[0] == "hydra"


def trusted(environ: Mapping[str, str] = os.environ) -> bool:
    return environ.get(TRUST_VARIABLE) == "1"


def read_overrides(overrides: Sequence[str], sources: RecipeSources, *, multirun: bool = False) -> Read:
    """Checks every override, and every recipe that they name. Raises ConfigError with one line a mistake."""
    words, errors = Words(), []
    for text in overrides:
        if match := _RECIPE_PATH.fullmatch(text):
            sources = _read_recipes(match[1].split(",") if multirun else [match[1]], words, sources, errors)
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            errors.append(_grammar(text, error))
            continue
        if override.key_or_group == "recipe" and override.package is None and override.type is not OverrideType.DEL:
            values, problem = _recipe_names(override, multirun)
            errors += [problem] if problem else []
            sources = _read_recipes(values, words, sources, errors)
            continue
        problems = list(_check(override, text, words, multirun))
        errors += problems
        if not problems:
            words.hydra.append(text)
            words.user += [] if _is_hydra(override.key_or_group) else [text]
            words.named.add(override.key_or_group)
    if not multirun and len(words.recipes) > 1:
        errors.append(f"command line: recipe: found {', '.join(words.recipes)}; allowed one recipe, or -m to run each")
    chains: dict[str, list[RecipeBody]] = {}
    for name in dict.fromkeys(words.recipes):
        try:
            chains[name] = read_chain(sources.find(name), sources)
        except ConfigError as error:
            errors += error.lines
    if errors:
        raise ConfigError(errors)
    return Read(words, sources, chains)


def _grammar(text: str, error: HydraException) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    found = f"found {quoted(text)}, which Hydra's grammar does not read: {quoted(reason)}"
    return f"command line: {found}; allowed KEY=VALUE, quotes around special characters"


def _recipe_names(override: Override, multirun: bool) -> tuple[list[str], str | None]:
    if override.is_sweep_override():
        if not multirun:
            return [], f"command line: recipe: found {quoted(override.get_value_string())}; allowed one recipe, or -m to run each"
        if not override.is_choice_sweep() or not hasattr(override.value(), "list"):
            return [], f"command line: recipe: found {quoted(override.get_value_string())}; allowed names: recipe=a,b"
        return [str(value) for value in override.sweep_string_iterator()], None
    value = override.value()
    if not isinstance(value, str):
        return [], f"command line: recipe: found {quoted(value)}; allowed the name of a recipe, NAMESPACE/NAME or FILE.yaml"
    return [value], None


def _read_recipes(names: Sequence[str], words: Words, sources: RecipeSources, errors: list[str]) -> RecipeSources:
    hydra_names: list[str] = []
    for name in names:
        try:
            file = sources.find(name)
        except ConfigError as error:
            errors += [f"command line: {line}" for line in error.lines]
            continue
        sources = sources.with_file(name) if is_path(name) else sources
        words.recipes.append(file.name)
        hydra_names.append(file.hydra_name)
    if hydra_names:
        words.hydra.append(f"+recipe={','.join(hydra_names)}")
        words.named.add("recipe")
    return sources


def _check(override: Override, text: str, words: Words, multirun: bool) -> Iterator[str]:
    key = override.key_or_group
    if not trusted() and (reason := _untrusted(override, text)):
        yield f"command line: {key}: found {quoted(text)}; {reason}"
    elif _is_hydra(key):
        return
    elif override.package is not None:
        yield f"command line: {key}: found the package {quoted(override.package)}; allowed {key}=VALUE"
    elif override.type is OverrideType.DEL:
        way = f"write {key}=none" if key in GROUPS and "none" in options(key) else "nothing can be removed, set it instead"
        yield f"command line: {key}: found '~'; allowed KEY=VALUE ({way})"
    elif not key:
        yield f"command line: found {quoted(text)}; allowed KEY=VALUE"
    elif key not in GROUPS and (problem := _unknown(key)):
        yield f"command line: {key}: {problem}"
    elif override.type is OverrideType.ADD:
        yield f"command line: {key}: found '+'; allowed {key}=VALUE without it"
    elif override.is_sweep_override():
        yield from _sweep(override, multirun)
    else:
        yield from _single(key, override.value(), words)


def _unknown(key: str) -> str | None:
    top = key.split(".")[0]
    if top in ("info", "sweep"):
        return f"found a key that only a recipe sets; allowed {', '.join(WORDS)} and keys below the groups"
    if "/" in key or top not in WORDS[1:]:
        what = "key" if "." in key else "group or key"
        return f"found an unknown {what}; allowed {', '.join(WORDS)}, and keys below the groups{nearest(top, WORDS)}"
    return unknown(key)


def _sweep(override: Override, multirun: bool) -> Iterator[str]:
    key = override.key_or_group
    if not multirun:
        yield f"command line: {key}: found {quoted(override.get_value_string())}; allowed one value, or -m to run each"
    elif override.is_discrete_sweep() and hasattr(override.value(), "include"):
        if key not in GROUPS:
            yield f"command line: {key}: found a glob; allowed values"
    elif override.is_discrete_sweep():
        for value in dict.fromkeys(islice(override.sweep_string_iterator(), _MAX_CHECKED)):
            yield from _single(key, OverridesParser.create().parse_override(f"{key}={value}").value(), Words())


def _single(key: str, value: Any, words: Words) -> Iterator[str]:
    if key not in GROUPS:
        tree: Any = value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        for leaf, found in flatten(tree):
            # An interpolation, which only a trusted caller may write, has its value when the config is composed.
            if not _interpolates(found) and (problem := coerce(leaf, found)[1]):
                yield f"command line: {leaf}: {problem}"
            words.values[leaf] = found
    elif isinstance(value, str) and value in options(key):
        words.choices[key] = value
    else:
        names = options(key)
        hint = nearest(value, names) if isinstance(value, str) else ""
        hint = f" (a key of it is set as {key}.KEY=VALUE)" if isinstance(value, dict) else hint
        yield f"command line: {key}: found {quoted(value)}; allowed {', '.join(names)}{hint}"


def _untrusted(override: Override, text: str) -> str | None:
    """Why an override needs the trust variable; None when it does not."""
    key = override.key_or_group
    trust = f"set {TRUST_VARIABLE}=1 to allow it"
    if any(word in HYDRA_WORDS for word in re.split(r"[./]", key)) or _names_code(override._value):
        return f"allowed no {', '.join(HYDRA_WORDS)}: they name code ({trust})"
    if "${" in text or _interpolates(override._value):
        return f"allowed plain values, no interpolations ({trust})"
    if not _is_hydra(key):
        return None
    if override.type is OverrideType.CHANGE and override.package is None:
        if key in _HYDRA_KEYS or _HYDRA_NUMBERS.fullmatch(key):
            return None
        if key in _HYDRA_GROUPS and not override.is_sweep_override() and override.value() in _HYDRA_GROUPS[key]:
            return None
    allowed = [*sorted(_HYDRA_KEYS), *(f"{group}={'|'.join(names)}" for group, names in _HYDRA_GROUPS.items())]
    return f"allowed {', '.join(allowed)} ({trust})"


def _pieces(value: Any) -> Iterator[Any]:
    """A parsed value and everything inside it; quoted strings as their text."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _pieces(key)
            yield from _pieces(below)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _pieces(item)
    elif hasattr(value, "list"):
        yield from _pieces(value.list)
    else:
        yield getattr(value, "text", value)


def _names_code(value: Any) -> bool:
    return any(isinstance(piece, str) and any(word in piece for word in HYDRA_WORDS) for piece in _pieces(value))


def _interpolates(value: Any) -> bool:
    return any(isinstance(piece, str) and "${" in piece for piece in _pieces(value))
