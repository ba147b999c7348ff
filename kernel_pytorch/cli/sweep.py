"""`-m`: a real Hydra multirun. Each job runs in a process of its own; the sweep's table and sweep.json come at the end,
also after a failed job or Ctrl-C."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from kernel_pytorch.cli.app import full_error, run_hydra
from kernel_pytorch.cli.arguments import Arguments
from kernel_pytorch.cli.run import INVALID, forget
from kernel_pytorch.cli.sweep_rows import rows_of, write_mark
from kernel_pytorch.cli.words import checked
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.compose import Prepared, compose, compose_task
from kernel_pytorch.recipe.sources import RecipeSources
from kernel_pytorch.report.result import RECIPE
from kernel_pytorch.report.sweep import sweep_exit_code, write_sweep
from kernel_pytorch.report.terminal import render_sweep

# Jobs of one sweep carry its id, so that what an earlier sweep left in the folder is not counted. Workers inherit it.
SWEEP_ID = "KERNEL_PYTORCH_SWEEP_ID"


def sweep(arguments: Arguments) -> int:
    """Runs every combination and returns the sweep's exit code. Refuses before anything is written what can be known to be
    wrong: an override, a name, a recipe, or a sweep without one valid combination."""
    _, prepared = checked(arguments, multirun=True)
    _refuse_if_nothing_is_valid(prepared)
    folder = _folder(prepared)
    identity = uuid.uuid4().hex
    _make(folder)
    os.environ[SWEEP_ID] = identity
    interrupted = False
    try:
        run_hydra(task, ["--multirun", *_without_folder(prepared.hydra), f"hydra.sweep.dir={_quoted(folder)}"])
    except KeyboardInterrupt:
        interrupted = True
    finally:
        del os.environ[SWEEP_ID]
        code = _finish(folder, identity, prepared.sources)
    return 130 if interrupted else code


def _make(folder: Path) -> None:
    """Raises ConfigError for a sweep folder that cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"hydra.sweep.dir: {str(folder)!r} cannot be the sweep folder: {error.strerror}") from error


def task(cfg: DictConfig) -> float | None:
    """One job, as Hydra's launchers call it. Returns the recipe's latency in ms, for sweepers that search."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    words = list(hydra_config.overrides.task)
    mark = {"sweep": os.environ[SWEEP_ID], "job": int(hydra_config.job.num), "overrides": words, "status": "running"}
    write_mark(folder, mark)
    try:
        composed = compose_task(cfg, words, str(folder))
    except ConfigError as error:
        write_mark(folder, mark | {"status": "invalid", "error": "; ".join(error.lines)})
        return None
    from kernel_pytorch.engine.parent import run_in_child

    with full_error(None):
        result = run_in_child(composed, folder)
    if result["exit_code"] == INVALID:
        forget(folder, None)
        write_mark(folder, mark | {"status": "invalid", "error": result["error"]})
        return None
    write_mark(folder, mark | {"status": result["verdict"], "error": result["error"]})
    if result["verdict"] == "interrupted":
        raise KeyboardInterrupt
    return next((rung["latency_ms"] for rung in result["ladder"] if rung["name"] == RECIPE), None)


def _refuse_if_nothing_is_valid(prepared: Prepared) -> None:
    """One valid combination is enough to go on; each of the others becomes a row `invalid`."""
    lines: dict[str, None] = {}
    for words in _combinations(prepared.hydra):
        try:
            compose(words, prepared.sources)
        except ConfigError as error:
            lines.update(dict.fromkeys(error.lines))
        else:
            return
    if lines:
        raise ConfigError(list(lines))


def _combinations(words: Sequence[str]) -> Iterator[list[str]]:
    """Every job's overrides, as Hydra's own sweeper makes them; nothing for a glob or a search, which only Hydra can open."""
    lists = []
    for override in OverridesParser.create().parse_overrides(list(words)):
        if not override.is_sweep_override():
            lists.append([override.input_line or ""])
        elif override.is_discrete_sweep() and not hasattr(override.value(), "include"):
            lists.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            return
    for job in itertools.product(*lists):
        yield list(job)


def _folder(prepared: Prepared) -> Path:
    """hydra.sweep.dir, known here before Hydra starts, so that the table can be made whatever happens."""
    for override in OverridesParser.create().parse_overrides(list(prepared.hydra)):
        if override.key_or_group == "hydra.sweep.dir":
            return Path(str(override.value())).resolve()
    now = datetime.now()
    return Path("multirun", f"{now:%Y-%m-%d}", f"{now:%H-%M-%S-%f}").resolve()


def _without_folder(words: Sequence[str]) -> list[str]:
    return [word for word in words if not word.startswith("hydra.sweep.dir=")]


def _quoted(folder: Path) -> str:
    return "'" + str(folder).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _finish(folder: Path, identity: str, sources: RecipeSources) -> int:
    """Gathers the jobs of this sweep, prints the table, writes sweep.json and returns the sweep's exit code."""
    rows = rows_of(folder, identity, sources)
    if rows:
        write_sweep(rows, folder)
        render_sweep(rows, folder)
    return sweep_exit_code(rows)
