"""One thread a process: the suite runs in several, and threads that wait for each other on busy cores cost minutes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
