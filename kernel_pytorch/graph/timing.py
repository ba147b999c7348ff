"""Whether a replay is faster than the plain call, as far as timing can tell: pairs of samples until the answer is sure.

Two styles of calling are timed. One call from an idle device: a caller that reads each result. Several calls without waiting
in between: a caller whose device is always busy, for whom the time of launching was hidden and copies are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Any

# Pairs in a round of sampling, rounds at most, calls in a row of the second style, and seconds that sampling may take.
_PAIRS, _MAX_ROUNDS = 15, 4
_CALLS_IN_A_ROW, _ROWS = 8, 7
# Of slow calls, fewer are in a row, but never one.
_ROW_MS = 50.0
_MAX_SECONDS = 4.0
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The median of paired ratios, and the bounds that hold the true median with 95 % confidence."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Medians over num_samples interleaved calls, in milliseconds a call. The row figures are of calls made without waiting in
    between; None when they were not timed. speedup, row_speedup: plain time over replay time."""

    plain_ms: float
    replay_ms: float
    num_samples: int
    plain_row_ms: float | None = None
    replay_row_ms: float | None = None
    speedup: Interval | None = None
    row_speedup: Interval | None = None

    def verdict(self, margin: float) -> tuple[bool, str]:
        """Whether the replay wins, and the reason. It must win by `margin` in one style of calling and lose in neither; where
        more samples did not tell, the lower bound must not be a loss."""
        single = self.speedup or _exactly(self.plain_ms / self.replay_ms)
        row = self.row_speedup
        best = single if row is None or single.middle >= row.middle else row
        said = f"{single.middle:.3f} times the plain call's speed"
        if row is not None:
            said += f", {row.middle:.3f} times in a row of calls"
        said += f"; {margin:g} asked for"
        if best.middle < margin:
            return False, said
        if best.low < margin and best.low < 1.0:
            return False, f"{said}; not sure: {best.low:.3f} to {best.high:.3f}"
        loses = [style for style in (single, row) if style is not None and style.high < min(1.0, margin)]
        return (False, f"{said}; slower in one of them") if loses else (True, said)

    def is_surely(self, margin: float) -> tuple[bool, str]:
        """Whether the replay wins by more than `margin` from an idle device, by the whole interval, and does not lose in a row; what
        keeps it from that where its median wins, else ""."""
        single, row = self.speedup or _exactly(self.plain_ms / self.replay_ms), self.row_speedup
        if single.low <= margin:
            return False, f"not sure: {single.low:.3f} to {single.high:.3f}" if single.high > margin else ""
        if row is not None and row.high < 1.0:
            return False, f"slower in a row of calls: {row.middle:.3f} times"
        return True, ""


def _exactly(ratio: float) -> Interval:
    return Interval(ratio, ratio, ratio)


def interval(plain: Sequence[float], replay: Sequence[float]) -> Interval:
    """Of plain[i] / replay[i], taken in turns: the bounds are order statistics, which assume no shape of the noise."""
    ratios = sorted(p / r for p, r in zip(plain, replay, strict=True))
    n = len(ratios)
    # The largest rank k with P(fewer than k of n fair coins) <= half of what may be missed.
    tail, k = 0.0, 0
    while k < n // 2 and tail + comb(n, k) / 2**n <= (1 - _CONFIDENCE) / 2:
        tail += comb(n, k) / 2**n
        k += 1
    k = max(k, 1)
    return Interval(ratios[k - 1], median(ratios), ratios[n - k])


def compare(
    milliseconds: Callable[[Callable[[], Any], int], float],
    plain: Callable[[], Any],
    replay: Callable[[], Any],
    undo: Callable[[], None],
    margin: float,
) -> Comparison:
    """Samples both in turns. milliseconds(call, n): time a call of n calls in a row that start on an idle device.

    `undo` puts back what a call wrote. Between single calls it is not timed; in a row it is, in both arms, for calls that
    count something up must not count far: what it adds to both makes the ratio less, never more."""
    for call in (plain, replay):
        call()
        undo()
    start = time.monotonic()
    singles: tuple[list[float], list[float]] = ([], [])
    single = _exactly(1.0)
    for _ in range(_MAX_ROUNDS):
        for _ in range(_PAIRS):
            for call, into in zip((plain, replay), singles, strict=True):
                into.append(milliseconds(call, 1))
                undo()
            if len(singles[0]) >= 6 and time.monotonic() - start > _MAX_SECONDS / 2:
                break
        single = interval(*singles)
        if single.low >= margin or single.high < margin or time.monotonic() - start > _MAX_SECONDS / 2:
            break

    def undone(call: Callable[[], Any]) -> Callable[[], None]:
        def both() -> None:
            call()
            undo()

        return both

    start = time.monotonic()
    num_calls = max(2, min(_CALLS_IN_A_ROW, int(_ROW_MS / max(median(singles[0]), 1e-3))))
    rows: tuple[list[float], list[float]] = ([], [])
    while len(rows[0]) < _ROWS and (not rows[0] or time.monotonic() - start < _MAX_SECONDS / 2):
        for call, into in zip((plain, replay), rows, strict=True):
            into.append(milliseconds(undone(call), num_calls))
    return Comparison(
        median(singles[0]),
        median(singles[1]),
        len(singles[0]),
        median(rows[0]),
        median(rows[1]),
        single,
        interval(*rows),
    )
