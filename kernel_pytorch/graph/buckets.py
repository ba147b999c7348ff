"""Which padded size the size of a dynamic dim goes to: ladders that are fixed, and ladders fitted to the sizes seen.

Sizes are elements along one dim. A ladder is ascending; a size goes to its first bucket that is not smaller."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import partial

from kernel_pytorch.choices import BucketStrategy
from kernel_pytorch.graph.bucket_fit import least_memory, least_waste, padding, used
from kernel_pytorch.schema import BucketingConfig

Ladder = tuple[int, ...]
# Size -> calls.
Counts = Mapping[int, int]
# Where a device's matmul tile is unknown: 8 values of 16 bits are 16 bytes, the widest load of one lane.
FALLBACK_TILE = 8
# Part of the elements computed, or of the memory, that a fitted ladder must save to replace the one before.
_WORTH = 0.05
# memory_optimal fits to this part of its limit of padding, and holds to a ladder that exceeds the limit by this much (ratio).
_HEADROOM, _SLACK = 0.9, 0.02


def geometric_sizes(min_size: int, max_size: int, growth: float) -> Ladder:
    """Each bucket `growth` times the one before, rounded up: a size above min_size is padded to at most `growth` times itself."""
    sizes = [min_size]
    while sizes[-1] < max_size:
        # One more than the last where the product rounds to it; the product of large integers may round up by one bit.
        sizes.append(min(max_size, max(sizes[-1] + 1, math.ceil(sizes[-1] * growth))))
    return tuple(sizes)


def linear_sizes(min_size: int, max_size: int, step: int) -> Ladder:
    """Multiples of `step` from min_size on: fewer than `step` elements of padding above the first bucket."""
    first = -(-min_size // step) * step
    return (*range(first, max_size, step), max_size)


def tiled_sizes(min_size: int, max_size: int, growth: float, tile: int) -> Ladder:
    """Multiples of `tile` until max_size, one tile apart where that is more than `growth` asks for: the device computes whole
    tiles anyway. Above the first bucket a size is padded by less than a tile, or to at most `growth` times itself."""
    sizes = [-(-min_size // tile) * tile]
    while sizes[-1] < max_size:
        sizes.append(max(sizes[-1] + tile, math.floor(sizes[-1] * growth / tile) * tile))
    return (*(size for size in sizes if size < max_size), max_size)


class Buckets(ABC):
    """The buckets of one dynamic size."""

    @property
    @abstractmethod
    def sizes(self) -> Ladder:
        """Buckets of now, ascending."""

    @abstractmethod
    def observe(self, size: int) -> bool:
        """Counts one call of this size; whether `sizes` are others than before."""

    def bucket_of(self, size: int) -> int | None:
        """The least bucket that holds `size`; None beyond the last one."""
        sizes = self.sizes
        index = bisect_left(sizes, size)
        return sizes[index] if index < len(sizes) else None

    def smallest_of(self, bucket: int) -> int:
        """The least size that goes to `bucket`."""
        index = bisect_left(self.sizes, bucket)
        return self.sizes[index - 1] + 1 if index else 1


class FixedBuckets(Buckets):
    """Does not look at what comes."""

    def __init__(self, sizes: Ladder) -> None:
        self._sizes = sizes

    @property
    def sizes(self) -> Ladder:
        return self._sizes

    def observe(self, size: int) -> bool:
        return False


class FittedBuckets(Buckets):
    """Starts from a fixed ladder and fits another one to the sizes seen after `fit_after` calls, and each time their number
    has doubled. Sizes above the largest one seen go to max_size, which counts as one of num_buckets.

    fit: a ladder for counts of sizes and a number of buckets. worth: whether a fitted ladder, the last argument, is enough of a
    gain over the one before, for the counts seen: every bucket that changes is a graph to be captured."""

    def __init__(
        self,
        start: Ladder,
        fit: Callable[[Counts, int], Ladder],
        worth: Callable[[Counts, Ladder, Ladder], bool],
        *,
        num_buckets: int,
        fit_after: int,
    ) -> None:
        self._sizes, self._fit, self._worth = start, fit, worth
        self._num_buckets, self._next_fit = num_buckets, fit_after
        self._max_size = start[-1]
        self._counts: dict[int, int] = {}
        self._num_seen = 0

    @property
    def sizes(self) -> Ladder:
        return self._sizes

    def observe(self, size: int) -> bool:
        if size > self._max_size:
            return False
        self._counts[size] = self._counts.get(size, 0) + 1
        self._num_seen += 1
        if self._num_seen < self._next_fit:
            return False
        self._next_fit = 2 * self._num_seen
        fitted = self._fitted()
        # The first ladder is of any length: it gives way in any case.
        is_fitted = len(self._sizes) <= self._num_buckets
        if fitted == self._sizes or (is_fitted and not self._worth(self._counts, self._sizes, fitted)):
            return False
        self._sizes = fitted
        return True

    def _fitted(self) -> Ladder:
        rest = () if max(self._counts) == self._max_size else (self._max_size,)
        if len(rest) == self._num_buckets:
            return rest
        return (*self._fit(self._counts, self._num_buckets - len(rest)), *rest)


def pads_less(counts: Counts, before: Ladder, after: Ladder) -> bool:
    """Whether a ladder makes a model compute enough fewer elements."""
    real = sum(size * count for size, count in counts.items())
    return real + padding(counts, after) < (1 - _WORTH) * (real + padding(counts, before))


def takes_less(counts: Counts, before: Ladder, after: Ladder, max_waste: float) -> bool:
    """Whether a ladder takes enough less memory, or keeps to a limit of padding that the one before does not keep to."""
    real = sum(size * count for size, count in counts.items())
    now, then = padding(counts, before) / real, padding(counts, after) / real
    if now > max_waste + _SLACK:
        return then < now - _SLACK
    return sum(used(counts, after)) < (1 - _WORTH) * sum(used(counts, before))


def make_buckets(config: BucketingConfig, tile: int | None) -> Buckets:
    """The buckets that a recipe asks for. tile: rows of the device's matmul tile, None where unknown: `FALLBACK_TILE`."""
    strategy = config.strategy
    start = geometric_sizes(config.min_size, config.max_size, config.growth)
    if strategy is BucketStrategy.linear:
        return FixedBuckets(linear_sizes(config.min_size, config.max_size, config.step))
    if strategy is BucketStrategy.hardware_aware:
        return FixedBuckets(tiled_sizes(config.min_size, config.max_size, config.growth, tile or FALLBACK_TILE))
    if strategy is BucketStrategy.adaptive:
        return FittedBuckets(start, least_waste, pads_less, num_buckets=config.num_buckets, fit_after=config.fit_after)
    if strategy is BucketStrategy.memory_optimal:
        # Short of the limit, which the sizes to come shall keep to as well.
        fit = partial(least_memory, max_waste=config.max_waste * _HEADROOM)
        worth = partial(takes_less, max_waste=config.max_waste)
        return FittedBuckets(start, fit, worth, num_buckets=config.num_buckets, fit_after=config.fit_after)
    return FixedBuckets(start)
