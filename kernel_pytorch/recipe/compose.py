"""From the words of a command line to one validated config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from kernel_pytorch.recipe.sources import RecipeSources
from kernel_pytorch.schema import RootConfig


@dataclass(frozen=True)
class Prepared:
    """Checked overrides. hydra: what Hydra is given (recipe=./x.yaml rewritten, sweep block added under -m). user: the
    user's own, recipe choice excluded. recipes: names chosen. sources: with the files that were named by path."""

    hydra: tuple[str, ...]
    user: tuple[str, ...]
    recipes: tuple[str, ...]
    sources: RecipeSources


@dataclass(frozen=True)
class Composed:
    """choices: group -> option. chain: the recipe, then its parents. overrides: the user's own, recipe choice excluded.
    digest: of the recipe chain alone. effective_digest: with the command line's overrides. ignored: group -> keys left over
    from below that the chosen class does not read. run_dir: hydra.run.dir, resolved."""

    config: RootConfig
    choices: dict[str, str]
    recipe: str | None
    chain: tuple[str, ...]
    overrides: tuple[str, ...]
    digest: str
    effective_digest: str
    ignored: dict[str, list[str]]
    run_dir: str


def prepare(overrides: Sequence[str], sources: RecipeSources | None = None, *, multirun: bool = False) -> Prepared: ...


def compose(overrides: Sequence[str], sources: RecipeSources | None = None) -> Composed: ...


def compose_task(cfg: DictConfig, overrides: Sequence[str], run_dir: str, sources: RecipeSources | None = None) -> Composed: ...
