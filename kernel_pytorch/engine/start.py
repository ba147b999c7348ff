"""Starts the process of one run: quiet under Ctrl-C while torch is still being imported, when there is nothing to write down."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from kernel_pytorch.engine.child import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return run(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
