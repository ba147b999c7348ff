"""The search: what it compiles and times in a given time, that it refuses wrong kernels, and where it finds the crossover.

Clocks are stand-ins: a configuration's cost is a number that the test chose."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch

from kernel_pytorch.errors import CompilationError
from kernel_pytorch.kernels import skinny_w8a16 as op
from kernel_pytorch.kernels import skinny_w8a16_space as spaces
from kernel_pytorch.kernels import tune

CPU = torch.device("cpu")
H200 = op.Device("NVIDIA H200", 132, 232448, True, True)


@dataclass(frozen=True)
class Config:
    cost: float
    wrong: bool = False
    refused: bool = False


def launch(x: torch.Tensor, stored: tuple[torch.Tensor, ...], config: Config) -> torch.Tensor:
    if config.refused:
        raise RuntimeError("does not fit")
    return x @ stored[0].to(x.dtype).t() * (1.5 if config.wrong else 1.0)


def road(stored: tuple[torch.Tensor, ...]):
    return lambda x: x @ stored[0].to(x.dtype).t()


FIRST = [Config(9.0), Config(5.0), Config(4.0, wrong=True), Config(1.0, refused=True)]
SPACE = tune.Space(
    candidates=lambda m, n, k, device: list(FIRST),
    neighbours=lambda config, m, n, k, device: [Config(config.cost - 0.5)] if config.cost in (5.0, 4.5) else [],
    variant=lambda config, m, n, k: config,
    store=lambda weight: (weight,),
    launch=launch,
    reference=lambda x, stored: x @ stored[0].to(x.dtype).t(),
    against={"other": road},
    dtype=torch.float32,
)


class Clock:
    """Time by what is called: a launch costs its configuration's number, the other road 6 + M / 10."""

    def cost(self, call) -> float:
        config = next((argument for argument in call.args if isinstance(argument, Config)), None)
        return 6 + len(call.args[-1]) / 10 if config is None else config.cost * max(1, len(call.args[0]) / 64)


@pytest.fixture
def searched(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tune, "space", lambda name: SPACE)
    monkeypatch.setattr(tune, "ROTATED_BYTES", 100)
    monkeypatch.setattr(tune, "coarse_us", lambda calls, rounds=3: (calls[0](), clock.cost(calls[0]))[1])
    monkeypatch.setattr(
        tune, "interleaved_us", lambda arms, rounds=11: {name: [(calls[0](), clock.cost(calls[0]))[1]] for name, calls in arms.items()}
    )
    tune._small.cache_clear()
    yield
    tune._small.cache_clear()


def search(keys, pool, space=SPACE, seconds=20.0):
    said: list[str] = []
    return tune.Search("fake", keys, seconds, pool, said.append, space, CPU), said


def test_neighbours_of_the_best_are_tried_and_the_wrong_and_the_refused_are_not_chosen(searched):
    with ThreadPoolExecutor(2) as pool:
        found, said = search([(8, 16, 1), (8, 16, 4)], pool)
        results = found.run()
    # 4.0 computes a wrong product, 1.0 does not compile: the neighbour of 5.0 is the best that is left.
    assert [(r.n, r.k, r.m, r.config, r.us, r.before) for r in results] == [
        (8, 16, 1, Config(4.5), 4.5, 9.0),
        (8, 16, 4, Config(4.5), 4.5, 9.0),
    ]
    assert all(r.error <= 2 * r.low for r in results)
    assert sum("is wrong" in line for line in said) == 2
    assert "1 refused" in said[0]


def test_nothing_right_is_an_error(searched):
    space = replace(SPACE, candidates=lambda m, n, k, device: [Config(4.0, wrong=True)], neighbours=lambda *given: [])
    with ThreadPoolExecutor(1) as pool, pytest.raises(CompilationError, match="no configuration computes 8x16 at M=1 right"):
        search([(8, 16, 1)], pool, space)[0].run()


class Stuck:
    """A pool that compiles the first configuration only."""

    def __init__(self) -> None:
        self.asked = 0

    def submit(self, function, *given) -> Future:
        self.asked += 1
        future: Future = Future()
        if self.asked == 1:
            future.set_result(function(*given))
        return future


def test_what_was_not_compiled_in_time_is_not_timed(searched):
    found, said = search([(8, 16, 1)], Stuck(), seconds=0.01)
    (result,) = found.run()
    assert result.config == Config(9.0)
    assert found.times[8, 16, 1] == {Config(9.0): 9.0}
    assert "3 left out" in said[0]


def test_a_variant_is_compiled_once_for_all_keys(searched):
    pool = Stuck()
    found, _ = search([(8, 16, 1), (8, 16, 4)], pool, seconds=0.01)
    found._compile({key: [Config(9.0), Config(5.0)] for key in found.keys}, 0.5)
    assert pool.asked == 2


@pytest.mark.parametrize(("cost", "most"), [(7.0, 64), (5.0, 64), (9.0, 0), (0.01, 1024), (3.5, 192)])
def test_crossover_is_the_last_row_count_at_which_the_kernel_is_no_slower(searched, cost, most):
    # Ours costs `cost` a block of 64 rows, the other road 6 + M / 10.
    expected = 0
    for m in tune.CROSSOVER_ROWS:
        if cost * max(1, m / 64) > 6 + m / 10:
            break
        expected = m
    found, _ = search([], None)
    (row,) = found.crossovers(8, 16, {1: Config(99.0), 64: Config(cost)})
    assert (row["n"], row["k"], row["against"], row["m"]) == (8, 16, "other", expected)
    assert expected in (most, expected)
    assert list(row["us"])[-1] == tune.CROSSOVER_ROWS[-1] or list(row["us"].values())[-1][0] > list(row["us"].values())[-1][1]
    with pytest.raises(ValueError, match="no configuration given"):
        found.crossovers(8, 16, {})
