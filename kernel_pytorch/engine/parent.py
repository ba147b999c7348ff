"""Starts the child of one run and brings its result back. Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from kernel_pytorch.errors import WorkerError
from kernel_pytorch.recipe.canonical import to_dict
from kernel_pytorch.recipe.compose import Composed
from kernel_pytorch.report.result import Report
from kernel_pytorch.report.write import RESULT_FILE, write_run

# Seconds that an interrupted child has to write down what was done.
GRACE_S = 20.0


def run_in_child(composed: Composed, run_dir: Path) -> dict[str, Any]:
    """Runs one composed config in a process of its own and returns result.json as a dict.

    A child that dies without a result gets one from us, with the verdict `error` and how it died. On Ctrl-C the child is
    given time to write what it has; its result has the verdict `interrupted`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    result = run_dir / RESULT_FILE
    result.unlink(missing_ok=True)
    job = run_dir / "job.json"
    recipe = recipe_facts(composed)
    job.write_text(
        json.dumps({"config": to_dict(composed.config), "choices": composed.choices, "ignored": composed.ignored, "recipe": recipe}),
        encoding="utf-8",
    )
    child = subprocess.Popen([sys.executable, "-m", "kernel_pytorch.engine.child", str(job)], env=_environment())
    interrupted = False
    try:
        code = child.wait()
    except KeyboardInterrupt:
        interrupted = True
        code = _wind_down(child)
    job.unlink(missing_ok=True)
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    return _result_of_a_dead_child(code, recipe, composed, run_dir, interrupted=interrupted)


def recipe_facts(composed: Composed) -> dict[str, Any]:
    """What result.json says of the recipe. digest: of the recipe chain alone; effective_digest: with the overrides."""
    return {
        "name": composed.recipe,
        "digest": composed.digest,
        "effective_digest": composed.effective_digest,
        "chain": list(composed.chain),
        "overrides": list(composed.overrides),
    }


def _environment() -> dict[str, str]:
    # The child must find the same package as the parent, from whatever folder it was started.
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _wind_down(child: subprocess.Popen[bytes]) -> int:
    """Ctrl-C reached the child too (one process group); when it was sent to the parent alone, it is passed on."""
    try:
        return child.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
    try:
        return child.wait(timeout=GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.kill()
        return child.wait()


def _result_of_a_dead_child(code: int, recipe: dict[str, Any], composed: Composed, run_dir: Path, *, interrupted: bool) -> dict[str, Any]:
    report = Report(recipe=recipe)
    if interrupted:
        report.verdict, report.exit_code, report.error = "interrupted", 130, "interrupted before the run wrote anything"
    else:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        hint = "; out of memory is the usual cause" if code == -signal.SIGKILL else ""
        error = WorkerError(f"the process of the run {how} and left no result{hint}; its output is in {run_dir / 'log.txt'}")
        report.verdict, report.exit_code, report.error = error.verdict, error.exit_code, str(error)
    write_run(report, run_dir, config=to_dict(composed.config))
    return report.to_dict()
