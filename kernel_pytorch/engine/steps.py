"""From a validated config to objects: Hydra's instantiate, given only the fields that the class takes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.optimizer import Optimizer
from kernel_pytorch.schema import OPTIMIZER_GROUPS, RootConfig
from kernel_pytorch.targets import TARGETS

# Hydra 1.4 checks targets against a list of its own and warns without one; 1.3 has no such argument.
_ALLOW_LIST: dict[str, Any] = (
    {"_execution_whitelist_": tuple(TARGETS)} if "_execution_whitelist_" in inspect.signature(instantiate).parameters else {}
)


@dataclass(frozen=True)
class Step:
    """One optimizer of a recipe, in its place. `optimizer` is None when the group's option is `none`."""

    group: str
    option: str
    target: str | None
    optimizer: Optimizer | None


def build(group: str, node: Any) -> Any:
    """The object that a group's `_target_` names. The target must stand in the allow-list, under this very group."""
    name = node._target_
    target = TARGETS.get(name)
    if target is None or target.group != group:
        raise ConfigError(f"{group}._target_: found {name!r}; allowed: {', '.join(t for t, row in TARGETS.items() if row.group == group)}")
    # The fields go in as validated objects after Hydra made the partial: Hydra would turn dataclasses into its own containers.
    make = instantiate({"_target_": name, "_partial_": True, "_recursive_": False}, **_ALLOW_LIST)
    cls = make.func
    if f"{cls.__module__}.{cls.__qualname__}" != name:
        raise ConfigError(f"{group}._target_: {name!r} is another name of {cls.__module__}.{cls.__qualname__}; write that one")
    return make(**{field: getattr(node, field) for field in target.reads})


def build_steps(config: RootConfig, choices: dict[str, str]) -> list[Step]:
    """The six optimizer groups in their fixed order."""
    steps = []
    for group in OPTIMIZER_GROUPS:
        node = getattr(config, group)
        optimizer = None if node._target_ is None else build(group, node)
        steps.append(Step(group, choices.get(group, "none" if optimizer is None else "custom"), node._target_, optimizer))
    return steps


def active(steps: list[Step]) -> list[tuple[Step, Optimizer]]:
    """The steps that have an optimizer."""
    return [(step, step.optimizer) for step in steps if step.optimizer is not None]


def backend_name(backend: Backend) -> str:
    facts = backend.facts
    return f"{facts.name} ({facts.arch})" if facts.arch else facts.name
