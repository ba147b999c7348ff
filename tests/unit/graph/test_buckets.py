"""Ladders of padded sizes, by number: what each strategy gives, the padding that it promises, and fits against brute force."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_pytorch.backends.capabilities import matrix_rows
from kernel_pytorch.choices import BucketStrategy
from kernel_pytorch.graph.bucket_fit import least_memory, least_waste, padding
from kernel_pytorch.graph.buckets import FALLBACK_TILE, Buckets, geometric_sizes, make_buckets, tiled_sizes
from kernel_pytorch.schema import BucketingConfig

# Lengths of short questions with a tail of long ones.
SKEWED = {9: 40, 10: 60, 11: 50, 12: 30, 40: 4, 45: 4, 120: 1, 200: 1}


def buckets(strategy: str, tile: int | None = None, **values: Any) -> Buckets:
    return make_buckets(BucketingConfig(strategy=BucketStrategy(strategy), **values), tile)


def seen(ladder: Buckets, counts: Mapping[int, int]) -> Buckets:
    for size, count in counts.items():
        for _ in range(count):
            ladder.observe(size)
    return ladder


def waste(counts: Mapping[int, int], ladder: tuple[int, ...]) -> float:
    return padding(counts, ladder) / sum(size * count for size, count in counts.items())


@pytest.mark.parametrize(
    ("strategy", "tile", "expected"),
    [
        ("geometric", None, (16, 32, 64, 128, 256)),
        ("linear", None, (48, 96, 144, 192, 240, 256)),
        ("hardware_aware", 64, (64, 128, 256)),
        ("hardware_aware", 16, (16, 32, 64, 128, 256)),
        ("hardware_aware", None, (16, 32, 64, 128, 256)),
    ],
)
def test_fixed_ladders(strategy: str, tile: int | None, expected: tuple[int, ...]) -> None:
    assert buckets(strategy, tile, min_size=16, max_size=256, step=48).sizes == expected


def test_hardware_aware_steps_by_tiles_then_by_growth_and_stays_on_tiles() -> None:
    assert tiled_sizes(1, 1024, 1.25, 64) == (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 960, 1024)
    assert geometric_sizes(64, 1024, 1.25) == (64, 80, 100, 125, 157, 197, 247, 309, 387, 484, 605, 757, 947, 1024)
    assert all(size % FALLBACK_TILE == 0 for size in buckets("hardware_aware", growth=1.1, max_size=512).sizes)


def test_fitted_ladders_of_a_skewed_histogram_differ_and_pad_less_than_the_ladder_they_start_from() -> None:
    total = sum(SKEWED.values())
    settings = {"max_size": 256, "num_buckets": 4, "fit_after": total}
    start = buckets("geometric", max_size=256).sizes
    adaptive = seen(buckets("adaptive", **settings), SKEWED).sizes
    memory = seen(buckets("memory_optimal", **settings, max_waste=0.5), SKEWED).sizes
    assert adaptive == (12, 45, 200, 256)
    assert memory == (12, 40, 200, 256)
    assert waste(SKEWED, start) == pytest.approx(1246 / 2530)
    assert waste(SKEWED, adaptive) == pytest.approx(390 / 2530)
    assert waste(SKEWED, memory) == pytest.approx(990 / 2530)


def test_memory_optimal_trades_memory_for_padding() -> None:
    ladders = {limit: least_memory(SKEWED, 6, limit) for limit in (0.01, 0.1, 0.2, 0.7, 16.0)}
    assert ladders == {0.01: (10, 11, 12, 45, 120, 200), 0.1: (10, 12, 45, 200), 0.2: (12, 45, 200), 0.7: (12, 200), 16.0: (200,)}
    assert all(waste(SKEWED, ladder) <= limit for limit, ladder in ladders.items() if limit >= 0.1)
    memory = [sum(ladder) for ladder in ladders.values()]
    assert memory == sorted(memory, reverse=True)


STRATEGIES = st.sampled_from([strategy.value for strategy in BucketStrategy])


@settings(deadline=None, max_examples=150)
@given(
    STRATEGIES,
    st.integers(1, 40),
    st.integers(0, 600),
    st.floats(1.01, 4.0),
    st.integers(1, 80),
    st.sampled_from([None, 16, 64, 128]),
    st.lists(st.integers(1, 640), min_size=1, max_size=40),
)
def test_every_size_in_range_has_the_least_bucket_that_holds_it(
    strategy: str, low: int, more: int, growth: float, step: int, tile: int | None, calls: list[int]
) -> None:
    largest = low + more
    ladder = buckets(strategy, tile, min_size=low, max_size=largest, growth=growth, step=step, fit_after=8)
    for size in calls:
        ladder.observe(size)
    sizes = ladder.sizes
    assert sorted(set(sizes)) == list(sizes)
    assert sizes[-1] == largest
    assert ladder.bucket_of(largest + 1) is None
    for size in range(1, largest + 1):
        bucket = ladder.bucket_of(size)
        assert bucket is not None
        assert bucket >= size >= ladder.smallest_of(bucket)
        if size <= sizes[0]:
            continue
        if strategy == "geometric":
            assert bucket <= size * growth * (1 + 1e-12)
        if strategy == "linear":
            assert bucket - size < step
        if strategy == "hardware_aware":
            assert bucket - size < (tile or FALLBACK_TILE) or bucket <= size * growth
    if strategy in ("adaptive", "memory_optimal") and len([size for size in calls if size <= largest]) >= 8:
        assert len(sizes) <= 6


HISTOGRAMS = st.dictionaries(st.integers(1, 300), st.integers(1, 20), min_size=1, max_size=8)


def every_ladder(counts: Mapping[int, int], num_buckets: int) -> list[tuple[int, ...]]:
    below, last = sorted(counts)[:-1], max(counts)
    return [(*chosen, last) for many in range(num_buckets) for chosen in combinations(below, many)]


@settings(deadline=None, max_examples=200)
@given(HISTOGRAMS, st.integers(1, 5))
def test_adaptive_equals_brute_force(counts: dict[int, int], num_buckets: int) -> None:
    found = least_waste(counts, num_buckets)
    assert len(found) <= num_buckets
    assert padding(counts, found) == min(padding(counts, ladder) for ladder in every_ladder(counts, num_buckets))


@settings(deadline=None, max_examples=200)
@given(HISTOGRAMS, st.integers(1, 5), st.floats(0, 3))
def test_memory_optimal_equals_brute_force(counts: dict[int, int], num_buckets: int, limit: float) -> None:
    found = least_memory(counts, num_buckets, limit)
    assert len(found) <= num_buckets
    within = [ladder for ladder in every_ladder(counts, num_buckets) if waste(counts, ladder) <= limit]
    if within:
        assert waste(counts, found) <= limit
        assert (sum(found), padding(counts, found)) == min((sum(ladder), padding(counts, ladder)) for ladder in within)
    else:
        assert padding(counts, found) == padding(counts, least_waste(counts, num_buckets))


def test_fewer_buckets_are_kept_where_one_more_pads_as_little() -> None:
    assert least_waste({8: 3, 16: 2}, 5) == (8, 16)


def test_fits_of_many_sizes_are_merged_still_hold_them_all_and_are_quick() -> None:
    generator = random.Random(0)
    counts = {size: generator.randint(1, 100) for size in generator.sample(range(1, 8192), 3000)}
    start = time.perf_counter()
    adaptive, memory = least_waste(counts, 16), least_memory(counts, 8, 0.2)
    # Seconds stand for a program of the wrong order; both take some tens of milliseconds.
    assert time.perf_counter() - start < 10
    assert adaptive[-1] >= max(counts)
    assert memory[-1] >= max(counts)
    assert waste(counts, adaptive) < 0.07
    assert waste(counts, memory) <= 0.2


def test_fitting_happens_after_so_many_calls_and_then_when_they_have_doubled() -> None:
    ladder = buckets("adaptive", max_size=64, num_buckets=2, fit_after=4)
    assert ladder.sizes == (1, 2, 4, 8, 16, 32, 64)
    assert [ladder.observe(size) for size in (5, 5, 6, 6)] == [False, False, False, True]
    assert ladder.sizes == (6, 64)
    assert [ladder.observe(20) for _ in range(4)] == [False, False, False, True]
    assert ladder.sizes == (20, 64)
    assert [ladder.observe(64) for _ in range(8)] == [False] * 8
    assert ladder.sizes == (20, 64)
    assert ladder.observe(65) is False


def test_one_bucket_is_one_bucket() -> None:
    ladder = buckets("adaptive", num_buckets=1, fit_after=4, max_size=64)
    assert [ladder.observe(size) for size in (5, 9, 5, 9, 5, 9, 5, 9)] == [False, False, False, True] + [False] * 4
    assert ladder.sizes == (64,)
    at_most = buckets("adaptive", num_buckets=1, fit_after=2, max_size=64)
    assert [at_most.observe(size) for size in (5, 64)] == [False, True]
    assert at_most.sizes == (64,)


def test_a_ladder_that_saves_little_does_not_replace_one_that_has_its_graphs() -> None:
    ladder = buckets("adaptive", max_size=64, num_buckets=3, fit_after=8)
    seen(ladder, {10: 4, 30: 4})
    assert ladder.sizes == (10, 30, 64)
    # 10 and 11 at 30 cost 19 beside 321 real elements, and (11, 30, 64) would cost 7.
    seen(ladder, {10: 3, 30: 4, 11: 1})
    assert ladder.sizes == (10, 30, 64)
    # 20 at 30 costs 160 more: 179 beside 641, and (20, 30, 64) costs 79.
    seen(ladder, {20: 16})
    assert ladder.sizes == (20, 30, 64)


def test_a_limit_that_is_kept_but_for_a_little_is_no_reason_for_other_buckets() -> None:
    ladder = buckets("memory_optimal", max_size=64, num_buckets=4, fit_after=8, max_waste=0.2)
    seen(ladder, {10: 4, 12: 4})
    assert ladder.sizes == (12, 64)
    seen(ladder, {10: 4, 12: 4})
    assert ladder.sizes == (12, 64)
    # Padding is 560 of 656 now, and with three buckets 16.
    seen(ladder, {30: 16})
    assert ladder.sizes == (12, 30, 64)


def test_an_empty_range_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="min_size=65 is above max_size=64"):
        buckets("linear", min_size=65, max_size=64)
    with pytest.raises(ValueError, match="size 9 is above the last bucket, 8"):
        padding({9: 1}, (4, 8))


@pytest.mark.parametrize(
    ("arch", "rows"),
    [("sm_75", 16), ("sm_89", 16), ("sm_90a", 64), ("sm_100", 128), ("gfx942", 32), ("gfx1100", 16), ("sm_999", None), (None, None)],
)
def test_the_tile_is_a_fact_of_the_architecture_or_unknown(arch: str | None, rows: int | None) -> None:
    assert matrix_rows(arch) == rows
    assert buckets("hardware_aware", matrix_rows(arch), max_size=1024).sizes[0] == (rows or FALLBACK_TILE)
