"""One number for what a recipe means: the same on another machine, and on either line of Hydra."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kernel_pytorch.recipe.canonical import to_dict
from kernel_pytorch.schema import RECIPE_GROUPS, SCHEMA_VERSION, RootConfig


def digest(config: RootConfig) -> str:
    """sha256 of the canonical JSON of the seven groups' non-default values and the schema version.

    Only values that differ from the schema's defaults count: a new field with a default changes no digest."""
    actual, default = to_dict(config), to_dict(RootConfig())
    groups = {group: _difference(actual[group], default[group]) for group in RECIPE_GROUPS}
    meaning = {"schema_version": SCHEMA_VERSION, **{group: values for group, values in groups.items() if values}}
    text = json.dumps(meaning, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _difference(actual: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in actual.items():
        if isinstance(value, dict):
            if below := _difference(value, default[name]):
                result[name] = below
        elif value != default[name]:
            result[name] = value
    return result
