"""Recipes as Hydra sees them: a config source that serves flat folders as the group `recipe`.

Registered at run time with Hydra's public `Plugins.register`, and inert until `register` names the folders: another Hydra
program in the same process is not affected. Every file passes the guard on its way to Hydra.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from kernel_pytorch.recipe.guard import read_recipe
from kernel_pytorch.recipe.sources import SUFFIXES, Folder, RecipeSources, name_problem
from kernel_pytorch.schema import RootConfig

SCHEME = "recipes"
GROUP = "recipe"
SCHEMA = "kernel_pytorch_schema"

_active: RecipeSources | None = None


def register(sources: RecipeSources) -> None:
    """Makes Hydra find these recipes, in this process, until `register` is called with others."""
    global _active
    if RecipeConfigSource not in Plugins.instance().discover(ConfigSource):
        Plugins.instance().register(RecipeConfigSource)
        Plugins.instance().register(RecipeSearchPath)
    if f"{SCHEMA}.yaml" not in ConfigStore.instance().repo:
        ConfigStore.instance().store(name=SCHEMA, node=RootConfig, provider="kernel_pytorch")
    _active = sources


@contextmanager
def registered(sources: RecipeSources) -> Iterator[None]:
    """`register` for the length of a block."""
    global _active
    before = _active
    register(sources)
    try:
        yield
    finally:
        _active = before


def active() -> RecipeSources | None:
    """What `register` was last given."""
    return _active


class RecipeSearchPath(SearchPathPlugin):
    """One search path entry a folder; the entry carries the folder, so that a worker process needs nothing else."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in _active.folders if _active is not None else ():
            if folder.problem is None:
                search_path.append("kernel_pytorch", f"{SCHEME}://{folder.namespace}@{folder.path}")


class RecipeConfigSource(ConfigSource):
    """`recipes://NAMESPACE@/folder`: NAME.yaml of the folder is the config recipe/NAMESPACE/NAME."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider=provider, path=path)
        self.namespace, _, folder = self.path.partition("@")
        self.folder = Folder(self.namespace, Path(folder), provider)
        self.group = f"{GROUP}/{self.namespace}" if self.namespace else GROUP

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def available(self) -> bool:
        return self.folder.path.is_dir()

    def is_group(self, config_path: str) -> bool:
        path = config_path.strip("/")
        return path in ("", GROUP, self.group)

    def is_config(self, config_path: str) -> bool:
        return self._file(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        path = config_path.strip("/")
        groups = {"": [GROUP], GROUP: [self.namespace] if self.namespace else []}.get(path, [])
        stems = [stem for file in self.folder.files() if name_problem(stem := file.path.stem) is None]
        # `recipe=` completes to team/nightly too, as it is written.
        prefix = f"{self.namespace}/" if path == GROUP and self.namespace else ""
        configs = [prefix + stem for stem in stems] if path in (GROUP, self.group) and (self.folder.listed or not prefix) else []
        return sorted({*(configs if results_filter != ObjectType.GROUP else []), *(groups if results_filter != ObjectType.CONFIG else [])})

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(config_path)
        if file is None:
            raise ConfigLoadError(f"Config not found : {config_path}")
        body = read_recipe(file, RecipeSources((self.folder,)))
        return ConfigResult(
            config=OmegaConf.create(body.as_hydra()),
            path=f"{SCHEME}://{self.path}",
            provider=self.provider,
            header={"package": "_global_"},
        )

    def _file(self, config_path: str) -> Any:
        group, _, stem = config_path.strip("/").rpartition("/")
        for suffix in SUFFIXES:
            stem = stem.removesuffix(suffix)
        return self.folder.lookup(stem) if group == self.group and name_problem(stem) is None else None
