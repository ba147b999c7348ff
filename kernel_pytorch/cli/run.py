"""A single run: compose and check here, run in a child process, print what it found."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from kernel_pytorch.cli.arguments import Arguments
from kernel_pytorch.cli.words import checked
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.compose import compose

INVALID = ConfigError.exit_code


def run(arguments: Arguments) -> int:
    """Runs one config and returns the verdict's exit code. Nothing is written before the config is known to be valid."""
    words, prepared = checked(arguments)
    composed = compose(words, prepared.sources)
    folder = Path(composed.run_dir)
    made = _first_missing(folder)

    from kernel_pytorch.engine.parent import run_in_child

    result = run_in_child(composed, folder)
    if result["exit_code"] == INVALID:
        # A mistake that only the child could see, such as a missing extra: no output folder stays behind.
        _remove(folder, made)
        raise ConfigError(str(result["error"]).splitlines())
    show(result, folder)
    return int(result["exit_code"])


def show(result: dict[str, Any], folder: Path) -> None:
    """The report on stdout; one line on stderr for what went wrong."""
    from kernel_pytorch.report import terminal
    from kernel_pytorch.report.plain import plain

    terminal.render(result, folder)
    if result["error"] and result["exit_code"]:
        print(plain(" ".join(str(result["error"]).splitlines())), file=sys.stderr)


def _remove(folder: Path, made: Path | None) -> None:
    if made is not None:
        shutil.rmtree(made)
        return
    for name in ("result.json", "log.txt"):
        (folder / name).unlink(missing_ok=True)


def _first_missing(folder: Path) -> Path | None:
    """The topmost folder that making `folder` would make; None when it is there."""
    missing = None
    for path in (folder, *folder.parents):
        if path.exists():
            return missing
        missing = path
    return missing
