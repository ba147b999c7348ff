"""Options as `describe` prints them: what each sets, what it reads, and the sentence above it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.options import option_file, option_values, options
from kernel_pytorch.schema import nearest
from kernel_pytorch.targets import ENGINE_READS, TARGETS


@dataclass(frozen=True)
class Option:
    """sets: key below the group -> value, the class left out. reads: the group's settings that it takes."""

    group: str
    name: str
    comment: str
    sets: dict[str, Any]
    target: str | None
    reads: tuple[str, ...]


def group_options(group: str) -> list[Option]:
    """The shipped options of a group, by name."""
    return [find_option(group, name) for name in options(group)]


def find_option(group: str, name: str) -> Option:
    """One option. Raises ConfigError with the nearest name."""
    names = options(group)
    if name not in names:
        raise ConfigError(f"{group}: found {name!r}{nearest(name, names)}; allowed {', '.join(names)}")
    lines = option_file(group, name).read_text(encoding="utf-8").splitlines()
    comment = " ".join(line[1:].strip() for line in lines if line.startswith("#"))
    sets = {key.partition(".")[2]: value for key, value in option_values(group, name).items()}
    target = sets.pop("_target_", None)
    reads = (*TARGETS[target].reads, *ENGINE_READS.get(group, ())) if target else ()
    return Option(group, name, comment, sets, target, reads)
