"""The Hydra application: the same program as Hydra sees it, for `-m`, --cfg, --info, --hydra-help and shell completion."""

from __future__ import annotations

import inspect as signatures
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kernel_pytorch.cli.arguments import Arguments
from kernel_pytorch.cli.main import FULL_ERROR
from kernel_pytorch.cli.words import checked
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.paths import data_folder
from kernel_pytorch.recipe.compose import compose, prepare
from kernel_pytorch.recipe.sources import RecipeSources
from kernel_pytorch.targets import TARGETS


def run_hydra(task: Callable[[DictConfig], Any], words: Sequence[str]) -> None:
    """`@hydra.main` over the shipped configuration. Recipe sources must be registered. Raises what Hydra would print."""
    accepted = signatures.signature(hydra.main).parameters
    # Hydra 1.4 replaces version_base, which warns there, by the list of classes that a config may name.
    extra: dict[str, Any] = {"execution_whitelist": tuple(TARGETS)} if "execution_whitelist" in accepted else {"version_base": "1.3"}
    main = hydra.main(config_path=str(data_folder("conf")), config_name="config", **extra)(task)
    with _arguments(words), full_error("1"):
        main()


@contextmanager
def _arguments(words: Sequence[str]) -> Iterator[None]:
    """Hydra reads sys.argv."""
    before = sys.argv
    sys.argv = [_program(before[0]), *words]
    try:
        yield
    finally:
        sys.argv = before


def _program(path: str) -> str:
    return "kernel-pytorch" if path.endswith("__main__.py") else path


@contextmanager
def full_error(value: str | None) -> Iterator[None]:
    """With HYDRA_FULL_ERROR=1 Hydra raises its errors instead of printing them and leaving."""
    before = os.environ.pop(FULL_ERROR, None)
    if value is not None:
        os.environ[FULL_ERROR] = value
    try:
        yield
    finally:
        os.environ.pop(FULL_ERROR, None)
        if before is not None:
            os.environ[FULL_ERROR] = before


def inspect(arguments: Arguments) -> int:
    """Hydra's own answers: --cfg, --info, --hydra-help, completion. The config is checked first, but for completion."""
    if arguments.completes:
        prepare((), RecipeSources.from_environment())
        run_hydra(_never, [*arguments.inspect, *arguments.words])
        return 0
    if arguments.multirun:
        arguments.errors.append(f"{arguments.inspect[0]} does not go with -m")
    words, prepared = checked(arguments)
    compose(words, prepared.sources)
    try:
        run_hydra(_never, [*arguments.inspect, *prepared.hydra])
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _never(_: DictConfig) -> None:
    raise AssertionError("Hydra runs no task when it is asked about the config")
