"""One line on a terminal that says what a run is busy with, for whatever takes longer than two seconds.

Nothing is written to a pipe, a file or a terminal that cannot erase a line; the line is erased when its stage ends, so
that results never share a line with it.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from kernel_pytorch.report.plain import plain

# Seconds before a stage is worth a line, and between two looks at the clock.
QUIET_S = 2.0
TICK_S = 0.5
_ERASE = "\r\x1b[2K"


class Progress:
    """Shows the innermost open stage on `stream`. Use `stage` around work and `close` when the run is over."""

    def __init__(self, stream: TextIO | None, *, quiet_s: float = QUIET_S, tick_s: float = TICK_S) -> None:
        self._stream = stream if stream is not None and _can_erase(stream) else None
        self._quiet_s, self._tick_s = quiet_s, tick_s
        self._stages: list[tuple[str, float]] = []
        self._note = ""
        self._lock = threading.Lock()
        self._shown = False
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Names what runs in the block. Stages nest; the outer one shows again when the inner one ends."""
        with self._lock:
            self._stages.append((name, time.monotonic()))
            self._note = ""
        self._start()
        try:
            yield self
        finally:
            with self._lock:
                self._stages.pop()
                self._note = ""
                self._erase()
                last = not self._stages
            if last:
                self.close()

    def note(self, text: str) -> None:
        """A few words behind the stage's name, such as `round 3/20`."""
        with self._lock:
            self._note = text

    def close(self) -> None:
        """Stops the ticker and erases its line. May be called more than once."""
        ticker, self._ticker = self._ticker, None
        if ticker is None:
            return
        self._stop.set()
        ticker.join()
        with self._lock:
            self._erase()

    def _start(self) -> None:
        if self._stream is None or self._ticker is not None:
            return
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, args=(self._stop,), name="progress", daemon=True)
        self._ticker.start()

    def _tick(self, stop: threading.Event) -> None:
        while not stop.wait(self._tick_s):
            with self._lock:
                self._show()

    def _show(self) -> None:
        if not self._stages:
            return
        name, started = self._stages[-1]
        elapsed = time.monotonic() - started
        if elapsed < self._quiet_s:
            return
        columns = shutil.get_terminal_size((80, 24)).columns
        words = " ".join(part for part in (name, f"{elapsed:.0f} s", self._note) if part)
        self._shown = True
        self._write(_ERASE + plain(words)[: columns - 1])

    def _erase(self) -> None:
        if self._shown:
            self._shown = False
            self._write(_ERASE)

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The terminal is gone or closed: there is nobody left to tell, and the run must not fail for it.
            self._stream = None


def _can_erase(stream: TextIO) -> bool:
    return not stream.closed and stream.isatty() and os.environ.get("TERM") != "dumb"
