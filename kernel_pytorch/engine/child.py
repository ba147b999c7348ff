"""The process that runs one job: `python -m kernel_pytorch.engine.start JOB.json`.

Every run has its own, so that one that is killed for memory takes nothing else with it, and a sweep measures each job in
a process that nothing has warmed or filled. Writes the result beside the job and exits with the verdict's code.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.detect import resolve
from kernel_pytorch.engine.run import Job, Run
from kernel_pytorch.engine.session import conclude, describe_machine, make_job, translate
from kernel_pytorch.engine.staging import offload_of, staged
from kernel_pytorch.engine.steps import Step, build
from kernel_pytorch.models.source import Loaded, ModelSource
from kernel_pytorch.models.text import DataSource
from kernel_pytorch.optimizer import tensor_bytes
from kernel_pytorch.recipe.canonical import from_dict
from kernel_pytorch.report.progress import Progress
from kernel_pytorch.report.result import Report
from kernel_pytorch.report.write import write_run
from kernel_pytorch.schema import DataConfig, RootConfig

JOB_FILE = "job.json"
LOG_FILE = "log.txt"


class _WriteDown(AbstractContextManager[None]):
    """The process boundary: whatever ends the run is put into the report, in our words where torch's has a name of ours."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.backend: Backend | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None:
            return False
        ours = translate(error, self.backend) if isinstance(error, Exception) and self.backend is not None else None
        ended_by = ours or error
        if not isinstance(error, KeyboardInterrupt) and getattr(ended_by, "exit_code", 1) == 1:
            traceback.print_exception(kind, error, trace, file=sys.stderr)
        conclude(self.report, ended_by)
        return True


def run_job(job_file: Path, terminal: TextIO) -> int:
    """Runs the job, writes its result, and returns the exit code, whatever happened."""
    spec = json.loads(job_file.read_text(encoding="utf-8"))
    report = Report(recipe=spec["recipe"])
    boundary = _WriteDown(report)
    progress = Progress(terminal)
    with boundary:
        try:
            config = from_dict(spec["config"])
            resolution = resolve(config.backend)
            boundary.backend = resolution.backend
            job = make_job(config, spec["choices"], spec["ignored"], resolution)
            _run(job, report, progress)
        finally:
            progress.close()
    write_run(report, job_file.parent, config=spec["config"])
    return report.exit_code


def _run(job: Job, report: Report, progress: Progress) -> None:
    describe_machine(report, job.backend)
    run = Run(job, report, progress)
    steps, plan = run.plan()
    config = job.config
    source = build("model", config.model)
    loaded = _load(run, steps, source)
    run.execute(steps, plan, loaded.model, loaded.workload, name=loaded.name, inplace=False)


def _load(run: Run, steps: list[Step], source: ModelSource) -> Loaded:
    """The model on the device; or, where it does not fit and the recipe offloads it, one that runs there from the host."""
    config, backend = run.config, run.job.backend
    data, known, offload = _data(config, source), source.weight_bytes(), offload_of(steps, backend)
    on_host = offload is not None and (known is None or not run.fits(known))
    if not on_host:
        run.preflight(known)
    with run.stage("load"):
        torch.manual_seed(config.seed)
        loaded = source.load(data=data, seed=config.seed, device=backend.device, model_device=torch.device("cpu") if on_host else None)
        if offload is None or not on_host:
            return loaded
        if run.fits(tensor_bytes(loaded.model)):
            return replace(loaded, model=loaded.model.to(backend.device))
        run.preflight(offload.device_bytes(loaded.model), "the model does not fit, nor what memory=offload_weights leaves of it")
        return replace(loaded, model=staged(loaded.model, offload, steps, backend, run.report))


def _data(config: RootConfig, source: ModelSource) -> DataSource | None:
    """The named data source; the model's own, with the user's sizes; or None when the user said nothing of data."""
    if config.data._target_ is not None:
        return build("data", config.data)
    if config.data == DataConfig():
        return None
    return source.default_data(batch=config.data.batch, length=config.data.length)


def _quiet(log: Path) -> TextIO:
    """Sends what libraries print to the log, and returns the terminal that was stderr for progress."""
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    os.close(descriptor)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    return terminal


def main(argv: list[str]) -> int:
    job_file = Path(argv[0])
    return run_job(job_file, _quiet(job_file.parent / LOG_FILE))
