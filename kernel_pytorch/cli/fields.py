"""The schema as `describe` prints it: every setting of a group with what it may be, its default and its meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from kernel_pytorch import schema
from kernel_pytorch.formats import DTYPES, FORMATS
from kernel_pytorch.recipe import keys
from kernel_pytorch.registry import hardware_names

# Names that a validator checks against a registry; the annotation alone does not list them.
_REGISTRIES = {
    get_args(schema.FormatName)[1]: lambda: tuple(FORMATS),
    get_args(schema.DtypeName)[1]: lambda: DTYPES,
    get_args(schema.HardwareName)[1]: hardware_names,
}


@dataclass(frozen=True)
class Setting:
    """key: dotted, below the group. values: what it may be, range included. default: the schema's own."""

    key: str
    values: str
    default: Any
    meaning: str


def group_class(group: str) -> type:
    """The dataclass of one entry of the root config."""
    cls = keys.node_class(keys.annotations(schema.RootConfig)[group])
    assert cls is not None, group
    return cls


def settings(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a config class, nested ones with dotted keys; the class itself is chosen by the option."""
    for name, annotation in keys.annotations(cls).items():
        child = keys.node_class(annotation)
        if child is not None:
            yield from settings(child, f"{prefix}{name}.")
        elif not name.startswith("_"):
            yield Setting(f"{prefix}{name}", _values(annotation), keys.default(cls, name), _meaning(annotation))


def _values(annotation: Any) -> str:
    _, optional, constraints = keys.bare(annotation)
    registry = next((names for validator, names in _REGISTRIES.items() if validator in constraints), None)
    return keys.allowed(annotation) if registry is None else ", ".join(registry()) + (" or null" if optional else "")


def _meaning(annotation: Any) -> str:
    return next((item.description for item in keys.bare(annotation)[2] if getattr(item, "description", None)), "")
