"""The checked words of a run: every mistake of flags, words and recipe names at once."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from kernel_pytorch.cli.arguments import Arguments, check_words
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.compose import Prepared, prepare
from kernel_pytorch.recipe.sources import RecipeSources

# Launchers and sweepers that are packages of their own.
_PLUGINS = {
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=ray": "hydra-ray-launcher",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher",
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher",
    "hydra/sweeper=optuna": "hydra-optuna-sweeper",
}


def checked(arguments: Arguments, *, multirun: bool = False) -> tuple[list[str], Prepared]:
    """The overrides as the user wrote them, and prepared for Hydra. Raises ConfigError with one line a mistake."""
    good, errors = check_words(arguments.words)
    errors = [*arguments.errors, *errors, *_missing_plugins(good)]
    words = [*_search_path(arguments.trusted), *good]
    try:
        prepared = prepare(words, RecipeSources.from_environment(), multirun=multirun)
    except ConfigError as error:
        raise ConfigError([*errors, *error.lines]) from error
    if errors:
        raise ConfigError(errors)
    return words, prepared


def _search_path(trusted: list[str]) -> list[str]:
    """`--config-dir DIR` of a trusted caller, as the override that it stands for; the other flags have none."""
    words, errors = [], []
    for flag, value in zip(trusted[::2], trusted[1::2], strict=True):
        if flag in ("--config-dir", "-cd"):
            words.append(f"hydra.searchpath=['file://{Path(value).expanduser().resolve()}']")
        else:
            errors.append(f"{flag}: the primary config is the shipped one; --config-dir DIR adds groups and options to it")
    if errors:
        raise ConfigError(errors)
    return words


def _missing_plugins(words: list[str]) -> list[str]:
    errors = []
    for word in words:
        package = _PLUGINS.get(word)
        try:
            metadata.distribution(package or "hydra-core")
        except metadata.PackageNotFoundError:
            errors.append(f"command line: {word}: {package} is not installed; pip install {package}")
    return errors
