"""A limit on what one arm of a benchmark may take: one slow peer must not take the run with it."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError when the block takes longer, and prints where it was; again every two seconds, for whoever swallows it."""

    def stop(*_: Any) -> None:
        faulthandler.dump_traceback(all_threads=False)
        raise TimeoutError(f"not built after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 2.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
