"""Capture with real CUDA graphs. By hand on a GPU machine: python -m pytest -n 0 tests/unit/graph/test_capture_gpu.py"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.graph import trial
from kernel_pytorch.graph.capture import graph_calls
from kernel_pytorch.graph.graphed_call import GraphedCall
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.recorder import CudaRecorder
from kernel_pytorch.graph.signature import at_addresses, pointers
from kernel_pytorch.graph.strategy import terms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def wrap(model: nn.Module, min_speedup: float = 0.0, tries_eager: bool = False) -> GraphedCall:
    """min_speedup 0 keeps every graph, so that what is tested does not depend on a timing; nor does the code that it is of."""
    recorder = CudaRecorder(torch.device("cuda", 0))
    asked = dataclasses.replace(terms(GraphDeploymentStrategy.aggressive, min_speedup), tries_eager=tries_eager)
    return graph_calls(model, CUDAGraphManager(recorder, asked, num_warmup_calls=3))


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
    # One for the first call's addresses, one that copies in; where copies measure too slow, others for addresses that come back.
    assert 2 <= len(graphed.decisions) <= 4, graphed.decisions
    assert all(decision["captured"] for decision in graphed.decisions), graphed.decisions
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


def test_arguments_on_the_cpu_are_sent_and_may_change_at_once() -> None:
    class Select(nn.Module):
        def forward(self, x: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x[:, columns.to(x.device)] * scale

    model = Select()
    graphed = wrap(model)
    x = torch.arange(64.0, device="cuda").reshape(4, 16)
    columns, scale = torch.zeros(2, dtype=torch.int64), torch.tensor(1.0)
    outputs = []
    # More calls than blocks of pinned memory, and nothing is waited for in between.
    for step in range(50):
        columns.copy_(torch.tensor([step % 16, (step + 3) % 16]))
        scale.fill_(float(step))
        outputs.append(model(x, columns, scale))
    for step, out in enumerate(outputs):
        assert torch.equal(out, x[:, [step % 16, (step + 3) % 16]] * float(step)), step
    assert [d["captured"] for d in graphed.decisions] == [True], graphed.decisions
    assert graphed.decisions[0]["copied_bytes"] == 20


@pytest.mark.parametrize("compiled", [False, True])
def test_what_the_model_holds_on_the_cpu_is_moved_once(compiled: bool) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.index = torch.tensor([1, 0])
            self.temperature = torch.tensor(0.7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x[:, self.index] * 2).tanh() / self.temperature

    model = Pairs()
    x = torch.randn(4, 2, device="cuda")
    expected = model(x)
    if compiled:
        model.compile()
    graphed = wrap(model)
    for _ in range(3):
        assert torch.allclose(model(x), expected, rtol=1e-6)
    assert model.index.is_cuda
    assert model.temperature.is_cuda
    assert graphed.decisions[0]["captured"], graphed.decisions
    assert graphed.decisions[0]["placement_relative_l2"] < 2e-6
    model.temperature.fill_(1.4)
    assert torch.allclose(model(x), expected / 2, rtol=1e-5)


class Broken(nn.Module):
    """A wait in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(), mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x) * (1.0 + 0.0 * x.sum().item())


@pytest.mark.parametrize("compiled", [False, True])
def test_pieces_of_a_call_with_a_wait_in_it(compiled: bool) -> None:
    model = Broken()
    xs = [torch.randn(4, 64, device="cuda") for _ in range(3)]
    if compiled:
        model.compile()
    expected = [model(x) for x in xs]
    graphed = wrap(model)
    if compiled:
        # Regions are found when they are compiled.
        torch._dynamo.reset()
    for step in range(120):
        assert torch.allclose(model(xs[step % 3]), expected[step % 3], atol=1e-5), step
    print(graphed.decisions)
    whole = [decision for decision in graphed.decisions if decision["inputs"] == "whole call"]
    assert len(whole) == 1
    names = whole[0].get("pieces", [])
    assert names == (["first", "second"] if not compiled else names)
    print("pieces", names, whole[0])


def test_graphs_over_the_budget_leave_and_their_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every graph has a buffer for its argument, which moves, however much that costs beside the rest.
    monkeypatch.setattr(trial, "_COSTLY", float("inf"))
    torch.cuda.empty_cache()
    model = nn.ReLU()
    recorder = CudaRecorder(torch.device("cuda", 0))
    budget = 40 * 2**20
    manager = CUDAGraphManager(recorder, terms(GraphDeploymentStrategy.aggressive, 0.0), num_warmup_calls=3, memory_budget_bytes=budget)
    graph_calls(model, manager)
    xs = [torch.randn(2**20 + i, device="cuda") for i in range(40)]
    for x in xs:
        for moved in (x, x.clone()):
            assert torch.equal(model(moved), x.clamp(min=0))
    before = torch.cuda.memory_allocated()
    assert manager.statistics["evictions"] >= 20
    assert manager.statistics["held_bytes"] <= budget
    manager.decisions.clear()
    for x in xs:
        assert torch.equal(model(x), x.clamp(min=0))
    assert torch.cuda.memory_allocated() <= before + 8 * 2**20


def test_buffers_in_turns_have_a_graph_each_where_copies_cost() -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.mean(0, keepdim=True)
            for _ in range(12):
                y = y * 1.01 + 0.01
            return y

    model = Mean()
    xs = [torch.randn(4096, 16384, device="cuda") for _ in range(3)]
    expected = [model(x) for x in xs]
    before = torch.cuda.memory_allocated()
    # A copy of 256 MB costs what launching 25 kernels costs, give or take 5 %; without it a replay is twice as fast.
    graphed = wrap(model, min_speedup=1.3)
    for _ in range(8):
        for x, y in zip(xs, expected, strict=True):
            assert torch.equal(model(x), y)
    print(graphed.decisions, graphed.manager.statistics)
    assert torch.cuda.memory_allocated() - before < xs[0].nbytes // 2


def test_a_graph_keeps_the_workspace_that_its_products_use() -> None:
    """torch.compile's own graphs give back every cuBLAS workspace of the process before they record, and the memory to the device."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.ReLU()))).cuda()
    graphed = wrap(model, min_speedup=0.0)
    x = torch.randn(64, 256, device="cuda")
    with torch.inference_mode():
        expected = model(x).clone()
    assert graphed.manager.statistics["captures"] == 1
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(model(x), expected)
    torch.cuda.synchronize()
    assert graphed.manager.statistics["replays"] >= 3


def test_a_model_that_raises_while_it_is_recorded_harms_nothing() -> None:
    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            if torch.cuda.is_current_stream_capturing():
                raise ValueError("not while capturing")
            return y * 2

    model = Raises()
    graphed = wrap(model)
    x = torch.ones(4, device="cuda")
    assert [model(x).tolist() for _ in range(2)] == [[4.0] * 4] * 2
    assert graphed.decisions[0]["reason"] == "capture failed: not while capturing"
    assert not torch.cuda.is_current_stream_capturing()
    other = mlp()
    y = torch.randn(4, 64, device="cuda")
    expected = other(y)
    decisions = wrap(other).decisions
    assert [torch.equal(other(y), expected) for _ in range(2)] == [True, True]
    assert decisions[0]["captured"]


def test_threads_with_streams_of_their_own_get_their_own_answers() -> None:
    model = mlp()
    inputs = {number: [torch.randn(4, 64, device="cuda") for _ in range(30)] for number in range(3)}
    expected = {number: [model(x) for x in xs] for number, xs in inputs.items()}
    graphed = wrap(model)
    for x in inputs[0][:3]:
        model(x)
    torch.cuda.synchronize()
    found: dict[int, list[torch.Tensor]] = {}

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            found[number] = [model(x) for x in inputs[number]]
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outputs in expected.items():
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[number], outputs, strict=True))
    assert graphed.manager.statistics["replays"] > 0


def test_a_cache_is_put_right_when_weights_were_replaced_between_calls() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, device="cuda"))

        def forward(self, cache: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            cache.index_copy_(0, position, self.weight[None] * 3)
            return cache.sum(0)

    model = Writes()
    graphed = wrap(model)
    cache, position = torch.zeros(3, 2, device="cuda"), torch.tensor([1], device="cuda")
    for value in (1.0, 2.0, 3.0):
        model.weight = nn.Parameter(torch.full((2,), value, device="cuda"))
        for _ in range(3):
            assert model(cache, position).tolist() == [value * 3] * 2
        assert cache.tolist() == [[0.0, 0.0], [value * 3] * 2, [0.0, 0.0]]
    assert graphed.manager.statistics["replays"] >= 6


def test_addresses_are_compared_alike_in_cpp_and_python() -> None:
    tensors = [torch.zeros(4, device="cuda") for _ in range(3)]
    at = pointers(tensors)
    assert at_addresses(tensors, at, [0, 1, 2])
    assert at_addresses([*tensors[:2], torch.zeros(4, device="cuda")], at, [0, 1])
    assert not at_addresses([*tensors[:2], torch.zeros(4, device="cuda")], at, [0, 1, 2])
    assert at_addresses([], [], [])


class Recurrent(nn.Module):
    """Fifty small steps, one after the other. history: the states, written in place; num_calls is counted up."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(64, 64)
        self.register_buffer("history", torch.zeros(50, 4, 64))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        for step in range(50):
            state = self.cell(x[step], state)
            self.history[step].copy_(state)  # pyright: ignore[reportIndexIssue]
        self.num_calls.add_(1)  # pyright: ignore[reportCallIssue]
        return state


def test_the_faster_of_compiled_and_eager_code_is_kept() -> None:
    torch.manual_seed(0)
    model = Recurrent().cuda().eval()
    x, state = torch.randn(50, 4, 64, device="cuda"), torch.zeros(4, 64, device="cuda")
    eager = model(x, state)
    model.compile()
    compiled = model(x, state)
    graphed = wrap(model, tries_eager=True)
    random, num_calls = torch.cuda.get_rng_state(), int(model.num_calls)  # pyright: ignore[reportArgumentType]
    outputs = [model(x, state) for _ in range(3)]
    decision = graphed.decisions[0]
    print(decision)
    assert decision["captured"], graphed.decisions
    assert decision["compiled_replay_ms"] > 0
    assert decision["eager_replay_ms"] > 0
    assert decision["eager_relative_l2"] < 1e-4
    expected = {"compiled": compiled, "eager": eager}[decision["code"]]
    assert all(torch.allclose(out, expected, rtol=0.0, atol=1e-5) for out in outputs)
    assert torch.allclose(model.history[-1], expected, rtol=0.0, atol=1e-5)  # pyright: ignore[reportIndexIssue, reportArgumentType]
    assert int(model.num_calls) == num_calls + 3  # pyright: ignore[reportArgumentType]
    assert torch.equal(torch.cuda.get_rng_state(), random)
    other = torch.randn(50, 4, 64, device="cuda")
    assert torch.allclose(model(other, state), graphed.plain(other, state), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("strategy", list(GraphDeploymentStrategy))
def test_strategies_choose_by_what_they_measure(strategy: GraphDeploymentStrategy) -> None:
    def wrapped(model: nn.Module) -> Any:
        return graph_calls(model, CUDAGraphManager(CudaRecorder(torch.device("cuda", 0)), terms(strategy), num_warmup_calls=3))

    small, large = mlp(), nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(8)]).cuda().bfloat16()
    x, y = torch.randn(64, 64, device="cuda"), torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    graphs = [wrapped(small), wrapped(large)]
    for _ in range(8):
        small(x)
        large(y)
    print(strategy.value, *[decision for graphed in graphs for decision in graphed.decisions], sep="\n")
    assert graphs[0].decisions[0]["captured"]
    assert graphs[0].decisions[0]["plain_row_ms"] > graphs[0].decisions[0]["replay_row_ms"]
