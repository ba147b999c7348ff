"""What a replay costs in Python, without a device: a GraphedCall around a recording that does nothing.

python tests/regression/bench_graph_overhead.py

Microseconds a call, least of many rounds: `before`, until the device would have its graph; `all`, until the caller has its outputs
(copies of outputs on this CPU among them). The recorder is CudaRecorder, which asks stand-ins that are as much Python as torch.cuda's
own. Records, asserts no time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._utils import _get_device_index

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.engine.apply import Built, enter_contexts
from kernel_pytorch.graph import GraphedTrainStep, replayer
from kernel_pytorch.graph.capture import graph_calls
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.recorder import CudaRecorder, Recording
from kernel_pytorch.graph.strategy import terms
from kernel_pytorch.graph.timing import Comparison
from kernel_pytorch.schema import OnMismatch

_ROUNDS, _CALLS = 40, 100


class Base:
    def __init__(self, stream_id: int, device_index: int, device_type: int, priority: int = 0) -> None:
        self.stream_id, self.key = stream_id, (stream_id, device_index, device_type)


class Stream(Base):
    """Made and compared in Python, as torch.cuda.Stream is."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        if device is None or ("stream_id" in kwargs and "device_index" in kwargs):
            return super().__new__(cls)
        raise AssertionError("a stream of a device")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def current_stream(device: Any = None) -> Stream:
    torch.cuda.is_initialized()
    index = _get_device_index(device, optional=True, allow_cpu=True)
    data = {-1: (0, 0, 1)}[index]
    return Stream(stream_id=data[0], device_index=data[1], device_type=data[2])


def stand_in() -> None:
    torch.cuda.current_stream = current_stream  # pyright: ignore[reportAttributeAccessIssue]
    # As much as a C function costs.
    torch._C._cuda_getCurrentStream = {0: (0, 0, 1)}.__getitem__  # pyright: ignore[reportAttributeAccessIssue]


class NoDevice(CudaRecorder):
    """Records outputs; its replay notes the time."""

    # As much as a C function costs.
    busy = staticmethod(bool)  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        super().__init__(torch.device("cpu", 0))
        self.launched = 0.0
        self.on_host: set[int] = set()

    def is_elsewhere(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() in self.on_host

    def marks(self, number: int) -> list[torch.Event]:
        return []

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def is_foreign(self, device: torch.device) -> bool:
        return False

    def warm_up(self, call: Callable[[], Any], num_calls: int) -> None:
        call()

    def record(self, call: Callable[[], Any]) -> Recording:
        def replay() -> None:
            self.launched = time.perf_counter()

        return Recording(call(), replay)

    def compare(self, plain: Callable[[], Any], replay: Callable[[], Any], undo: Callable[[], None], margin: float = 1.0) -> Comparison:
        return Comparison(2.0, 1.0, 1)

    def milliseconds(self, call: Callable[[], Any], num_calls: int = 1) -> float:
        return 0.0

    def free_bytes(self) -> int | None:
        return None

    def rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def hold(self, tensors: Iterable[torch.Tensor]) -> None: ...


class Layer(nn.Module):
    """As many modules and parameters as a layer of BERT has."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.others = nn.ModuleList(nn.Identity() for _ in range(10))


class Layers(nn.Module):
    """num_layers of them; `write` to write a cache in place."""

    def __init__(self, num_layers: int, write: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.write = write

    def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if self.write:
            rest[0][0][0].index_copy_(2, rest[1], x)
        return x


class Select(nn.Module):
    def forward(self, x: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x[:, columns] * scale


def timed(recorder: NoDevice, call: Callable[..., Any], calls: list[tuple[Any, ...]]) -> tuple[float, float]:
    """Microseconds a call until the device would have its graph, and until the caller has its outputs."""
    before = whole = 0.0
    for args in calls:
        start = time.perf_counter()
        call(*args)
        whole += time.perf_counter() - start
        before += recorder.launched - start
    return before / len(calls) * 1e6, whole / len(calls) * 1e6


def say(name: str, model: nn.Module, rounds: list[tuple[float, float]]) -> None:
    least = [min(column) for column in zip(*rounds, strict=True)]
    num_modules, num_parameters = len(list(model.modules())), len(list(model.parameters()))
    print(f"{name:44s} {num_modules:4d} modules {num_parameters:4d} parameters: before {least[0]:6.1f} us, all {least[1]:6.1f} us")


def measure(
    name: str,
    model: nn.Module,
    args: tuple[Any, ...],
    *,
    moving: tuple[int, ...] = (),
    inside: bool = True,
    engine: bool = True,
    on_host: tuple[int, ...] = (),
) -> None:
    """moving: arguments that are new tensors in every call. on_host: those that count as the host's, with another value in every call,
    none of which has as many elements as another argument. engine: the call goes through what the engine puts around it. inside: the
    caller is in inference mode."""
    recorder = NoDevice()
    recorder.on_host = {args[i].numel() for i in on_host}

    def given(number: int) -> tuple[Any, ...]:
        fresh = [arg.clone() if i in moving or i in on_host else arg for i, arg in enumerate(args)]
        return tuple(arg.fill_(number) if i in on_host else arg for i, arg in enumerate(fresh))

    graphed = graph_calls(model.eval(), CUDAGraphManager(recorder, terms(GraphDeploymentStrategy.aggressive), num_warmup_calls=1))
    if engine:
        enter_contexts(Built(model, [CpuBackend(hardware="any", on_mismatch=OnMismatch.emulate).inference]))
    with torch.inference_mode(inside), torch.no_grad():
        for number in range(20):
            model(*given(number))
        assert graphed.manager.statistics["replays"] >= 18
        rounds = [timed(recorder, model, [given(number) for number in range(_CALLS)]) for _ in range(_ROUNDS)]
        assert graphed.manager.statistics["straight_calls"] <= 2
    say(name, model, rounds)


def measure_refused(name: str, model: nn.Module, args: tuple[Any, ...]) -> None:
    """A call that is not worth a graph: what is between the caller and the plain call."""
    plain = model.eval()._call_impl
    graph_calls(model, CUDAGraphManager(NoDevice(), terms(GraphDeploymentStrategy.aggressive, 100.0), num_warmup_calls=1))
    rounds: list[tuple[float, float]] = []
    with torch.inference_mode():
        model(*args)
        for _ in range(_ROUNDS):
            marks = [time.perf_counter()]
            for call in (plain, model):
                for _ in range(_CALLS):
                    call(*args)
                marks.append(time.perf_counter())
            rounds.append((marks[1] - marks[0], marks[2] - marks[1]))
    least = [min(column) / _CALLS * 1e6 for column in zip(*rounds, strict=True)]
    print(f"{name:44s} plain {least[0]:.1f} us, through the GraphedCall {least[1]:.1f} us")


def measure_step(name: str) -> None:
    """A training step, which is looked at before the launch only: a small convolutional network with AdamW."""
    blocks = [layer for _ in range(5) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    recorder, args = NoDevice(), (torch.randn(2, 4, 8, 8), torch.tensor([0, 1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = GraphedTrainStep(model, optimizer, lambda model, x, y: nn.functional.cross_entropy(model(x), y), recorder=recorder)
    for _ in range(20):
        step(*args)
    assert [row["captured"] for row in step.decisions] == [True], step.decisions
    say(name, model, [timed(recorder, step, [args] * _CALLS) for _ in range(_ROUNDS)])


def main() -> None:
    torch.set_num_threads(1)
    stand_in()
    measure_step("a training step")
    with mock.patch.object(replayer, "replayer_class", return_value=(None, "")):
        measure_step("a training step, in Python")
    ids = torch.zeros(1, 128, dtype=torch.int64)
    cache = tuple((torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4)) for _ in range(32))
    decode = (torch.ones(1, 2, 1, 4), cache, torch.tensor([1]))
    measure("one tensor, without the engine", Layers(0), (ids,), engine=False)
    measure("one tensor", Layers(0), (ids,))
    measure("one tensor, not in inference mode before", Layers(0), (ids,), inside=False)
    measure("one tensor, new in every call", Layers(0), (ids,), moving=(0,))
    columns, scale = torch.zeros(64, dtype=torch.int64), torch.ones(())
    measure("two of three tensors on the host, changed", Select(), (ids, columns, scale), on_host=(1, 2))
    measure("BERT's modules, three tensors", Layers(12), (ids, ids.clone(), ids.clone()))
    measure("a cache of 64 tensors, read", Layers(0), decode)
    measure("the same, written, 8 layers", Layers(8, write=True), decode)
    measure("the same, new ids and positions", Layers(8, write=True), decode, moving=(0, 2))
    measure_refused("one tensor, refused", Layers(0), (ids,))
    measure_refused("a cache of 64 tensors, refused", Layers(0), decode)


if __name__ == "__main__":
    main()
