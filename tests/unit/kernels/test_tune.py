"""The search: what it compiles and times in a given time, that it refuses wrong kernels, and where it finds the crossover.

Clocks are stand-ins: a configuration's cost is a number that the test chose."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch

from kernel_pytorch.errors import CompilationError
from kernel_pytorch.kernels import skinny_w4a16, tune
from kernel_pytorch.kernels import skinny_w4a16_space as spaces4
from kernel_pytorch.kernels import skinny_w8a16 as op
from kernel_pytorch.kernels import skinny_w8a16_space as spaces
from kernel_pytorch.kernels.skinny_w4a16_wgmma import WarpgroupConfig
from kernel_pytorch.precision.storage import STORAGES

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
    """Time by what is called: a launch costs its configuration's number, the other road 6 + M / 20."""

    def cost(self, call) -> float:
        config = next((argument for argument in call.args if isinstance(argument, Config)), None)
        return 6 + len(call.args[-1]) / 20 if config is None else config.cost * max(1, len(call.args[0]) / 64)


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


@pytest.mark.parametrize(("cost", "most", "last"), [(7.0, 0, 8), (5.0, 192, 256), (1.0, 1024, 1024)])
def test_crossover_is_the_last_row_count_at_which_the_kernel_is_no_slower(searched, cost, most, last):
    """Ours costs `cost` for each 64 rows begun after the first, the other road 6 + M / 20."""
    found, _ = search([], None)
    (row,) = found.crossovers(8, 16, {1: Config(99.0), 64: Config(cost)})
    assert (row["n"], row["k"], row["against"], row["m"]) == (8, 16, "other", most)
    assert list(row["us"])[-1] == last
    assert row["us"][8] == (cost, 6.4)


def test_crossover_needs_a_configuration(searched):
    with pytest.raises(ValueError, match="no configuration given"):
        search([], None)[0].crossovers(8, 16, {})


@pytest.mark.parametrize("m", op.ROWS)
@pytest.mark.parametrize(("n", "k"), [*op.LLAMA, (96, 200)])
def test_the_space_of_8_bit_weights_begins_with_the_configuration_in_use(m, n, k):
    found = spaces.candidates(m, n, k, CPU)
    assert found[0] == op.choose(m, n, k, op.device(None))
    assert len(found) == len(set(found)) > 1
    # Above one row there is no kernel without the matrix unit.
    assert m == 1 or all(config.slices for config in found)
    assert spaces.neighbours(found[-1], m, n, k, CPU)


def test_warpgroups_are_searched_where_they_run_and_are_worth_it(monkeypatch):
    hopper, gpu = replace(H200, mma=True, warpgroups=True), torch.device("cuda", 0)
    monkeypatch.setattr(skinny_w4a16, "device", lambda index: hopper)
    for m in (8, 16, 128):
        found = spaces4.candidates(m, 4096, 4096, gpu)
        kinds = [type(config) for config in found]
        assert (WarpgroupConfig in kinds) == (m >= 16)
        assert found[0] == skinny_w4a16.choose(m, 4096, 4096, hopper)
        assert len(found) == len(set(found))
    wide = [config for config in found if isinstance(config, WarpgroupConfig)]
    assert {config.block_m for config in wide} == {64, 128}
    # As kernels of one code: K is all of their own steps, and whether a second kernel sums.
    two, four = (WarpgroupConfig(1, 8, 64, split=split) for split in (2, 4))
    assert spaces4.variant(two, 64, 4096, 4096) != spaces4.variant(four, 64, 4096, 4096) == spaces4.variant(four, 64, 6144, 4096)
    assert spaces4.neighbours(two, 64, 4096, 4096, gpu) == [replace(two, depth=2)]


def test_code_is_shared_between_shapes_that_no_tile_cuts():
    config = op.Config(64, 256, 1, 4, 4, 3)
    assert spaces.variant(config, 5, 4096, 4096) == spaces.variant(config, 8, 6144, 14336)
    assert spaces.variant(config, 5, 4096, 4096) == spaces.variant(replace(config, split=2), 5, 4096, 4096)
    assert spaces.variant(config, 5, 4096, 4096) != spaces.variant(config, 5, 4096, 4100)
    assert spaces.variant(config, 5, 4096, 4096) != spaces.variant(config, 9, 4096, 4096)


def test_the_other_road_of_4_bit_weights_computes_the_product():
    x, stored = torch.randn(5, 256), spaces4.store(torch.randn(48, 256))
    codes, scale, global_scale = skinny_w4a16.unpack(skinny_w4a16.Packed(*stored), "nvfp4", 256)
    exact = (
        x.double()
        @ STORAGES["nvfp4"].dequantize({"weight": codes, "weight_scale": scale, "weight_global_scale": global_scale}, 256).double().t()
    )
    assert tune.relative_error(spaces4.SPACE.against["expand"](stored)(x), exact) < 1e-5


@pytest.mark.parametrize(("space", "most"), [(spaces.SPACE, 0.03), (spaces.INT8, 0.01)])
def test_stored_weights_and_both_roads_compute_the_product(space, most):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 256), torch.randn(32, 256)
    stored = space.store(weight)
    exact = x.double() @ weight.double().t()
    for y in (space.reference(x, stored), *(make(stored)(x) for name, make in space.against.items() if name == "expand")):
        assert 0.001 < tune.relative_error(y, exact) < most
