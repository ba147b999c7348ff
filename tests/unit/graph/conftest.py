"""What tests of graphs share: a recorder for any device, and models around which a GraphedCall was put."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame
from torch.utils._pytree import tree_leaves

from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.graph import replayer
from kernel_pytorch.graph.capture import graph_calls
from kernel_pytorch.graph.graphed_call import GraphedCall
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.recorder import Recorder, Recording
from kernel_pytorch.graph.strategy import terms
from kernel_pytorch.graph.timing import Comparison


class Rerun(Recorder):
    """Records a call by keeping its output tensors and replays it by running it again into them, as the code, compiled or eager, that
    was recorded. Like a CUDA graph it reads and writes fixed memory, and like one it must not be handed moved tensors. elsewhere:
    ids of storages that are to pass for host memory. eager_ms: of a replay of eager code, against replay_ms of compiled code.
    num_eager: recordings of eager code; eager_failure: what these fail with."""

    def __init__(self, plain_ms: float = 2.0, replay_ms: float = 1.0, held_bytes: int = 0, eager_ms: float = 1.0) -> None:
        super().__init__(torch.device("cpu"))
        self.held_bytes = held_bytes
        self.comparison = Comparison(plain_ms, replay_ms, 20)
        self.of_codes = Comparison(replay_ms, eager_ms, 20)
        self.num_recorded = self.num_replays = self.num_eager = 0
        self.failure: str | None = None
        self.eager_failure: str | None = None
        self.elsewhere: set[int] = set()

    def is_elsewhere(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.elsewhere

    def put_elsewhere(self, *tensors: torch.Tensor) -> None:
        self.elsewhere.update(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def milliseconds(self, call: Callable[[], Any], num_calls: int = 1) -> float:
        """What `compare` would say: replay_ms for calls that replay something, else plain_ms."""
        before = self.num_replays
        for _ in range(num_calls):
            call()
        return self.comparison.plain_ms if self.num_replays == before else self.comparison.replay_ms

    def busy(self) -> bool:
        return False

    def warm_up(self, call: Callable[[], Any], num_calls: int) -> None:
        for _ in range(num_calls):
            call()

    def record(self, call: Callable[[], Any]) -> Recording:
        stance = eval_frame._stance.stance
        failure = self.failure or (self.eager_failure if stance == "force_eager" else None)
        if failure:
            raise RuntimeError(failure)
        self.num_recorded += 1
        self.num_eager += stance == "force_eager"
        output = call()

        def replay() -> None:
            self.num_replays += 1
            with torch.compiler.set_stance(stance):
                again = call()
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        return Recording(output, replay, self.held_bytes, self.held_bytes)

    def compare(self, plain: Callable[[], Any], replay: Callable[[], Any], undo: Callable[[], None], margin: float = 1.0) -> Comparison:
        is_replay = []
        for call in (plain, replay):
            before = self.num_replays
            call()
            is_replay.append(self.num_replays > before)
            undo()
        # What is timed as a replay must be one.
        assert is_replay[1]
        return self.of_codes if is_replay[0] else self.comparison

    def rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def hold(self, tensors: Iterable[torch.Tensor]) -> None: ...

    def enter_replay(self) -> None: ...

    def leave_replay(self) -> None: ...


def wrap(
    model: nn.Module,
    recorder: Rerun | None = None,
    strategy: GraphDeploymentStrategy = GraphDeploymentStrategy.aggressive,
    min_speedup: float = 1.02,
    memory_budget_bytes: int | None = None,
) -> tuple[GraphedCall, Rerun]:
    """Captures in the first call of a kind, whatever became of other kinds: most tests are not about when."""
    recorder = recorder or Rerun()
    manager = CUDAGraphManager(recorder, terms(strategy, min_speedup), num_warmup_calls=2, memory_budget_bytes=memory_budget_bytes)
    return graph_calls(model, manager), recorder


@pytest.fixture(name="Rerun")
def _rerun() -> type[Rerun]:
    return Rerun


@pytest.fixture(name="wrap")
def _wrap() -> Callable[..., tuple[GraphedCall, Rerun]]:
    return wrap


@pytest.fixture(params=["C++", "Python"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no compiler, Python does all of it."""
    if request.param == "Python":
        monkeypatch.setattr(replayer, "replayer_class", lambda: (None, "for this test"))
