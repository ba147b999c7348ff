"""Training steps in real CUDA graphs. By hand on a GPU machine: python -m pytest -n 0 tests/unit/graph/test_training_gpu.py"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.graph import GraphedTrainStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Float32 steps with deterministic convolutions. Kernels are the same, their workspaces may not be; compiled code rounds elsewhere,
# and fifty steps of training amplify that.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
COMPILED_TOLERANCE = {"rtol": 2e-2, "atol": 1e-3}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, capturable=True),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, capturable=True, fused=True),
}


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Dropout(dropout), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)).cuda()


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def batch(index: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(index)
    x = torch.randn(size, 3, 16, 16, device="cuda", generator=generator)
    return x, torch.randint(10, (size,), device="cuda", generator=generator)


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, *inputs: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = loss_fn(model, *inputs)
    loss.backward()
    optimizer.step()
    return loss.detach()


def graphed(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Any = loss_fn, **options: Any) -> GraphedTrainStep:
    """min_speedup 0 keeps every graph, so that what is tested does not depend on a timing."""
    return GraphedTrainStep(model, optimizer, loss, min_speedup=0.0, **options)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    torch.cuda.synchronize()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_follow_the_plain_loop(name: str, compiled: bool) -> None:
    expected_model = network()
    model = copy.deepcopy(expected_model)
    expected_optimizer, optimizer = OPTIMIZERS[name](expected_model.parameters()), OPTIMIZERS[name](model.parameters())
    if compiled:
        called = torch.compile(model)
        step = graphed(model, optimizer, lambda _, x, y: loss_fn(called, x, y))  # pyright: ignore[reportArgumentType]
    else:
        step = graphed(model, optimizer)
    expected = torch.stack([plain_step(expected_model, expected_optimizer, *batch(index)) for index in range(50)])
    actual = torch.stack([step(*batch(index)) for index in range(50)])
    torch.testing.assert_close(actual, expected, **(COMPILED_TOLERANCE if compiled else TOLERANCE))
    assert [decision["captured"] for decision in step.decisions] == [True], step.decisions
    assert int(model[1].num_batches_tracked) == 50  # pyright: ignore[reportIndexIssue]
    print(name, compiled, step.decisions[0])


def test_recording_changes_nothing_but_one_step() -> None:
    model = network(dropout=0.5)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step = GraphedTrainStep(model, optimizer, loss_fn, min_speedup=1e9)
    step(*batch(0))
    twin = copy.deepcopy(model)
    twin_optimizer = OPTIMIZERS["adamw"](twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    random = torch.cuda.get_rng_state()
    actual = step(*batch(1))
    assert "not kept" in step.decisions[0]["reason"]
    random_after = torch.cuda.get_rng_state()
    torch.cuda.set_rng_state(random)
    expected = plain_step(twin, twin_optimizer, *batch(1))
    assert torch.equal(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert torch.equal(torch.cuda.get_rng_state(), random_after)


def test_gradients_after_a_replay_are_the_steps_own() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = graphed(model, optimizer)
    for index in range(4):
        step(*batch(index))
        actual = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        # Without a learning rate the weights stay, so that the same gradients can be made again.
        expected = torch.autograd.grad(loss_fn(model, *batch(index)), list(model.parameters()))
        torch.testing.assert_close(actual, list(expected), rtol=1e-3, atol=1e-5)
        model.zero_grad(set_to_none=True)


def test_a_learning_rate_on_the_device_is_read_by_every_replay() -> None:
    models = [network()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-3, device="cuda"), capturable=True) for m in models]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in optimizers]
    step = graphed(models[1], optimizers[1])
    for index in range(10):
        expected = plain_step(models[0], optimizers[0], *batch(index))
        torch.testing.assert_close(step(*batch(index)), expected, **TOLERANCE)
        for scheduler in schedulers:
            scheduler.step()
    assert [decision["captured"] for decision in step.decisions] == [True], step.decisions


def test_a_learning_rate_that_is_a_float_is_recorded_again() -> None:
    models = [network()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [OPTIMIZERS["momentum"](m.parameters()) for m in models]
    step = graphed(models[1], optimizers[1])
    for index in range(12):
        if index == 6:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 1e-4
        expected = plain_step(models[0], optimizers[0], *batch(index))
        torch.testing.assert_close(step(*batch(index)), expected, **TOLERANCE)
    assert [decision["captured"] for decision in step.decisions] == [True, False, True], step.decisions


def test_dropout_draws_fresh_numbers_in_every_replay() -> None:
    model = network(dropout=0.5)
    step = graphed(model, torch.optim.SGD(model.parameters(), lr=0.0))
    losses = [step(*batch(0)).item() for _ in range(6)]
    assert len(set(losses)) == 6
    assert [decision["captured"] for decision in step.decisions] == [True]


def test_the_last_batch_of_an_epoch_is_a_plain_step() -> None:
    models = [network()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [OPTIMIZERS["adamw"](m.parameters()) for m in models]
    step = graphed(models[1], optimizers[1])
    for index in range(12):
        inputs = batch(index, size=7 if index % 4 == 3 else 32)
        expected = plain_step(models[0], optimizers[0], *inputs)
        torch.testing.assert_close(step(*inputs), expected, **TOLERANCE)
    assert [decision["captured"] for decision in step.decisions] == [True, False], step.decisions


def test_a_step_that_cannot_be_captured_stays_plain_and_the_device_works_on() -> None:
    def waits(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()
        return loss_fn(model, x, y)

    models = [network(dropout=0.5)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [OPTIMIZERS["adamw"](m.parameters()) for m in models]
    step = graphed(models[1], optimizers[1], waits)
    for index in range(4):
        torch.cuda.manual_seed(index)
        expected = plain_step(models[0], optimizers[0], *batch(index))
        torch.cuda.manual_seed(index)
        torch.testing.assert_close(step(*batch(index)), expected, **TOLERANCE)
    assert step.decisions[0]["reason"].startswith("capture failed: "), step.decisions
    assert torch.rand(4, device="cuda").sum() > 0


def test_clipped_gradients_are_part_of_the_graph() -> None:
    models = [network()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [OPTIMIZERS["momentum"](m.parameters()) for m in models]
    step = graphed(models[1], optimizers[1], after_backward=lambda: nn.utils.clip_grad_norm_(models[1].parameters(), 0.1))
    for index in range(6):
        optimizers[0].zero_grad()
        expected = loss_fn(models[0], *batch(index))
        expected.backward()
        nn.utils.clip_grad_norm_(models[0].parameters(), 0.1)
        optimizers[0].step()
        torch.testing.assert_close(step(*batch(index)), expected.detach(), **TOLERANCE)
    assert [decision["captured"] for decision in step.decisions] == [True], step.decisions


def test_an_optimizer_that_counts_on_the_host_is_refused() -> None:
    model = network()
    with pytest.raises(UnsupportedOperationError, match="capturable"):
        GraphedTrainStep(model, torch.optim.AdamW(model.parameters()), loss_fn)
