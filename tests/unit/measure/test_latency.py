import gc
from contextlib import contextmanager

import pytest
import torch

from kernel_pytorch.measure.latency import MAX_REPEATS, MIN_WARMUP_CALLS, _calibrate, time_interleaved


def no_wait() -> None:
    return None


def test_one_sample_a_round_and_arm_in_rotating_order():
    visits: list[str] = []
    samples = time_interleaved(
        {"a": lambda: None, "b": lambda: None, "c": lambda: None},
        num_rounds=4,
        min_round_ms=0,
        synchronize=no_wait,
        cuda=False,
        before_round={name: lambda name=name: visits.append(name) for name in "abc"},
    )
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}
    # Two visits an arm come from warm-up and calibration.
    assert "".join(visits[6:]) == "abc" + "bca" + "cab" + "abc"


def test_warm_up_comes_before_the_first_sample():
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    time_interleaved({"a": call}, num_rounds=3, min_round_ms=0, synchronize=no_wait, cuda=False)
    assert calls == MIN_WARMUP_CALLS + 1 + 3


def test_calibration_fills_the_round():
    # A call of exactly 2 ms: 25 repeats fill 50 ms, and the estimate aims 5 % over.
    assert _calibrate(lambda repeats: 2.0 * repeats, 50.0) == 27
    assert _calibrate(lambda repeats: 80.0 * repeats, 50.0) == 1
    assert _calibrate(lambda repeats: 0.0, 50.0) == MAX_REPEATS


def test_context_surrounds_the_round_and_collection_is_off():
    state: list[tuple[bool, bool]] = []
    inside = False

    @contextmanager
    def enter():
        nonlocal inside
        inside = True
        yield
        inside = False

    def call() -> None:
        state.append((inside, gc.isenabled()))

    time_interleaved({"a": call}, num_rounds=3, min_round_ms=0, synchronize=no_wait, cuda=False, contexts={"a": enter})
    assert {entered for entered, _ in state} == {True}
    assert {enabled for _, enabled in state[-3:]} == {False}
    assert gc.isenabled() is True
    assert inside is False


def test_progress_counts_rounds():
    seen: list[tuple[int, int]] = []
    time_interleaved(
        {"a": lambda: None}, num_rounds=3, min_round_ms=0, synchronize=no_wait, cuda=False, on_progress=lambda *step: seen.append(step)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_an_arm_that_raises_restores_collection():
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        if calls > MIN_WARMUP_CALLS + 1:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        time_interleaved({"a": call}, num_rounds=3, min_round_ms=0, synchronize=no_wait, cuda=False)
    assert gc.isenabled() is True


def test_no_arms():
    with pytest.raises(ValueError, match="at least one arm"):
        time_interleaved({}, num_rounds=3, min_round_ms=0, synchronize=no_wait, cuda=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_events_see_the_device_work():
    small, large = torch.ones(64, 64, device="cuda"), torch.ones(4096, 4096, device="cuda")
    samples = time_interleaved(
        {"small": lambda: small @ small, "large": lambda: large @ large},
        num_rounds=5,
        min_round_ms=5,
        synchronize=torch.cuda.synchronize,
        cuda=True,
    )
    assert {name: len(values) for name, values in samples.items()} == {"small": 5, "large": 5}
    assert min(samples["small"] + samples["large"]) > 0
