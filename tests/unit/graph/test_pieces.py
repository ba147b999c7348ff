"""Calls that cannot be recorded whole: the submodules or compiled regions that can be, and when they are taken away again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.graph import regions


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.inference_mode():
        yield


class Block(nn.Module):
    """Five operations. waits: reads a value of the device, which no graph can."""

    def __init__(self, waits: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Softmax(-1), nn.ReLU(), nn.Tanh())
        self.waits = waits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.sum().item() if self.waits else 2.0
        return self.inner(x * 2) + scale


class Stack(nn.Module):
    """A wait between blocks, and one inside the second."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(waits=True), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x / max(x.max().item(), 1.0)


def decided(graphed: Any) -> dict[str, Any]:
    return next(decision for decision in graphed.decisions if decision["inputs"] == "whole call")


def call_until(condition: Callable[[], bool], model: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> None:
    for _ in range(200):
        assert torch.equal(model(x), expected)
        if condition():
            return
    pytest.fail("nothing was decided in 200 calls")


def test_the_largest_submodules_that_can_be_recorded_are(wrap: Any, Rerun: Any) -> None:
    model, recorder = Stack(), Rerun()
    x = torch.randn(4, 8)
    expected = model(x)
    graphed, _ = wrap(model, recorder)
    call_until(lambda: any(d["inputs"] == "whole call" for d in graphed.decisions), model, x, expected)
    assert graphed.decisions[0]["reason"] == "the call waits for a value of the device: aten.item.default in blocks.1"
    whole = decided(graphed)
    assert whole["captured"], graphed.decisions
    assert whole["pieces"] == ["blocks.0", "blocks.1.inner", "blocks.2"]
    assert (whole["plain_ms"], whole["replay_ms"], whole["speedup"]) == (2.0, 1.0, 2.0)
    reasons = {d.get("module"): d["reason"] for d in graphed.decisions}
    assert reasons["blocks.1"] == "the call waits for a value of the device: aten.item.default in Block"
    replays = recorder.num_replays
    assert torch.equal(model(x), expected)
    assert recorder.num_replays == replays + 3
    moved = torch.randn(4, 8)
    assert torch.equal(model(moved), Stack.forward(model, moved))


def test_pieces_that_do_not_make_the_whole_call_faster_are_taken_away(wrap: Any, Rerun: Any) -> None:
    class Slower(Rerun):
        def milliseconds(self, call: Callable[[], Any], num_calls: int = 1) -> float:
            super().milliseconds(call, num_calls)
            return 1.0

    model, recorder = Stack(), Slower()
    x = torch.randn(4, 8)
    expected = model(x)
    graphed, _ = wrap(model, recorder)
    call_until(lambda: any(d["inputs"] == "whole call" for d in graphed.decisions), model, x, expected)
    whole = decided(graphed)
    assert (whole["captured"], whole["speedup"], whole["num_samples"]) == (False, 1.0, 15)
    assert all(block._compiled_call_impl is None for block in model.blocks)
    assert graphed.manager.statistics["held_bytes"] == 0
    replays = recorder.num_replays
    assert torch.equal(model(x), expected)
    assert recorder.num_replays == replays


def test_pieces_that_are_not_worth_a_graph_are_given_up(wrap: Any, Rerun: Any) -> None:
    model = Stack()
    graphed, _ = wrap(model, Rerun(plain_ms=1.0, replay_ms=1.0))
    x = torch.randn(4, 8)
    expected = Stack.forward(model, x)
    call_until(lambda: any(d["inputs"] == "whole call" for d in graphed.decisions), model, x, expected)
    assert (decided(graphed)["captured"], decided(graphed)["reason"]) == (False, "no piece is worth a graph")
    assert all(module._compiled_call_impl is None for module in model.modules() if module is not model)


def test_a_piece_with_few_operations_is_not_recorded(wrap: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) * x.sum().item()

    model = Two()
    graphed, recorder = wrap(model)
    for _ in range(3):
        model(torch.ones(2))
    assert recorder.num_recorded == 0
    assert [d["reason"] for d in graphed.decisions if d.get("module") == "first"] == ["1 operations are not worth a graph"]


def test_a_compiled_submodule_is_a_piece_as_it_is(wrap: Any) -> None:
    model = Stack()
    model.blocks[0].compile(backend="eager", fullgraph=True)
    compiled = model.blocks[0]._compiled_call_impl
    x = torch.randn(4, 8)
    expected = Stack.forward(model, x)
    graphed, _ = wrap(model)
    call_until(lambda: any(d["inputs"] == "whole call" for d in graphed.decisions), model, x, expected)
    assert "blocks.0" in decided(graphed)["pieces"]
    assert model.blocks[0]._compiled_call_impl.plain is compiled  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.skipif(not regions.policy_exists(), reason="this torch has no cudagraph_policy")
def test_regions_of_a_compiled_call_are_pieces(wrap: Any) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            counts.add_(1)
            scale = x.sum().item()
            return self.second(x).tanh() * scale

    model, x = Broken(), torch.randn(4, 8)
    expected = model(x, torch.zeros(4))
    model.compile()
    graphed, recorder = wrap(model)
    counts = torch.zeros(4)
    for number in range(1, 60):
        assert torch.allclose(model(x, counts), expected, atol=1e-6)
        assert counts.tolist() == [float(number)] * 4
    whole = decided(graphed)
    assert whole["captured"], graphed.decisions
    assert len(whole["pieces"]) == 2
    assert all(name.startswith("region ") for name in whole["pieces"])
    replays = recorder.num_replays
    other = torch.randn(4, 8)
    plain = Broken.forward(model, other, torch.zeros(4))
    assert torch.allclose(model(other, counts), plain, atol=1e-6)
    assert torch.allclose(model(x, counts), expected, atol=1e-6)
    assert recorder.num_replays > replays
