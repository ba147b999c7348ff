"""A single run: compose and check here, run in a child process, print what it found."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from kernel_pytorch.cli.arguments import Arguments
from kernel_pytorch.cli.words import checked
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.compose import compose

INVALID = ConfigError.exit_code
# Verdicts that leave nothing to show but why; result.json has the plan.
ONE_LINE = ("unsupported", "no_effect", "error")


def run(arguments: Arguments) -> int:
    """Runs one config and returns the verdict's exit code. Nothing is written before the config is known to be valid."""
    words, prepared = checked(arguments)
    composed = compose(words, prepared.sources)
    folder = Path(composed.run_dir)
    made = _first_missing(folder)
    earlier = _files_of_an_earlier_run(folder)

    from kernel_pytorch.engine.parent import run_in_child

    try:
        result = run_in_child(composed, folder)
    except ConfigError:
        # Folders may have been made before one could not be.
        if made is not None and os.path.lexists(made):
            shutil.rmtree(made)
        raise
    if result["exit_code"] == INVALID:
        # A mistake that only the child could see, such as a missing extra: no output folder stays behind.
        forget(folder, made)
        for path, content in earlier.items():
            path.write_bytes(content)
        raise ConfigError(str(result["error"]).splitlines())
    show(result, folder)
    return int(result["exit_code"])


def show(result: dict[str, Any], folder: Path) -> None:
    """The report on stdout; for a run that measured nothing, one line on stderr and nothing else.

    A failed gate is in the report; a pipe that takes stdout away gets its one line on stderr as well."""
    from kernel_pytorch.report.plain import plain
    from kernel_pytorch.report.terminal import render

    if result["verdict"] in ONE_LINE:
        where = f" (see {folder / 'log.txt'})" if result["verdict"] == "error" else ""
        print(plain(" ".join(str(result["error"]).splitlines()) + where), file=sys.stderr)
        return
    render(result, folder)
    if result["exit_code"] and not sys.stdout.isatty():
        print(plain(" ".join(str(result["error"]).splitlines())), file=sys.stderr)


def forget(folder: Path, made: Path | None) -> None:
    """Removes what a run left that should not have started. made: the topmost folder that it made, None when all were there."""
    if made is not None:
        shutil.rmtree(made)
        return
    for name in ("result.json", "log.txt"):
        (folder / name).unlink(missing_ok=True)


def _files_of_an_earlier_run(folder: Path) -> dict[Path, bytes]:
    """What a run replaces, so that one that should not have started can put it back."""
    names = ("result.json", "log.txt", "recipe.yaml", "report.html")
    return {folder / name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _first_missing(folder: Path) -> Path | None:
    """The topmost folder that making `folder` would make; None when it is there."""
    missing = None
    for path in (folder, *folder.parents):
        # os.path asks without raising for a folder that may not be looked into: making what is below it says why.
        if os.path.lexists(path):
            return missing
        missing = path
    return missing
