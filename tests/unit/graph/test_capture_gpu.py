"""Capture with real CUDA graphs. By hand on a GPU machine: python -m pytest -n 0 tests/unit/graph/test_capture_gpu.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.graph.capture import graph_calls
from kernel_pytorch.graph.graphed_call import GraphedCall
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.recorder import CudaRecorder
from kernel_pytorch.graph.strategy import terms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def wrap(model: nn.Module, min_speedup: float = 0.0) -> GraphedCall:
    """min_speedup 0 keeps every graph, so that what is tested does not depend on a timing."""
    recorder = CudaRecorder(torch.device("cuda", 0))
    return graph_calls(model, CUDAGraphManager(recorder, terms(GraphDeploymentStrategy.aggressive, min_speedup), num_warmup_calls=3))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.GELU())]).cuda().eval()


class Attention(nn.Module):
    """One decode step over a static cache that is an argument: writes at a position, attends, adds to a counter buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, cache: list[torch.Tensor], position: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        q, k, v = self.qkv(x).reshape(x.shape[0], 1, 3, 4, 16).permute(2, 0, 3, 1, 4)
        cache[0].index_copy_(2, position, k)
        cache[1].index_copy_(2, position, v)
        self.num_calls.add_(1)  # pyright: ignore[reportCallIssue]
        mask = torch.arange(cache[0].shape[2], device=x.device) <= position
        return nn.functional.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask), cache


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield
    torch.cuda.synchronize()


def test_replays_equal_plain_calls_for_moved_inputs_and_say_how_fast() -> None:
    model = mlp()
    inputs = [torch.randn(4, 64, device="cuda") for _ in range(5)]
    expected = [model(x) for x in inputs]
    graphed = wrap(model)
    outputs = [model(x) for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert [decision["captured"] for decision in graphed.decisions] == [True, True]
    assert [decision["copied_bytes"] for decision in graphed.decisions] == [0, 4 * 64 * 4]
    assert all(decision["plain_ms"] > 0 and decision["replay_ms"] > 0 for decision in graphed.decisions)
    print(graphed.decisions)


@pytest.mark.parametrize("compiled", [False, True])
def test_decode_steps_write_the_callers_cache(compiled: bool) -> None:
    torch.manual_seed(0)
    model = Attention().cuda().eval()
    if compiled:
        model.compile(fullgraph=True)
    xs = [torch.randn(2, 1, 64, device="cuda") for _ in range(6)]

    def run() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        cache = [torch.zeros(2, 4, 8, 16, device="cuda") for _ in range(2)]
        outputs = []
        for step, x in enumerate(xs):
            out, returned = model(x, cache, torch.tensor([step], device="cuda"))
            assert returned[0] is cache[0]
            outputs.append(out)
        return outputs, cache

    expected, expected_cache = run()
    assert int(model.num_calls) == 6  # pyright: ignore[reportArgumentType]
    graphed = wrap(model)
    outputs, cache = run()
    assert int(model.num_calls) == 12  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(a, b) for a, b in zip(outputs + cache, expected + expected_cache, strict=True))
    assert [d["captured"] for d in graphed.decisions] == [True, True], graphed.decisions
    assert graphed.decisions[0]["num_written"] == 3
    outputs, cache = run()
    assert all(torch.equal(a, b) for a, b in zip(outputs + cache, expected + expected_cache, strict=True))


def test_dropout_draws_new_numbers_in_every_replay_and_follows_the_seed() -> None:
    model = nn.Dropout(0.5).cuda().train()
    x = torch.ones(4096, device="cuda")
    torch.manual_seed(7)
    expected = [model(x) for _ in range(3)]
    graphed = wrap(model)
    model(x)
    assert graphed.decisions[0]["captured"], graphed.decisions
    torch.manual_seed(7)
    actual = [model(x) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not torch.equal(actual[0], actual[1])


class Waits(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item()


class CopiesIn(nn.Module):
    """Nothing in the operations' schemas says that this cannot be recorded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(3).to(x.device) * 2


class Synchronizes(nn.Module):
    """CUDA itself refuses this, and the capture is lost."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 2
        torch.cuda.synchronize()
        return y


@pytest.mark.parametrize(
    ("model", "expected", "reason"),
    [
        (Waits(), 3.0, "the call waits for a value of the device"),
        (CopiesIn(), 3.0, "capture failed: "),
        (Synchronizes(), 3.0, "capture failed: "),
    ],
)
def test_what_cannot_be_recorded_falls_back_and_leaves_no_damage(model: nn.Module, expected: float, reason: str) -> None:
    other = nn.Dropout(0.5).cuda().train()
    ones = torch.ones(64, device="cuda")
    wrap(other)
    other(ones)
    graphed = wrap(model)
    stream = torch.cuda.current_stream()
    x = torch.ones(3, device="cuda")
    assert [model(x).tolist() for _ in range(2)] == [[expected] * 3] * 2
    print(graphed.decisions)
    assert graphed.decisions[0]["reason"].startswith(reason)
    assert torch.cuda.current_stream() == stream
    torch.manual_seed(0)
    plain = nn.functional.dropout(ones, 0.5)
    torch.manual_seed(0)
    assert torch.equal(other(ones), plain)
    after = mlp()
    y = torch.randn(4, 64, device="cuda")
    out = after(y)
    decisions = wrap(after).decisions
    assert [torch.equal(after(y), out) for _ in range(2)] == [True, True]
    assert decisions[0]["captured"]
    assert torch.empty(2**26, device="cuda").fill_(1).sum().item() == 2.0**26


def test_weights_in_place_and_replaced() -> None:
    model = nn.Linear(8, 8, bias=False).cuda()
    graphed = wrap(model)
    x = torch.ones(1, 8, device="cuda")
    model(x)
    model.weight.data.fill_(1.0)
    assert model(x).tolist() == [[8.0] * 8]
    model.weight = nn.Parameter(torch.full((8, 8), 2.0, device="cuda"))
    assert model(x).tolist() == [[16.0] * 8]
    assert [d["captured"] for d in graphed.decisions] == [True, False, True], graphed.decisions


def test_outputs_survive_the_next_call_also_on_another_stream() -> None:
    model = mlp()
    xs = [torch.randn(256, 64, device="cuda") for _ in range(8)]
    expected = [model(x) for x in xs]
    graphed = wrap(model)
    for x in xs[:2]:
        model(x)
    assert [d["captured"] for d in graphed.decisions] == [True, True], graphed.decisions
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    outputs = []
    for index, x in enumerate(xs):
        with torch.cuda.stream(streams[index % 2]):
            outputs.append(model(x))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_a_graph_that_is_not_worth_it_is_dropped() -> None:
    model = nn.Linear(4096, 4096, bias=False).cuda().half()
    graphed = wrap(model, min_speedup=100.0)
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.float16)
    expected = model._call_impl(x)
    assert torch.equal(model(x), expected)
    assert graphed.decisions[0]["captured"] is False
    print(graphed.decisions[0])


def test_autocast_casts_are_not_left_uncomputed() -> None:
    model = mlp()
    x = torch.randn(4, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        expected = model(x)
        graphed = wrap(model)
        first, second = model(x), model(x)
        plain = model._call_impl(x)
    assert graphed.decisions[0]["captured"], graphed.decisions
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert torch.equal(plain, expected)


def test_an_argument_on_the_cpu_goes_straight_through() -> None:
    class Move(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cuda() + 1

    model = Move()
    graphed = wrap(model)
    assert model(torch.ones(3)).tolist() == [2.0] * 3
    assert graphed.decisions[0]["reason"] == "an argument is on cpu"
