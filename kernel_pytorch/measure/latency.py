"""Wall-clock time of one call, for several arms that take turns.

Arms are interleaved: every round visits all of them, in an order that rotates, so that a machine that slows down
slows all of them down. Times are milliseconds a call.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

MIN_WARMUP_CALLS = 3
# A call so short that more repeats than this are needed is dominated by the loop itself.
MAX_REPEATS = 100_000

Enter = Callable[[], AbstractContextManager[Any]]


def time_interleaved(
    arms: Mapping[str, Callable[[], Any]],
    *,
    num_rounds: int,
    min_round_ms: float,
    synchronize: Callable[[], None],
    cuda: bool,
    contexts: Mapping[str, Enter] | None = None,
    before_round: Mapping[str, Callable[[], None]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds a call, one sample a round and arm.

    Each arm's repeats a round are calibrated after its warm-up so that its round takes at least `min_round_ms`.
    contexts: entered once around an arm's round, outside the clock. before_round: run before an arm's round, outside
    the clock. cuda: time with CUDA events instead of perf_counter. on_progress: given rounds done and rounds in all.
    Raises ValueError for no arms.
    """
    if not arms:
        raise ValueError("time_interleaved needs at least one arm")
    names = list(arms)
    clock = _cuda_round_ms if cuda else _cpu_round_ms

    def round_ms(name: str, repeats: int) -> float:
        if before_round and name in before_round:
            before_round[name]()
        with ExitStack() as stack:
            if contexts and name in contexts:
                stack.enter_context(contexts[name]())
            synchronize()
            return clock(arms[name], repeats, synchronize)

    repeats = {name: _calibrate(lambda n, name=name: round_ms(name, n), min_round_ms) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        for index in range(num_rounds):
            start = index % len(names)
            for name in names[start:] + names[:start]:
                samples[name].append(round_ms(name, repeats[name]) / repeats[name])
            if on_progress is not None:
                on_progress(index + 1, num_rounds)
    return samples


def _calibrate(round_ms: Callable[[int], float], min_round_ms: float) -> int:
    """Warms up, then returns how many calls fill `min_round_ms`."""
    round_ms(MIN_WARMUP_CALLS)
    repeats = 1
    while True:
        elapsed = round_ms(repeats)
        if elapsed >= min_round_ms or repeats >= MAX_REPEATS:
            return repeats
        # Grow towards the goal, at most tenfold at a time: one short reading says little.
        wanted = repeats * min_round_ms / elapsed if elapsed > 0 else repeats * 10
        repeats = min(MAX_REPEATS, max(repeats + 1, math.ceil(min(wanted * 1.05, repeats * 10))))


def _cpu_round_ms(call: Callable[[], Any], repeats: int, synchronize: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def _cuda_round_ms(call: Callable[[], Any], repeats: int, synchronize: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    synchronize()
    return start.elapsed_time(end)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a round would be charged to whichever arm it hits."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
