"""Starts the child of one run and brings its result back. Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

from kernel_pytorch.errors import ConfigError, WorkerError
from kernel_pytorch.recipe.canonical import to_dict
from kernel_pytorch.recipe.compose import Composed
from kernel_pytorch.report.result import Report
from kernel_pytorch.report.write import PAGE_FILE, RECIPE_FILE, RESULT_FILE, write_run

# Ctrl-C reaches parent and child, one process group. A child that is still there after this many seconds is told.
TELL_S = 0.5
# Seconds that an interrupted child has, from then on, to write down what was done.
GRACE_S = 20.0


def run_in_child(composed: Composed, run_dir: Path) -> dict[str, Any]:
    """Runs one composed config in a process of its own and returns result.json as a dict.

    A child that dies without a result gets one from us, with the verdict `error` and how it died. On Ctrl-C, SIGTERM or
    SIGHUP the child is given time to write what it has; its result has the verdict `interrupted`. A second one kills it.
    Raises ConfigError when the folder cannot be used."""
    recipe = recipe_facts(composed)
    spec = {"config": to_dict(composed.config), "choices": composed.choices, "ignored": composed.ignored, "recipe": recipe}
    job = run_dir / "job.json"
    with _Watched() as watched:
        try:
            _prepare(run_dir, job, json.dumps(spec))
            code = watched.run([sys.executable, "-m", "kernel_pytorch.engine.start", str(job)])
        finally:
            # os.path asks without raising for a folder that may not be looked into.
            if os.path.isfile(job):
                job.unlink()
        result = run_dir / RESULT_FILE
        if result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
        return _result_of_a_dead_child(code, recipe, composed, run_dir, interrupted=watched.num_signals > 0)


def _prepare(run_dir: Path, job: Path, text: str) -> None:
    """Makes the folder with the job in it; of an earlier run nothing stays that could be taken for this one's."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        job.write_text(text, encoding="utf-8")
        for name in (RESULT_FILE, RECIPE_FILE, PAGE_FILE, "log.txt"):
            (run_dir / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"hydra.run.dir: {run_dir} cannot be the run folder: {error.strerror} ({error.filename})") from error


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


class _Watched(AbstractContextManager["_Watched"]):
    """Runs the child. Inside, the signals that end a program end the child instead, and the parent lives to say so.

    Handlers count and never raise, so a second signal cannot cut short what the first one began. Signals that somebody
    else handles or ignores (nohup, a job manager) stay theirs; handlers exist in the main thread only."""

    def __init__(self) -> None:
        self.num_signals = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._timers: list[threading.Timer] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Watched:
        if threading.current_thread() is threading.main_thread():
            for name, default in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
                number = getattr(signal, name, None)  # Windows has no SIGHUP.
                if number is not None and signal.getsignal(number) == default:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: list[str]) -> int:
        """Starts the command and returns its code when it has ended; it has ended also when this raises."""
        self._child = subprocess.Popen(command, env=_environment())
        try:
            if self.num_signals and not self._timers:
                self._wind_down(self._child)
            return self._child.wait()
        finally:
            for timer in self._timers:
                timer.cancel()
            self._child.kill()
            self._child.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.num_signals += 1
        if self._child is None:
            return
        if self.num_signals == 1:
            self._wind_down(self._child)
        else:
            self._child.kill()

    def _wind_down(self, child: subprocess.Popen[bytes]) -> None:
        """The child is asked, then killed. Where SIGINT is ignored, as behind `&` in a script, the child ignores it too."""
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        ask = signal.SIGTERM if ignored else signal.SIGINT
        steps: list[tuple[float, Callable[[], None]]] = [(TELL_S, lambda: child.send_signal(ask)), (TELL_S + GRACE_S, child.kill)]
        self._timers = [threading.Timer(seconds, step) for seconds, step in steps]
        for timer in self._timers:
            timer.daemon = True
            timer.start()


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
