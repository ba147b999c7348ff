"""From the words of a command line to one validated config."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.paths import data_folder
from kernel_pytorch.recipe.digest import digest
from kernel_pytorch.recipe.explain import layers
from kernel_pytorch.recipe.hydra_source import active, register, registered
from kernel_pytorch.recipe.keys import quoted
from kernel_pytorch.recipe.load import recipe_of
from kernel_pytorch.recipe.overrides import Read, read_overrides
from kernel_pytorch.recipe.sources import RecipeSources
from kernel_pytorch.recipe.sweep import block_overrides
from kernel_pytorch.recipe.validate import validate
from kernel_pytorch.schema import RootConfig

# Hydra's state and our sources belong to the process. Reentrant, as the code inside is: it puts back what it found.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Prepared:
    """Checked overrides. hydra: what Hydra is given (recipe=./x.yaml rewritten, sweep block added under -m). user: the
    user's own, recipe choice and hydra.* excluded. recipes: names chosen. sources: with the files that were named by path."""

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


def prepare(overrides: Sequence[str], sources: RecipeSources | None = None, *, multirun: bool = False) -> Prepared:
    """Checks the words of a command line and registers their sources with Hydra. Raises ConfigError with all mistakes.

    With `multirun` every value of every list is checked, and the recipe's sweep block is added."""
    read = read_overrides(overrides, sources or RecipeSources.from_environment(), multirun=multirun)
    added = block_overrides(read) if multirun else []
    register(read.sources)
    return Prepared((*read.words.hydra, *added), tuple(read.words.user), tuple(read.words.recipes), read.sources)


def compose(overrides: Sequence[str], sources: RecipeSources | None = None) -> Composed:
    """Composes and validates one run. Raises ConfigError with one line a mistake; nothing is written.

    Threads wait for one another."""
    with _ONE_AT_A_TIME:
        return _compose(overrides, sources)


def _compose(overrides: Sequence[str], sources: RecipeSources | None) -> Composed:
    read = read_overrides(overrides, sources or RecipeSources.from_environment())
    conf = str(data_folder("conf"))
    with registered(read.sources), hydra_errors(), _own_hydra(), hydra.initialize_config_dir(conf, job_name="kernel_pytorch", **_version()):
        cfg = hydra.compose("config", overrides=read.words.hydra, return_hydra_config=True)
        composed = _finish(cfg, read, str(cfg.hydra.run.dir))
        chosen = cfg.hydra.runtime.choices
        assert {group: chosen[group] for group in composed.choices} == composed.choices, "Hydra composed other options than were explained"
        return composed


def compose_task(cfg: DictConfig, overrides: Sequence[str], run_dir: str, sources: RecipeSources | None = None) -> Composed:
    """`compose` for a config that Hydra composed already, in a job of a multirun. overrides: hydra.overrides.task."""
    read = read_overrides(overrides, sources or active() or RecipeSources.from_environment())
    with hydra_errors():
        return _finish(cfg, read, run_dir)


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Turns what Hydra and OmegaConf raise into ConfigError, one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, (HydraException, OmegaConfBaseException)) else error
        key = getattr(cause, "full_key", None)
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise ConfigError(f"command line: {f'{key}: ' if key else ''}{quoted(reason)[1:-1]}") from error


def _finish(cfg: DictConfig, read: Read, run_dir: str) -> Composed:
    own: Any = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    tree: Any = OmegaConf.to_container(own, resolve=True)
    found = layers(read.chain, read.words.choices, read.words.values)
    recipe = recipe_of(read.chain) if read.chain else None
    result = validate(tree, found)
    return Composed(
        config=result.config,
        choices=found.choices,
        recipe=recipe.name if recipe else None,
        chain=recipe.chain if recipe else (),
        overrides=tuple(read.words.user),
        digest=recipe.digest if recipe else digest(RootConfig()),
        effective_digest=digest(result.config),
        ignored=result.ignored,
        run_dir=os.path.abspath(run_dir),
    )


@contextmanager
def _own_hydra() -> Iterator[None]:
    """The caller may be a Hydra program itself: its global state is as before when the block ends."""
    state, version = GlobalHydra.instance(), VersionBase.instance()
    before = state.hydra, version.version_base
    state.clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra, version.version_base = before


def _version() -> dict[str, Any]:
    """Hydra 1.4 has dropped version_base, and warns of it; 1.3 warns without it."""
    return {} if "execution_whitelist" in inspect.signature(hydra.main).parameters else {"version_base": "1.3"}
