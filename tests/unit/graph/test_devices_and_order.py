"""What a graph could get wrong without any number looking wrong: work on another device, and replays that nobody put in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.regions import Region
from kernel_pytorch.graph.strategy import terms
from kernel_pytorch.graph.training import GraphedTrainStep


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def test_a_call_on_another_device_is_not_recorded(wrap: Callable[..., Any], Rerun: Any) -> None:
    """There, it would run while it is recorded, the graph would be empty, and replays would return what was computed then."""
    recorder = Rerun()
    recorder.is_foreign = lambda device: device.type == "cpu"
    model = nn.Linear(2, 2)
    graphed, _ = wrap(model, recorder)
    for x in torch.randn(3, 1, 2):
        assert torch.equal(model(x), model.forward(x))
    assert [d["captured"] for d in graphed.decisions] == [False]
    assert graphed.decisions[0]["reason"] == "the call uses memory of cpu; graphs are made on cpu"


def test_weights_on_another_device_count_too(wrap: Callable[..., Any], Rerun: Any) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(2))

        def forward(self) -> torch.Tensor:
            return self.weight * 2  # pyright: ignore[reportOperatorIssue]

    recorder = Rerun()
    recorder.is_foreign = lambda device: device.type == "cpu"
    model = Holds()
    graphed, _ = wrap(model, recorder)
    assert model().tolist() == [2.0, 2.0]
    assert graphed.decisions[0]["reason"].startswith("the call uses memory of cpu; ")


def test_a_model_that_was_moved_to_another_device_trains_without_a_graph(Rerun: Any) -> None:
    recorder = Rerun()
    model = nn.Linear(2, 1)
    before = model.weight.clone()
    with torch.enable_grad():
        step = GraphedTrainStep(
            model, torch.optim.SGD(model.parameters(), lr=0.1), lambda called, x: called(x).sum(), min_speedup=0.0, recorder=recorder
        )
        step(torch.ones(3, 2))
        recorder.is_foreign = lambda device: device.type == "cpu"
        for _ in range(3):
            step(torch.ones(3, 2))
    assert torch.allclose(model.weight, before - 4 * 0.1 * 3)
    assert [d["reason"] for d in step.decisions] == ["a parameter is on cpu; graphs are made on cpu"]


def test_every_replay_is_put_in_order_with_those_of_other_streams(wrap: Callable[..., Any], Rerun: Any) -> None:
    """Also those that tell whether a call repeats itself: the next replay, on another stream, is to wait for them."""

    class Ordered(Rerun):
        entered = False

        def enter_replay(self) -> None:
            self.entered = True

        def record(self, call: Callable[[], Any]) -> Any:
            recording = super().record(call)
            self.entered = False

            def replay() -> None:
                assert self.entered
                recording.replay()

            return type(recording)(recording.output, replay)

    class Writes(nn.Module):
        def forward(self, cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return cache.copy_(x) * 2

    model = Writes()
    graphed, _ = wrap(model, Ordered())
    cache, x = torch.zeros(2), torch.ones(2)
    for _ in range(3):
        assert model(cache, x).tolist() == [2.0, 2.0]
    assert [d["captured"] for d in graphed.decisions] == [True], graphed.decisions


def test_buffers_that_replays_read_are_known_to_the_recorder(wrap: Callable[..., Any], Rerun: Any) -> None:
    class Holds(Rerun):
        def __init__(self) -> None:
            super().__init__()
            self.held: list[torch.Tensor] = []

        def hold(self, tensors: Any) -> None:
            self.held += tensors

    recorder = Holds()
    model = nn.ReLU()
    wrap(model, recorder)
    for x in torch.randn(4, 3).unbind():
        model(x.clone())
    assert [tuple(tensor.shape) for tensor in recorder.held] == [(3,)]
    trained, recorder = nn.Linear(2, 1), Holds()
    with torch.enable_grad():
        step = GraphedTrainStep(
            trained, torch.optim.SGD(trained.parameters(), lr=0.1), lambda called, x: called(x).sum(), min_speedup=0.0, recorder=recorder
        )
        for _ in range(3):
            step(torch.ones(3, 2))
    assert [tuple(tensor.shape) for tensor in recorder.held] == [(3, 2)]


def test_a_conjugate_of_an_argument_is_not_the_argument(wrap: Callable[..., Any]) -> None:
    class Conjugates(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return x.conj(), x * 2, x[0]

    model = Conjugates()
    graphed, _ = wrap(model)
    for x in torch.randn(4, 2, dtype=torch.complex64).unbind():
        conjugate, double, first = model(x)
        assert torch.equal(conjugate.resolve_conj(), torch.complex(x.real, -x.imag))
        assert torch.equal(double, x * 2)
        assert first.data_ptr() == x.data_ptr()
    assert graphed.manager.statistics["replays"] > 0


class Doubles:
    """Tensors of float64 pass for memory of the host."""

    def is_elsewhere(self, tensor: torch.Tensor) -> bool:
        return tensor.dtype == torch.float64


class Makes(nn.Module):
    """Host memory that is gone after the call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(2, dtype=torch.float64).to(torch.float32, non_blocking=True)


class MakesAndCopies(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        there = torch.empty_like(x)
        there.copy_(torch.ones(2, dtype=torch.float64), non_blocking=True)
        return x + there


class Takes(nn.Module):
    """A fresh view of host memory in every call, made by no operation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([1.0, 1.0], dtype=torch.float64).to(torch.float32, non_blocking=True)


class Holds(nn.Module):
    """Host memory, too large to be put on the device, that stays as long as the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ones", torch.ones(2**18, 2, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ones: Any = self.ones
        return x + ones.to(torch.float32, non_blocking=True)[0]


@pytest.mark.parametrize(("model", "captured"), [(Makes(), False), (MakesAndCopies(), False), (Takes(), False), (Holds(), True)])
def test_host_memory_that_a_replay_would_read_again_must_still_be_there(
    wrap: Callable[..., Any], Rerun: Any, model: nn.Module, captured: bool
) -> None:
    graphed, _ = wrap(model, type("Recorder", (Doubles, Rerun), {})())
    for _ in range(3):
        assert model(torch.ones(2)).tolist() == [2.0, 2.0]
    assert [d["captured"] for d in graphed.decisions if d["inputs"] != "whole call"][:1] == [captured], graphed.decisions
    if not captured:
        assert graphed.decisions[0]["reason"].startswith("the call takes host memory that the model does not hold to the device: aten.")


def test_an_argument_on_the_host_that_cannot_be_placed_is_not_read_again_where_it_was(wrap: Callable[..., Any], Rerun: Any) -> None:
    class Sends(nn.Module):
        """A value that Python reads, so that device memory cannot stand for the argument."""

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x * scale.to(torch.float32, non_blocking=True) + (1.0 if scale.dtype == torch.float64 and scale.tolist()[0] > 0 else 0.0)

    model = Sends()
    graphed, _ = wrap(model, type("Recorder", (Doubles, Rerun), {})())
    for _ in range(3):
        assert model(torch.ones(2), torch.ones(2, dtype=torch.float64)).tolist() == [2.0, 2.0]
    assert not any(d["captured"] for d in graphed.decisions), graphed.decisions


def test_a_step_that_takes_host_memory_to_the_device_stays_plain(Rerun: Any) -> None:
    model = nn.Linear(2, 1)
    makes = Makes()
    with torch.enable_grad():
        step = GraphedTrainStep(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda called, x: called(makes(x)).sum(),
            min_speedup=0.0,
            recorder=type("Recorder", (Doubles, Rerun), {})(),
        )
        for _ in range(3):
            step(torch.ones(3, 2))
    assert step.decisions[0]["reason"].startswith("the step takes host memory to the device, which a replay would read again: aten.")


def test_a_region_whose_weights_moved_does_not_wait_for_the_trial_that_it_is_called_in(Rerun: Any) -> None:
    """The whole call is tried again with new weights, and runs through regions that have graphs of the old ones."""
    manager = CUDAGraphManager(Rerun(), terms(GraphDeploymentStrategy.aggressive, 0.0), num_warmup_calls=1)
    region = Region(lambda inputs: [inputs[0] + inputs[1]], [0], [], "region 0", manager)
    region.active = True
    old, new, x = torch.ones(2), torch.full((2,), 2.0), torch.ones(2)
    outputs: list[list[float]] = []

    def calls() -> None:
        with torch.no_grad():
            region([old, x])
            with manager.lock:
                outputs.append(region([new, x])[0].tolist())
            outputs.append(region([new, x])[0].tolist())

    thread = threading.Thread(target=calls, daemon=True)
    thread.start()
    thread.join(20)
    assert outputs == [[3.0, 3.0], [3.0, 3.0]]
    assert manager.statistics["captures"] == 2


def test_a_buffer_that_comes_back_untouched_is_the_models_own(wrap: Callable[..., Any]) -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return x * 2, self.state

    model = Returns()
    graphed, _ = wrap(model)
    for _ in range(3):
        _, state = model(torch.ones(2))
        state.add_(1)
    assert model.state.tolist() == [3.0, 3.0]  # pyright: ignore[reportCallIssue]
    assert graphed.manager.statistics["replays"] >= 2
