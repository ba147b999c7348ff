"""Speaks with the compiling process: starts it when it is first needed, and again after a compiler took it down."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

from kernel_pytorch.errors import CompilationError

_WORKER = "kernel_pytorch.backends.compile_worker"
# How Triton, LLVM, LLD and ptxas begin a complaint; Triton's own heading over that of ptxas says nothing.
_COMPLAINT = re.compile(r"\b(error|fatal)\b\s*:", re.IGNORECASE)
_HEADING = "PTXAS error: Internal"


class CompileProcess:
    """One child process for all compilers of this process; calls from several threads wait for each other."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any], what: str) -> dict[str, Any]:
        """The worker's answer. Raises CompilationError with `what` and the compiler's first line of complaint."""
        with self._lock:
            child, log = self._running()
            log.seek(0, os.SEEK_END)
            before, line = log.tell(), ""
            try:
                line = self._exchange(child, json.dumps(request))
                if not line:
                    log.seek(before)
                    said = log.read().decode(errors="replace")
                    raise CompilationError(f"{what}: {complaint(said, child.returncode)}")
            finally:
                # Without an answer, also after an interrupt, the next question must not read this one's.
                if not line:
                    self._stop()
        found = json.loads(line)
        if "error" in found:
            raise CompilationError(f"{what}: {complaint(found['error'])}")
        return found

    def close(self) -> None:
        """Ends the child; a later question starts another."""
        with self._lock:
            self._stop()

    @staticmethod
    def _exchange(child: subprocess.Popen[str], question: str) -> str:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(question + "\n")
            child.stdin.flush()
        line = child.stdout.readline()
        if not line:
            child.wait()
        return line

    def _running(self) -> tuple[subprocess.Popen[str], IO[bytes]]:
        if self._owner != os.getpid():
            # After a fork the pipes are the parent's.
            self._child, self._log, self._owner = None, None, os.getpid()
        if self._child is None or self._log is None:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
            # Closed by `_stop`.
            self._log = tempfile.TemporaryFile()  # noqa: SIM115
            self._child = subprocess.Popen(
                [sys.executable, "-m", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=environment,
            )
        return self._child, self._log

    def _stop(self) -> None:
        child, log, self._child, self._log = self._child, self._log, None, None
        if child is None or log is None or self._owner != os.getpid():
            return
        log.close()
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            # What a dead child never read cannot be flushed.
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()


def complaint(text: str, returncode: int | None = None) -> str:
    """The first line in which a compiler complains, else the last line that is not empty, else how the process ended."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = next((line for line in lines if _COMPLAINT.search(line) and _HEADING not in line), None)
    return first or (lines[-1] if lines else f"the compiler ended with code {returncode} and said nothing")


PROCESS = CompileProcess()
atexit.register(PROCESS.close)
