"""The checked words of a run: every mistake of flags, words and recipe names at once."""

from __future__ import annotations

from pathlib import Path

from kernel_pytorch.cli.arguments import Arguments, check_words
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.compose import Prepared, prepare
from kernel_pytorch.recipe.sources import RecipeSources


def checked(arguments: Arguments, *, multirun: bool = False) -> tuple[list[str], Prepared]:
    """The overrides as the user wrote them, and prepared for Hydra. Raises ConfigError with one line a mistake."""
    good, errors = check_words(arguments.words)
    errors = [*arguments.errors, *errors]
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
