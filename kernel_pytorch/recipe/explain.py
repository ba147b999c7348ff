"""Where every value came from: the layers of a config, from the schema's defaults up to the command line.

The layers are computed here, not asked of Hydra: a recipe can be explained, loaded and hashed without composing, and a
test compares the outcome with Hydra's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel_pytorch.paths import data_folder
from kernel_pytorch.recipe.chain import default_value
from kernel_pytorch.recipe.guard import RecipeBody
from kernel_pytorch.recipe.keys import leaves
from kernel_pytorch.recipe.options import GROUPS, default_choices, option_file, option_values
from kernel_pytorch.recipe.overrides import read_overrides
from kernel_pytorch.recipe.sources import RecipeSources

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Origin:
    """One layer that set a key. layer: `schema`, `config.yaml`, `precision=bf16`, `recipe a100_fp8` or `command line`.
    rank: higher layers win; 0 is the schema, config.yaml and the options, the command line is the highest."""

    layer: str
    file: Path | None
    value: Any
    rank: int = 0


@dataclass(frozen=True)
class Layers:
    """origins: dotted key -> what set it, in order; the last one holds. chosen: group -> what chose its option, in order."""

    origins: dict[str, list[Origin]] = field(default_factory=dict)
    chosen: dict[str, list[Origin]] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, str]:
        return {group: steps[-1].value for group, steps in self.chosen.items()}

    @property
    def values(self) -> dict[str, Any]:
        """Dotted key -> value as it was written, for every key that something above the schema set."""
        return {key: steps[-1].value for key, steps in self.origins.items() if steps[-1].layer != "schema"}


def layers(chain: Sequence[RecipeBody], choices: dict[str, str], values: dict[str, Any]) -> Layers:
    """The layers of a recipe chain under the command line's choices and values."""
    config_yaml = data_folder("conf") / "config.yaml"
    chosen = {group: [Origin("config.yaml", config_yaml, option)] for group, option in default_choices().items()}
    origins: dict[str, list[Origin]] = {key: [Origin("schema", None, default_value(key))] for key in leaves()}
    ranked = list(enumerate(reversed(chain), start=1))
    for rank, body in ranked:
        for group, option in body.choices.items():
            chosen[group].append(Origin(f"recipe {body.file.name}", body.file.path, option, rank))
    for group, option in choices.items():
        chosen[group].append(Origin(COMMAND_LINE, None, option, len(chain) + 1))
    for group in GROUPS:
        option = chosen[group][-1].value
        for key, value in option_values(group, option).items():
            origins[key].append(Origin(f"{group}={option}", option_file(group, option), value))
    for rank, body in ranked:
        # A parent's claims about itself are not its child's.
        info = {f"info.{name}": value for name, value in body.info.items()} if body is chain[0] else {}
        sweep = {f"sweep.{key}": value for key, value in body.sweep.items()}
        for key, value in {**body.values, **info, **sweep}.items():
            origins.setdefault(key, []).append(Origin(f"recipe {body.file.name}", body.file.path, value, rank))
    for key, value in values.items():
        origins[key].append(Origin(COMMAND_LINE, None, value, len(chain) + 1))
    return Layers(origins, chosen)


def origins(overrides: Sequence[str], sources: RecipeSources | None = None) -> dict[str, list[Origin]]:
    """For every group its choices and for every dotted key its values, in the order in which they were set. Raises
    ConfigError for mistakes in the overrides or in a recipe."""
    read = read_overrides(overrides, sources or RecipeSources.from_environment())
    found = layers(read.chain, read.words.choices, read.words.values)
    return {**found.chosen, **found.origins}
