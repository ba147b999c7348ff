"""Writes a run's files, each whole or not at all. result.json comes last: where it is, the others are complete."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kernel_pytorch.report.html import page
from kernel_pytorch.report.result import Report

RESULT_FILE = "result.json"
RECIPE_FILE = "recipe.yaml"
PAGE_FILE = "report.html"

_ALL = (RECIPE_FILE, PAGE_FILE, RESULT_FILE)
# What each verdict leaves behind. `invalid` is the word of a run's process to its parent, which removes it again.
FILES: dict[str, tuple[str, ...]] = {
    "pass": _ALL,
    "emulated": _ALL,
    "unverified": _ALL,
    "numerics": _ALL,
    "performance": _ALL,
    "unsupported": (RESULT_FILE,),
    "no_effect": (RESULT_FILE,),
    "error": (RESULT_FILE,),
    "interrupted": (RESULT_FILE,),
    "invalid": (RESULT_FILE,),
}


def write_run(report: Report, folder: Path, *, config: Mapping[str, Any] | None = None) -> list[Path]:
    """Writes the files that the verdict calls for and returns them. config: the resolved config, for recipe.yaml.

    Raises OSError when the folder cannot be written, KeyError for a verdict that is not in FILES."""
    result = report.to_dict()
    content = {RESULT_FILE: lambda: to_json(result), PAGE_FILE: lambda: page(result)}
    if config is not None:
        content[RECIPE_FILE] = lambda: yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / name for name in FILES[report.verdict] if name in content]
    for path in written:
        write_atomically(path, content[path.name]())
    return written


def to_json(value: Any) -> str:
    """Strict JSON, ASCII, indented. Infinities and NaN, which JSON has no words for, become the strings inf, -inf, nan."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_atomically(path: Path, text: str) -> None:
    """`path` holds `text` afterwards, or what it held before: written beside it, flushed to the disk, then renamed."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files that only their owner may read; a result is for the team.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        # Still there only when something above raised.
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """The rename itself must survive a power cut; Windows cannot open a folder and needs nothing."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
