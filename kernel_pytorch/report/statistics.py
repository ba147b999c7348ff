"""Order statistics of timing samples. Torch-free: the measuring and the reporting side share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear interpolation between order statistics. Raises ValueError for no samples or a percent outside 0..100."""
    if not samples or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent} of {len(samples)} samples")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median(samples: Sequence[float]) -> float:
    """Raises ValueError for no samples."""
    return percentile(samples, 50)


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of samples, in their unit."""

    median: float
    p10: float
    p90: float


def spread(samples: Sequence[float]) -> Spread:
    """Raises ValueError for no samples."""
    return Spread(median(samples), percentile(samples, 10), percentile(samples, 90))


def relative_error_of_median(samples: Sequence[float]) -> float:
    """Standard error of the median over the median, from the interquartile range (1.2533 s / sqrt(n), s = IQR / 1.349).

    0 for fewer than two samples: nothing is known, so nothing is claimed."""
    centre = median(samples)
    if len(samples) < 2 or centre == 0:
        return 0.0
    sigma = (percentile(samples, 75) - percentile(samples, 25)) / 1.349
    return 1.2533 * sigma / math.sqrt(len(samples)) / centre
