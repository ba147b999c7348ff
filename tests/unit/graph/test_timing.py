"""Decisions from noisy times: sure when there is something to be sure of, and never for the replay when it may be a loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.graph.strategy import terms
from kernel_pytorch.graph.timing import Comparison, Interval, compare, interval


class Clock:
    """Times that calls take: single or in a row, each with noise. undone: how often a call was put back."""

    def __init__(self, plain: tuple[float, float], replay: tuple[float, float], noise: float, seed: int = 0) -> None:
        self.times = {"plain": plain, "replay": replay}
        self.noise, self.random = noise, random.Random(seed)
        self.last, self.num_calls, self.undone = "", 0, 0

    def call(self, name: str) -> Callable[[], None]:
        def run() -> None:
            self.last = name
            self.num_calls += 1

        return run

    def undo(self) -> None:
        self.undone += 1

    def milliseconds(self, call: Callable[[], Any], num_calls: int) -> float:
        for _ in range(num_calls):
            call()
        return self.times[self.last][num_calls > 1] * (1 + self.random.gauss(0, self.noise))

    def compare(self, margin: float) -> Comparison:
        return compare(self.milliseconds, self.call("plain"), self.call("replay"), self.undo, margin)


def test_the_interval_is_of_order_statistics() -> None:
    ratios = [float(value) for value in range(1, 16)]
    # Of 15 fair coins, 3 or fewer heads have a probability of 0.0176, 4 or fewer of 0.059.
    assert interval(ratios, [1.0] * 15) == Interval(4.0, 8.0, 12.0)
    assert interval([2.0], [1.0]) == Interval(2.0, 2.0, 2.0)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    numbers = random.Random(1)
    held = 0
    for _ in range(400):
        sample = [numbers.lognormvariate(0.0, 0.1) for _ in range(15)]
        bounds = interval(sample, [1.0] * 15)
        held += bounds.low <= 1.0 <= bounds.high
    assert held >= 0.94 * 400


@pytest.mark.parametrize(
    ("plain", "replay", "margin", "keep"),
    [
        ((2.0, 2.0), (1.0, 1.0), 1.02, True),
        ((1.0, 1.0), (2.0, 2.0), 1.0, False),
        # A device that is always busy: launches were hidden, and the replay gains from an idle device only.
        ((1.2, 1.0), (1.0, 1.0), 1.02, True),
        # The same, and copies cost: a loss in one style.
        ((1.2, 1.0), (1.0, 1.1), 1.02, False),
        ((1.0, 2.0), (1.0, 1.0), 1.02, True),
        ((1.05, 1.05), (1.0, 1.0), 1.10, False),
    ],
)
def test_verdicts(plain: tuple[float, float], replay: tuple[float, float], margin: float, keep: bool) -> None:
    for seed in range(5):
        assert Clock(plain, replay, noise=0.003, seed=seed).compare(margin).verdict(margin)[0] is keep


@pytest.mark.parametrize(
    ("plain", "replay", "sure"),
    [
        ((1.1, 1.1), (1.0, 1.0), True),
        ((1.1, 1.0), (1.0, 1.0), True),
        ((1.1, 1.0), (1.0, 1.1), False),
        ((1.0, 1.1), (1.0, 1.0), False),
    ],
)
def test_a_sure_winner_wins_from_an_idle_device_and_loses_in_no_row(
    plain: tuple[float, float], replay: tuple[float, float], sure: bool
) -> None:
    for seed in range(5):
        assert Clock(plain, replay, noise=0.003, seed=seed).compare(1.02).is_surely(1.02)[0] is sure
    assert Comparison(1.03, 1.0, 20).is_surely(1.02) == (True, "")
    assert Comparison(1.02, 1.0, 20).is_surely(1.02) == (False, "")


def test_equal_calls_are_hardly_ever_taken_for_a_gain() -> None:
    kept = [Clock((1.0, 1.0), (1.0, 1.0), noise=0.05, seed=seed).compare(1.02).verdict(1.02)[0] for seed in range(40)]
    assert sum(kept) <= 2


def test_more_samples_are_taken_while_it_is_not_sure() -> None:
    assert Clock((2.0, 2.0), (1.0, 1.0), noise=0.01).compare(1.02).num_samples == 15
    assert Clock((1.02, 1.02), (1.0, 1.0), noise=0.05).compare(1.02).num_samples == 60


def test_every_call_is_put_back() -> None:
    clock = Clock((2.0, 2.0), (1.0, 1.0), noise=0.0)
    clock.compare(1.02)
    assert clock.undone == clock.num_calls


def test_strategies_ask_for_different_gains_and_repayments() -> None:
    conservative, balanced, aggressive = (terms(strategy) for strategy in GraphDeploymentStrategy)
    assert [t.min_speedup for t in (conservative, balanced, aggressive)] == [1.10, 1.02, 1.0]
    assert [t.calls_needed(0) for t in (conservative, balanced, aggressive)] == [5, 1, 1]
    assert [t.calls_needed(3) for t in (conservative, balanced, aggressive)] == [8, 4, 1]
    # 0.05 ms saved a call repays 1 s after 20,000 calls.
    assert [t.repays(1.01, 0.05) for t in (conservative, balanced, aggressive)] == [False, True, True]
    assert conservative.repays(0.99, 0.05)
    assert [t.repays(60.0, 0.05) for t in (balanced, aggressive)] == [False, True]
    assert terms(GraphDeploymentStrategy.balanced, 1.5).min_speedup == 1.5
