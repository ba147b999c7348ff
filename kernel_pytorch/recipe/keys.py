"""The schema by dotted key: which keys there are, what each takes, and whether a value is one of those."""

import math
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from kernel_pytorch.schema import RootConfig, nearest

# Hydra gives these a meaning; in a recipe and on the command line they would name code.
HYDRA_WORDS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


@cache
def annotations(cls: type) -> dict[str, Any]:
    """Field name -> annotation with its constraints, in the order of the fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def bare(annotation: Any) -> tuple[Any, bool, list[Any]]:
    """The type without Annotated and Optional, whether null is allowed, and the constraints."""
    constraints: list[Any] = []
    optional = False
    while True:
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Annotated:
            constraints += args[1:]
            annotation = args[0]
        elif origin is typing.Union and type(None) in args:
            optional = True
            annotation = next(arg for arg in args if arg is not type(None))
        else:
            return annotation, optional, constraints


def default(cls: type, name: str) -> Any:
    """A field's default, made anew."""
    field = next(field for field in fields(cls) if field.name == name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def node_class(annotation: Any) -> type | None:
    """The dataclass that a field holds, or None for a leaf."""
    kind = bare(annotation)[0]
    return kind if is_dataclass(kind) and isinstance(kind, type) else None


@cache
def owner(key: str) -> tuple[type, str] | None:
    """The class and the field that a dotted key names; None for a key that is not in the schema."""
    *path, name = key.split(".")
    cls: type = RootConfig
    for part in path:
        child = node_class(annotations(cls)[part]) if part in annotations(cls) else None
        if child is None:
            return None
        cls = child
    return (cls, name) if name in annotations(cls) else None


def unknown(key: str) -> str | None:
    """Why a dotted key is not in the schema, with the nearest name; None when it is."""
    parts = key.split(".")
    cls: type = RootConfig
    for index, part in enumerate(parts):
        known = annotations(cls)
        names = tuple(name for name in known if not name.startswith("_"))
        if part not in known:
            return f"found an unknown key; allowed {', '.join(names)}{nearest(part, names)}"
        child = node_class(known[part])
        if child is None:
            below = ".".join(parts[index + 1 :])
            return (
                f"found {below!r} below {'.'.join(parts[: index + 1])}, which holds one value; allowed no key below it" if below else None
            )
        cls = child
    return None


def leaves(cls: type = RootConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted leaf key of the schema, in order."""
    for name, annotation in annotations(cls).items():
        child = node_class(annotation)
        if child is not None:
            yield from leaves(child, f"{prefix}{name}.")
        else:
            yield prefix + name


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a tree as dotted keys: mappings are opened where the schema has a node, and where it knows nothing."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        place = owner(key)
        is_node = place is not None and node_class(annotations(place[0])[place[1]]) is not None
        if isinstance(value, dict) and (is_node or (place is None and value)):
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as a tree."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    return tree


def quoted(value: Any) -> str:
    """A value for a message: one line, no control characters, not long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value.value if isinstance(value, Enum) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def allowed(annotation: Any) -> str:
    """What a leaf takes, in words."""
    kind, optional, constraints = bare(annotation)
    suffix = " or null" if optional else ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(member.name for member in kind) + suffix
    low, high = _bounds(constraints)
    bounds = f" from {low} to {high}" if low and high else f" of at least {low}" if low else f" of at most {high}" if high else ""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if kind in words:
        return words[kind] + bounds + suffix
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        return "a list of " + (f"mappings with {', '.join(annotations(item))}" if is_dataclass(item) else "texts") + suffix
    return "a mapping" + suffix


def _bounds(constraints: list[Any]) -> tuple[str, str]:
    low = high = ""
    for constraint in constraints:
        for part in getattr(constraint, "metadata", [constraint]):
            low = next((f"{word}{getattr(part, name)}" for name, word in (("ge", ""), ("gt", "more than ")) if hasattr(part, name)), low)
            high = next((f"{word}{getattr(part, name)}" for name, word in (("le", ""), ("lt", "less than ")) if hasattr(part, name)), high)
            if hasattr(part, "max_length"):
                high = f"{part.max_length} characters"
    return low, high


@cache
def _node(cls: type) -> DictConfig:
    return OmegaConf.structured(cls)


@cache
def _adapter(cls: type, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(annotations(cls)[name])


def coerce(key: str, value: Any) -> tuple[Any, str | None]:
    """The value as its field holds it, or what is wrong with it: the types are OmegaConf's, the ranges are pydantic's."""
    place = owner(key)
    if place is None:
        return None, unknown(key)
    cls, name = place
    annotation = annotations(cls)[name]
    child = node_class(annotation)
    if child is not None:
        names = ", ".join(name for name in annotations(child) if not name.startswith("_"))
        return None, f"found {quoted(value)}; allowed a mapping with {names}"
    wrong = f"found {quoted(value)}; allowed {allowed(annotation)}"
    kind, _, _ = bare(annotation)
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str):
        wrong += nearest(value, [member.name for member in kind])
    if isinstance(value, str) and value.strip() == "???":
        return None, wrong
    try:
        node: Any = _node(cls)
        if isinstance(value, list):
            # Merging, unlike assigning, makes a list's mappings the class that the schema names.
            node = OmegaConf.merge(node, {name: value})
        else:
            OmegaConf.update(node, name, value, merge=False)
        typed = node[name]
        typed = OmegaConf.to_container(typed) if isinstance(typed, Container) else typed
        if isinstance(typed, float) and not math.isfinite(typed):
            return None, wrong
        return _adapter(cls, name).validate_python(typed), None
    except OmegaConfBaseException:
        return None, wrong
    except ValidationError as error:
        return None, "; ".join(pydantic_message(item, wrong) for item in error.errors(include_url=False))


def pydantic_message(item: Any, otherwise: str) -> str:
    """Our own validators' words where one spoke, else `otherwise`."""
    return item["msg"].removeprefix("Value error, ") if item["type"] == "value_error" else otherwise
