"""K shared by programs whose sums a second kernel adds (split_k_jit): for how many rows of x it is launched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

# It has a program a row in the grid's second dimension, which CUDA and HIP end here.
MOST_ROWS = 65535


def within_grid(config: Any, m: int) -> Any:
    """The configuration, a dataclass with `split`, for m rows of x: beyond MOST_ROWS no program shares K."""
    return config if m <= MOST_ROWS or config.split == 1 else replace(config, split=1)
