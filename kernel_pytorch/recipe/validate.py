"""From a tree of values to a RootConfig, bottom-up, with every mistake at once under its full key and its file.

A field that the chosen class does not read is an error where it was set at or above the layer that chose the option; one
that is left over from below is dropped and listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kernel_pytorch.devices import DEVICES
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.chain import is_gate, looser
from kernel_pytorch.recipe.explain import COMMAND_LINE, Layers, Origin
from kernel_pytorch.recipe.keys import annotations, coerce, default, node_class, pydantic_message, quoted, unknown
from kernel_pytorch.recipe.options import option_values, options
from kernel_pytorch.recipe.sources import shown
from kernel_pytorch.registry import find_target, target_names
from kernel_pytorch.schema import RootConfig
from kernel_pytorch.targets import ENGINE_READS

# What a group reads whose target is null: the engine picks the vendor itself; the model source feeds itself, at this size.
_NULL_READS: dict[str, tuple[str, ...]] = {"backend": ("hardware", "on_mismatch"), "data": ("batch", "length")}


@dataclass(frozen=True)
class Validated:
    """ignored: group -> keys below it that were dropped."""

    config: RootConfig
    ignored: dict[str, list[str]]


def fields_read(group: str, target: str | None) -> tuple[str, ...]:
    """Top fields of a group that its class, or the engine, reads."""
    found = find_target(group, target)
    own = _NULL_READS.get(group, ()) if found is None else found.reads
    return (*own, *ENGINE_READS.get(group, ()))


def validate(tree: dict[str, Any], layers: Layers) -> Validated:
    """The config of a composed tree. Raises ConfigError with one line a mistake."""
    tree = deepcopy(tree)
    errors: list[str] = []
    ignored: dict[str, list[str]] = {}
    for group, cls in ((name, node_class(kind)) for name, kind in annotations(RootConfig).items()):
        if cls is None or "_target_" not in annotations(cls) or not isinstance(tree.get(group), dict):
            continue
        if line := _target_problem(group, tree[group].get("_target_")):
            errors.append(line)
        else:
            _unread(group, cls, tree, layers, errors, ignored)
    if not errors:
        _left_over_floors(tree, layers, ignored)
    config, problems = build(RootConfig, tree)
    errors += [f"{_where(layers, key)}{key}: {problem}" for key, problem in problems]
    if config is not None and not errors:
        errors += _contradictions(config, layers)
    if errors or config is None:
        raise ConfigError(errors)
    return Validated(config, ignored)


def build(cls: type, data: dict[str, Any], path: str = "") -> tuple[Any, list[tuple[str, str]]]:
    """An object of the schema's class from a tree, or None and what is wrong: (full key, message) pairs."""
    problems: list[tuple[str, str]] = []
    values: dict[str, Any] = {}
    known = annotations(cls)
    for name, value in data.items():
        key = f"{path}{name}"
        child = node_class(known[name]) if name in known else None
        if name not in known:
            problems.append((key, unknown(key) or "found an unknown key"))
        elif child is not None and isinstance(value, dict):
            values[name], below = build(child, value, f"{key}.")
            problems += below
        elif child is not None and isinstance(value, child):
            values[name] = value
        else:
            values[name], problem = coerce(key, value)
            problems += [(key, problem)] if problem else []
    if problems:
        return None, problems
    try:
        return cls(**values), []
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = path + ".".join(str(part) for part in item["loc"])
            problems.append((key.rstrip(".") or "config", pydantic_message(item, item["msg"])))
        return None, problems


def _target_problem(group: str, target: Any) -> str | None:
    if target is None or find_target(group, target) is not None:
        return None
    return f"{group}._target_: found {target!r}; allowed {', '.join(sorted(target_names(group))) or 'null'}"


def _unread(group: str, cls: type, tree: dict[str, Any], layers: Layers, errors: list[str], ignored: dict[str, list[str]]) -> None:
    """Drops what the group's class does not read, or says why it may not stand there."""
    target = tree[group].get("_target_")
    reads = fields_read(group, target)
    chooser = layers.chosen[group][-1]
    for key, steps in layers.origins.items():
        top, _, rest = key.partition(".")
        name = rest.split(".")[0]
        if top != group or name == "_target_" or name in reads:
            continue
        setters = [step for step in steps if step.layer != "schema"]
        for step in (step for step in setters if step.rank >= chooser.rank):
            option = f"{group}={chooser.value}" + (f" ({target.rpartition('.')[2]})" if target else "")
            errors.append(
                f"{_place(step)}{key}: found {quoted(step.value)}, which {option} does not read; allowed {_allowed_here(group, reads)}"
            )
        if setters:
            ignored.setdefault(group, []).append(rest)
    for name in annotations(cls):
        if name not in reads and name != "_target_" and name in tree[group]:
            tree[group][name] = default(cls, name)


def _allowed_here(group: str, reads: Sequence[str]) -> str:
    return ", ".join(f"{group}.{name}" for name in reads) or f"no key of {group}"


def _left_over_floors(tree: dict[str, Any], layers: Layers, ignored: dict[str, list[str]]) -> None:
    """A floor from below the layer that chose the scheme cannot lower the scheme's own."""
    group = "precision"
    chooser = layers.chosen[group][-1]
    for key, floor in option_values(group, chooser.value).items():
        last = layers.origins[key][-1]
        if is_gate(key) and last.rank < chooser.rank and last.layer != f"{group}={chooser.value}" and looser(key, last.value, floor):
            tree[group]["quality"][key.rpartition(".")[2]] = floor
            ignored.setdefault(group, []).append(key.removeprefix(f"{group}."))


def _contradictions(config: RootConfig, layers: Layers) -> list[str]:
    """What no single group can see."""
    vendor, hardware = layers.choices["backend"], config.backend.hardware
    # Only our own rows: another's would be imported, and a recipe is only read here.
    device = DEVICES.get(hardware)
    if vendor == "auto" or vendor not in options("backend") or device is None or device.vendor == vendor:
        return []
    where = _where(layers, "backend.hardware")
    found = f"found {hardware!r}, a device of {device.vendor}, with backend={vendor}"
    return [f"{where}backend.hardware: {found}; allowed backend=auto or a device of {vendor}"]


def _where(layers: Layers, key: str) -> str:
    """The file, or the command line, that last set the key or something below it."""
    steps = [step for name, steps in layers.origins.items() if name == key or name.startswith(f"{key}.") for step in steps]
    steps += layers.chosen.get(key, [])
    highest = max(steps, key=lambda step: step.rank, default=None)
    return _place(highest) if highest is not None and highest.rank > 0 else ""


def _place(step: Origin) -> str:
    if step.layer == COMMAND_LINE:
        return f"{COMMAND_LINE}: "
    return f"{shown(step.file)}: " if step.file else ""
