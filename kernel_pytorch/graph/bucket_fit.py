"""Buckets fitted to a histogram of sizes: with the least padding, or with the least memory at a limit of padding.

Both are exact dynamic programs over the sizes seen. More distinct sizes than a program's limit are first merged into
groups of nearly equal counts, each as large as its largest size. Torch-free."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

Ladder = tuple[int, ...]
# The programs grow with the square of these.
_MAX_SIZES_WASTE, _MAX_SIZES_MEMORY = 512, 64


class _Choice(NamedTuple):
    """ladder: indices of sizes. memory: their sum. padding: elements that the calls up to the last of them cost."""

    memory: int
    padding: int
    ladder: tuple[int, ...]


def padding(counts: Mapping[int, int], ladder: Ladder) -> int:
    """Elements of padding that `ladder` costs over the calls counted. Raises ValueError for a size above its last bucket."""
    if max(counts, default=0) > ladder[-1]:
        raise ValueError(f"size {max(counts)} is above the last bucket, {ladder[-1]}")
    return sum((ladder[bisect_left(ladder, size)] - size) * count for size, count in counts.items())


def used(counts: Mapping[int, int], ladder: Ladder) -> Ladder:
    """The buckets that the calls counted go to."""
    return tuple(sorted({ladder[bisect_left(ladder, size)] for size in counts}))


def least_waste(counts: Mapping[int, int], num_buckets: int) -> Ladder:
    """At most `num_buckets` buckets with the least padding over the calls counted. counts: size -> calls, not empty."""
    sizes, cost = _costs(counts, _MAX_SIZES_WASTE)
    num_sizes = len(sizes)
    best = cost[0, 1:].astype(float)
    choices: list[np.ndarray] = []
    # best[j]: least padding of sizes 0..j in the buckets so far, the last of which is size j; choices: where the one before it is.
    for _ in range(min(num_buckets, num_sizes) - 1):
        through = np.full((num_sizes, num_sizes), np.inf)
        for j in range(1, num_sizes):
            through[j, :j] = best[:j] + cost[1 : j + 1, j + 1]
        choice = through.argmin(axis=1)
        better = through[np.arange(num_sizes), choice]
        # Where one bucket fewer pads as little, it stays.
        choices.append(np.where(better < best, choice, -1))
        best = np.minimum(best, better)
    ladder = [num_sizes - 1]
    for choice in reversed(choices):
        previous = int(choice[ladder[-1]])
        if previous >= 0:
            ladder.append(previous)
    return tuple(int(sizes[index]) for index in reversed(ladder))


def least_memory(counts: Mapping[int, int], num_buckets: int, max_waste: float) -> Ladder:
    """At most `num_buckets` buckets with the least sum of sizes whose padding is at most `max_waste` of the real elements; with
    the least padding among those. A kept graph's memory grows with its padded size, so the sum stands for the memory of all.

    Where no choice keeps to the limit: the buckets with the least padding."""
    sizes, cost = _costs(counts, _MAX_SIZES_MEMORY)
    budget = max_waste * sum(size * count for size, count in counts.items())
    last = len(sizes) - 1
    # By last bucket: the choices that no other one beats in both memory and padding.
    fronts = [[_Choice(int(size), int(cost[0, j + 1]), (j,))] for j, size in enumerate(sizes)]
    fronts = [[choice for choice in front if choice.padding <= budget] for front in fronts]
    found = list(fronts[last])
    for _ in range(min(num_buckets, len(sizes)) - 1):
        ceiling = min((choice.memory for choice in found), default=None)
        longer: list[list[_Choice]] = []
        for j, size in enumerate(map(int, sizes)):
            # The last size is in every ladder in the end.
            most = None if ceiling is None else ceiling - size - (int(sizes[last]) if j < last else 0)
            extended = [
                _Choice(choice.memory + size, choice.padding + int(cost[i + 1, j + 1]), (*choice.ladder, j))
                for i in range(j)
                for choice in fronts[i]
                if most is None or choice.memory <= most
            ]
            longer.append(_undominated(choice for choice in extended if choice.padding <= budget))
        fronts = longer
        found.extend(fronts[last])
    if not found:
        return least_waste(counts, num_buckets)
    return tuple(int(sizes[index]) for index in min(found).ladder)


def _costs(counts: Mapping[int, int], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending sizes, and cost[i, j]: elements of padding when sizes i..j-1 all go to a bucket of size j-1."""
    sizes = np.array(sorted(counts), dtype=np.int64)
    calls = np.array([counts[int(size)] for size in sizes], dtype=np.int64)
    elements = sizes * calls
    if len(sizes) > limit:
        group = np.minimum((np.cumsum(calls) - calls) * limit // calls.sum(), limit - 1)
        ends = np.flatnonzero(np.append(np.diff(group) > 0, True))
        starts = np.append(0, ends[:-1] + 1)
        sizes, calls, elements = sizes[ends], np.add.reduceat(calls, starts), np.add.reduceat(elements, starts)
    sum_calls, sum_elements = np.append(0, np.cumsum(calls)), np.append(0, np.cumsum(elements))
    buckets = np.append(0, sizes)
    cost = buckets[None, :] * (sum_calls[None, :] - sum_calls[:, None]) - (sum_elements[None, :] - sum_elements[:, None])
    return sizes, cost


def _undominated(choices: Iterable[_Choice]) -> list[_Choice]:
    kept: list[_Choice] = []
    for choice in sorted(choices):
        if not kept or choice.padding < kept[-1].padding:
            kept.append(choice)
    return kept
