"""The options of `conf/`: which there are, what each sets, and which config.yaml chooses."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from kernel_pytorch.paths import data_folder
from kernel_pytorch.recipe.keys import flatten
from kernel_pytorch.schema import RECIPE_GROUPS, RUN_GROUPS

GROUPS = (*RECIPE_GROUPS, *RUN_GROUPS)


@cache
def options(group: str) -> tuple[str, ...]:
    """Names of a group's options, in order."""
    return tuple(sorted(path.stem for path in (data_folder("conf") / group).glob("*.yaml")))


def option_file(group: str, option: str) -> Path:
    return data_folder("conf") / group / f"{option}.yaml"


@cache
def _option_values(group: str, option: str) -> tuple[tuple[str, Any], ...]:
    loaded = yaml.safe_load(option_file(group, option).read_text(encoding="utf-8")) or {}
    return tuple(flatten({group: loaded}))


def option_values(group: str, option: str) -> dict[str, Any]:
    """Dotted key -> value of what an option's file sets."""
    return dict(_option_values(group, option))


@cache
def _default_choices() -> tuple[tuple[str, str], ...]:
    loaded = yaml.safe_load((data_folder("conf") / "config.yaml").read_text(encoding="utf-8"))
    entries = [entry for entry in loaded["defaults"] if isinstance(entry, dict)]
    return tuple((group, option) for entry in entries for group, option in entry.items() if group in GROUPS)


def default_choices() -> dict[str, str]:
    """Group -> the option that config.yaml chooses."""
    return dict(_default_choices())
