"""What the jobs of one sweep left behind, as rows of its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.sources import RecipeSources
from kernel_pytorch.report.sweep import SweepRow, invalid_row, sweep_row
from kernel_pytorch.report.write import RESULT_FILE, write_atomically

MARK_FILE = "sweep_job.json"


def write_mark(folder: Path, mark: dict[str, Any]) -> None:
    """What a job says of itself: sweep, job, overrides, status, error."""
    write_atomically(folder / MARK_FILE, json.dumps(mark) + "\n")


def rows_of(folder: Path, identity: str, sources: RecipeSources) -> list[SweepRow]:
    """One row a job of the sweep `identity`, in order; what other sweeps left in the folder is not read."""
    marks = []
    for path in folder.rglob(MARK_FILE):
        mark = json.loads(path.read_text(encoding="utf-8"))
        if mark["sweep"] == identity:
            marks.append((mark, path.parent))
    marks.sort(key=lambda pair: pair[0]["job"])
    words = [[_shown(word, sources) for word in mark["overrides"]] for mark, _ in marks]
    common = set.intersection(*map(set, words)) if len(words) > 1 else set()
    return [
        _row(mark, place, str(place.relative_to(folder)), [word for word in mine if word not in common])
        for (mark, place), mine in zip(marks, words, strict=True)
    ]


def _row(mark: dict[str, Any], place: Path, name: str, overrides: list[str]) -> SweepRow:
    if mark["status"] == "invalid":
        return invalid_row(name, overrides, mark["error"])
    result = place / RESULT_FILE
    if result.is_file():
        return sweep_row(name, overrides, json.loads(result.read_text(encoding="utf-8")))
    return SweepRow(job=name, overrides=overrides, error="the job ended without a result")


def _shown(word: str, sources: RecipeSources) -> str:
    """`+recipe=` with the name that the user gave: a recipe named by its path has another inside Hydra."""
    key, _, value = word.partition("=")
    if key.lstrip("+") != "recipe":
        return word
    try:
        return f"recipe={sources.find(value).name}"
    except ConfigError:
        return word
