"""The commands by name. Each takes its words and returns an exit code; each imports its parts when it is called."""

from __future__ import annotations

from collections.abc import Callable


def _list(words: list[str]) -> int:
    from kernel_pytorch.cli.catalogue import list_recipes

    return list_recipes(words)


def _describe(words: list[str]) -> int:
    from kernel_pytorch.cli.describe import describe

    return describe(words)


def _explain(words: list[str]) -> int:
    from kernel_pytorch.cli.explain import explain

    return explain(words)


def _diff(words: list[str]) -> int:
    from kernel_pytorch.cli.explain import diff

    return diff(words)


def _validate(words: list[str]) -> int:
    from kernel_pytorch.cli.catalogue import validate

    return validate(words)


def _copy(words: list[str]) -> int:
    from kernel_pytorch.cli.catalogue import copy

    return copy(words)


def _doctor(words: list[str]) -> int:
    from kernel_pytorch.cli.doctor import doctor

    return doctor(words)


def _tune(words: list[str]) -> int:
    from kernel_pytorch.cli.tune import tune

    return tune(words)


def _precompile(words: list[str]) -> int:
    from kernel_pytorch.cli.precompile import precompile

    return precompile(words)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "describe": _describe,
    "explain": _explain,
    "diff": _diff,
    "validate": _validate,
    "copy": _copy,
    "doctor": _doctor,
    "tune": _tune,
    "precompile": _precompile,
}
