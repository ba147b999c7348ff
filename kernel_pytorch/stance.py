"""Which code runs, compiled or eager, is one setting of the process: one thread at a time changes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Held, too, by who records compiled code: under another thread's setting it would be eager code.
CHOOSING_CODE = threading.RLock()


@contextmanager
def eager_code() -> Iterator[None]:
    """Compiled code is switched off inside. Waits for another thread that is in here: the one that left last would put back what the
    other had set."""
    with CHOOSING_CODE, torch.compiler.set_stance("force_eager"):
        yield
