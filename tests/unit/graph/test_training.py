"""Everything about the graphed training step but the CUDA graph: what it changes, when it replays, what it notices.

`Rerun` records a step by running it: unlike a CUDA graph it trains while it records, so that what is not put back shows."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.graph import replayer
from kernel_pytorch.graph.optimizer_state import refusal
from kernel_pytorch.graph.training import GraphedTrainStep

pytestmark = pytest.mark.usefixtures("both_ways")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    # Its first step makes the momentum buffers by another formula than the later ones.
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=1e-3),
    # Fused: on a CPU the others wait for the step count.
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
}


def network() -> nn.Module:
    """Running statistics, random numbers and weights: all that a step changes."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def batch(index: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator)


class Pair:
    """The same network trained by a plain loop and by a GraphedTrainStep, from one random state each."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], recorder: Any, loss: Any = loss_fn, **options: Any) -> None:
        self.plain = network()
        self.model = copy.deepcopy(self.plain)
        self.loss, self.after = loss, options.get("after")
        self.plain_optimizer, self.optimizer = make(self.plain.parameters()), make(self.model.parameters())
        self.recorder = recorder
        after = (lambda: self.after(self.model)) if self.after else None
        strategy = options.get("strategy", GraphDeploymentStrategy.balanced)
        self.step = GraphedTrainStep(self.model, self.optimizer, loss, after_backward=after, strategy=strategy, recorder=self.recorder)
        self.states = [torch.Generator().manual_seed(7).get_state()] * 2

    def both(self, change: Callable[[nn.Module, torch.optim.Optimizer], Any]) -> None:
        change(self.plain, self.plain_optimizer)
        change(self.model, self.optimizer)

    def run(self, *inputs: torch.Tensor) -> tuple[float, float]:
        torch.set_rng_state(self.states[0])
        self.plain_optimizer.zero_grad()
        expected = self.loss(self.plain, *inputs)
        expected.backward()
        if self.after:
            self.after(self.plain)
        self.plain_optimizer.step()
        self.states[0] = torch.get_rng_state()
        torch.set_rng_state(self.states[1])
        actual = self.step(*inputs)
        self.states[1] = torch.get_rng_state()
        return actual.item(), expected.item()

    def assert_equal(self, indices: range, size: int = 6) -> None:
        """Steps on batches: losses, weights, buffers, optimizer state and random state stay bit for bit the same."""
        for index in indices:
            actual, expected = self.run(*batch(index, size))
            assert actual == expected, f"step {index}"
            for (name, one), other in zip(self.model.state_dict().items(), self.plain.state_dict().values(), strict=True):
                assert torch.equal(one, other), f"step {index}: {name}"
            assert torch.equal(*self.states)
        states = zip(self.optimizer.state.values(), self.plain_optimizer.state.values(), strict=True)
        for one, other in states:
            assert all(torch.equal(one[key], other[key]) for key in other if isinstance(other[key], torch.Tensor))

    @property
    def num_replays(self) -> int:
        """Without those that were timed, one a recording."""
        return self.recorder.num_replays - self.recorder.num_recorded

    @property
    def reasons(self) -> list[str]:
        return [decision["reason"] for decision in self.step.decisions]


Start = Callable[..., Pair]


@pytest.fixture
def start(Rerun: Any) -> Start:
    """start(name of an optimizer): a Pair. plain_ms: what timing finds, beside a replay of 1 ms. failure: raised by recording."""

    class Fails(Rerun):
        error: BaseException

        def record(self, call: Callable[[], Any]) -> Any:
            super().record(call)
            raise self.error

    def make(name: str, plain_ms: float = 2.0, failure: BaseException | None = None, **options: Any) -> Pair:
        recorder = Rerun(plain_ms=plain_ms) if failure is None else Fails()
        if failure is not None:
            recorder.error = failure
        return Pair(OPTIMIZERS[name], recorder, **options)

    return make


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_the_plain_loop_bit_for_bit(start: Start, name: str) -> None:
    pair = start(name)
    pair.assert_equal(range(8))
    # The first step is plain, the second records and is the first replay.
    assert (pair.recorder.num_recorded, pair.num_replays) == (1, 7)
    decision = pair.step.decisions[0]
    assert (decision["captured"], decision["speedup"], decision["inputs"]) == (True, 2.0, "float32[6, 3, 8, 8], int64[6]")
    assert decision["copied_bytes"] == 6 * 3 * 8 * 8 * 4 + 6 * 8


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_graph_that_is_not_faster_is_not_kept_and_leaves_no_trace(start: Start, name: str) -> None:
    pair = start(name, plain_ms=1.0)
    pair.assert_equal(range(4))
    assert pair.num_replays == 0
    assert pair.reasons == ["replay is not kept: 1.000 times the plain call's speed; 1.02 asked for"]


def test_a_strategy_says_when_and_by_how_much(start: Start) -> None:
    pair = start("momentum", plain_ms=1.05, strategy=GraphDeploymentStrategy.conservative)
    pair.assert_equal(range(4))
    assert pair.reasons == []
    pair.assert_equal(range(4, 6))
    assert pair.reasons == ["replay is not kept: 1.050 times the plain call's speed; 1.1 asked for"]
    pair = start("momentum", plain_ms=1.0, strategy=GraphDeploymentStrategy.aggressive)
    pair.assert_equal(range(4))
    assert pair.num_replays == 3


def test_a_failed_capture_leaves_no_trace(start: Start) -> None:
    pair = start("adamw", failure=RuntimeError("operation not permitted\nmore"))
    pair.assert_equal(range(4))
    assert pair.reasons == ["capture failed: operation not permitted"]


def test_an_error_of_the_callers_leaves_no_trace_and_passes_through(start: Start) -> None:
    pair = start("momentum", failure=KeyError("label"))
    pair.run(*batch(0))
    before, state = copy.deepcopy(pair.model.state_dict()), torch.get_rng_state()
    with pytest.raises(KeyError, match="label"):
        pair.step(*batch(1))
    assert all(torch.equal(one, before[name]) for name, one in pair.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_returned_loss_is_not_overwritten(start: Start) -> None:
    pair = start("sgd")
    losses = [pair.step(*batch(index)) for index in range(4)]
    assert len({loss.item() for loss in losses}) == 4
    assert not any(loss.requires_grad for loss in losses)


def test_a_changed_learning_rate_is_noticed_and_recorded_again(start: Start) -> None:
    pair = start("momentum")
    pair.assert_equal(range(4))
    pair.both(lambda _, optimizer: optimizer.param_groups[0].update(lr=0.01))
    pair.assert_equal(range(4, 8))
    assert pair.recorder.num_recorded == 2
    assert "a value of the optimizer changed that is a constant in the graph" in pair.reasons[1]


def test_a_learning_rate_that_changes_in_every_step_is_never_recorded(start: Start) -> None:
    pair = start("sgd")
    for index in range(12):
        pair.both(lambda _, optimizer, lr=0.1 / (index + 1): optimizer.param_groups[0].update(lr=lr))
        pair.assert_equal(range(index, index + 1))
    assert pair.recorder.num_recorded == 0


def test_recording_again_has_an_end_that_says_the_way_out(start: Start) -> None:
    pair = start("sgd")
    for index in range(30):
        pair.both(lambda _, optimizer, lr=0.1 / (index // 3 + 1): optimizer.param_groups[0].update(lr=lr))
        pair.assert_equal(range(index, index + 1))
    assert pair.recorder.num_recorded == 8
    assert pair.reasons[-1] == "recorded 8 times already; make the learning rate a tensor on the device"


def test_other_shapes_and_eval_mode_are_plain_steps_and_the_graph_stays(start: Start) -> None:
    pair = start("adamw")
    pair.assert_equal(range(3))
    assert pair.num_replays == 2
    pair.assert_equal(range(3, 4), size=2)
    pair.both(lambda model, _: model.eval())
    pair.assert_equal(range(4, 6))
    pair.both(lambda model, _: model.train())
    assert pair.num_replays == 2
    pair.assert_equal(range(6, 9))
    assert (pair.recorder.num_recorded, pair.num_replays) == (1, 5)


def _replace_parameter(model: Any, optimizer: torch.optim.Optimizer) -> None:
    old = model[-1].bias
    model[-1].bias = nn.Parameter(torch.ones_like(old))
    group = optimizer.param_groups[0]
    group["params"] = [model[-1].bias if parameter is old else parameter for parameter in group["params"]]


CHANGES: dict[str, Callable[[Any, torch.optim.Optimizer], Any]] = {
    "parameter": _replace_parameter,
    "optimizer state": lambda _, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "optimizer state of one": lambda model, optimizer: optimizer.state[model[0].weight].update(exp_avg=torch.zeros(4, 3, 3, 3)),
    "optimizer state moved": lambda _, optimizer: [
        value.set_(value.clone()) for state in optimizer.state.values() for value in state.values()
    ],
    "buffer": lambda model, _: setattr(model[1], "running_mean", torch.zeros(4)),
    "frozen": lambda model, _: model[0].requires_grad_(False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_replaced_tensors_drop_the_graph(start: Start, name: str) -> None:
    pair = start("adamw")
    pair.assert_equal(range(3))
    pair.both(CHANGES[name])
    pair.assert_equal(range(3, 7))
    assert pair.reasons[1].startswith("graph dropped: ")
    assert pair.recorder.num_recorded == 2


def test_weights_loaded_in_place_are_read_by_the_graph(start: Start) -> None:
    pair = start("sgd")
    pair.assert_equal(range(3))
    fresh = {name: value + 1 for name, value in network().state_dict().items()}
    pair.both(lambda model, _: model.load_state_dict(fresh))
    pair.assert_equal(range(3, 6))
    assert (pair.recorder.num_recorded, pair.num_replays) == (1, 5)


def test_gradients_are_clipped_between_backward_and_step(start: Start) -> None:
    calls = []

    def clip(model: nn.Module) -> None:
        calls.append(nn.utils.clip_grad_norm_(model.parameters(), 1e-3))

    pair = start("sgd", after=clip)
    pair.assert_equal(range(5))
    assert calls
    assert pair.num_replays == 4


def test_a_caller_may_drop_gradients_between_steps(start: Start) -> None:
    pair = start("sgd")
    for index in range(5):
        pair.assert_equal(range(index, index + 1))
        assert all(parameter.grad is not None for parameter in pair.model.parameters())
        pair.both(lambda model, _: model.zero_grad(set_to_none=True))


def _counts(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    model.num_calls = getattr(model, "num_calls", 0) + 1  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return loss_fn(model, x, y)


def _waits(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return loss_fn(model, x, y) * (1.0 if x.sum().item() > 1e9 else 2.0)


def _writes(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return loss_fn(model, x.mul_(1.0), y)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [(_counts, "changes Python attributes"), (_waits, "waits for a value of the device"), (_writes, "writes to an argument")],
)
def test_steps_that_a_replay_could_not_stand_for_stay_plain(start: Start, loss: Any, reason: str) -> None:
    pair = start("momentum", loss=loss)
    pair.assert_equal(range(4))
    assert pair.recorder.num_recorded == 0
    assert reason in pair.reasons[0]


def test_hooks_keep_steps_plain(start: Start) -> None:
    pair = start("sgd")
    seen = []
    pair.model[0].register_forward_hook(lambda *_: seen.append(1))  # pyright: ignore[reportIndexIssue, reportCallIssue]
    pair.assert_equal(range(3))
    assert len(seen) == 3
    assert pair.reasons == ["the model or the optimizer has a hook, which a replay would not run"]
    pair = start("sgd")
    next(pair.model.parameters()).register_post_accumulate_grad_hook(lambda _: seen.append(1))
    pair.assert_equal(range(3))
    assert len(seen) == 6
    assert pair.reasons == ["a parameter has a hook, which a replay would not run"]


def test_an_optimizer_that_counts_on_the_host_is_refused_with_the_way_out() -> None:
    parameter = nn.Parameter(torch.empty(2, device="meta"))
    gpu = torch.device("meta")
    why = refusal(torch.optim.AdamW([parameter]), gpu)
    assert why is not None
    assert why.startswith("optimizer.param_groups[0].capturable: found False")
    assert why.endswith("make the optimizer with AdamW(..., capturable=True)")
    assert refusal(torch.optim.AdamW([parameter], capturable=True), gpu) is None
    assert refusal(torch.optim.SGD([parameter], lr=0.1, momentum=0.9), gpu) is None
    assert "found a parameter on meta, required cpu" in str(refusal(torch.optim.SGD([parameter], lr=0.1), torch.device("cpu")))


def test_what_no_graph_can_hold_is_refused_at_once(Rerun: Any) -> None:
    model = network()
    with pytest.raises(UnsupportedOperationError, match="found LBFGS"):
        GraphedTrainStep(model, torch.optim.LBFGS(model.parameters()), loss_fn, recorder=Rerun())
    with pytest.raises(UnsupportedOperationError, match="model: found cpu, required one CUDA device"):
        GraphedTrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)


def test_the_package_names_it_without_importing_torch() -> None:
    code = "import sys, kernel_pytorch.graph as g; print('torch' in sys.modules, g.GraphedTrainStep.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "GraphedTrainStep"]


def _set(name: str, value: Any) -> Callable[[nn.Module, torch.optim.Optimizer], Any]:
    return lambda _, optimizer: optimizer.param_groups[0].__setitem__(name, value)


def _other_state(_: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = next(iter(optimizer.state.values()))
    state["exp_avg"] = state["exp_avg"].clone()


LOOKED_AT: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "another rate": _set("lr", 0.5),
    "other betas": _set("betas", (0.5, 0.6)),
    "maximize": _set("maximize", True),
    "a key more": _set("mine", 1),
    "a frozen parameter": lambda model, _: model[0].weight.requires_grad_(False),
    "a parameter elsewhere": lambda model, _: setattr(model[0].weight, "data", model[0].weight.data.clone()),
    "a parameter replaced": lambda model, _: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach().clone())),
    "a parameter more": lambda _, optimizer: optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(1))),
    "a group more": lambda _, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
    "other parameters": lambda _, optimizer: optimizer.param_groups[0]["params"].reverse(),
    "other state": _other_state,
    "no state": lambda _, optimizer: optimizer.state.clear(),
    "a state of its own": lambda _, optimizer: setattr(optimizer, "state", copy.copy(optimizer.state)),
    "a hook": lambda model, _: model[0].register_forward_hook(lambda *_: None),
    "a hook of the optimizer": lambda _, optimizer: optimizer.register_step_post_hook(lambda *_: None),
    "eval": lambda model, _: model.eval(),
    "a module more": lambda model, _: model.append(nn.Identity()),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_step_is_left_to_python_after_each_change(start: Start, name: str) -> None:
    pair = start("adamw")
    for index in range(4):
        pair.run(*batch(index))
    quick = pair.step._quick
    if replayer.replayer_class()[0] is None:
        assert quick is None
        return
    torch.manual_seed(0)
    assert quick.run(batch(0), {}) is not NotImplemented
    assert quick.run(batch(0, 3), {}) is NotImplemented
    with torch.no_grad():
        assert quick.run(batch(0), {}) is NotImplemented
    LOOKED_AT[name](pair.model, pair.optimizer)
    assert quick.run(batch(0), {}) is NotImplemented


def test_a_setting_that_may_change_inside_stays_with_python(start: Start) -> None:
    pair = start("adamw")
    pair.both(lambda _, optimizer: optimizer.param_groups[0].__setitem__("mine", [1]))
    for index in range(4):
        pair.run(*batch(index))
    assert pair.step.decisions[-1]["captured"]
    assert pair.step._quick is None
