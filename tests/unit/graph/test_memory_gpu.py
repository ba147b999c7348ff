"""Memory that real CUDA graphs read by its address. By hand on a GPU machine: python -m pytest -n 0 tests/unit/graph/test_memory_gpu.py"""

from __future__ import annotations

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
from kernel_pytorch.graph.strategy import terms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def wrap(model: nn.Module) -> GraphedCall:
    """Keeps every graph, so that what is tested does not depend on a timing."""
    recorder = CudaRecorder(torch.device("cuda", 0))
    return graph_calls(model, CUDAGraphManager(recorder, terms(GraphDeploymentStrategy.aggressive, 0.0), num_warmup_calls=3))


def products() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.ReLU()))).cuda()


def give_back_workspaces() -> None:
    """As torch.compile's own graphs do before they record."""
    torch._C._cuda_clearCublasWorkspaces()  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield
    torch.cuda.synchronize()


def test_the_workspace_of_a_pool_that_follows_another_lies_in_it() -> None:
    model = products()
    x = torch.randn(64, 256, device="cuda")
    expected = model(x)
    graphed = wrap(model)
    for _ in range(4):
        assert torch.equal(model(x), expected)
        give_back_workspaces()
        for _ in range(3):
            assert torch.equal(model(x), expected)
        # The last graph goes, and its pool.
        graphed.close()
        give_back_workspaces()
    assert graphed.manager.statistics["captures"] == 4


def test_graphs_of_a_pool_outlive_those_recorded_before_them() -> None:
    """torch gives back what cuBLAS had for a stream when any graph that was recorded on the stream ends."""
    model = products()
    graphed = wrap(model)
    xs = [torch.randn(rows, 256, device="cuda") for rows in (16, 32, 64)]
    expected = [model.forward(x) for x in xs]
    for x in xs:
        model(x)
    manager = graphed.manager
    for kind, _ in manager._all()[:2]:
        manager.drop(kind)
    give_back_workspaces()
    junk = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(8)]
    for _ in range(3):
        assert torch.equal(model(xs[2]), expected[2])
    assert all(bool(tensor.isnan().all()) for tensor in junk)


class Synchronizes(nn.Module):
    """CUDA itself refuses this, and the capture is lost."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 2
        torch.cuda.synchronize()
        return y


def test_after_a_failed_capture_torch_allocates_and_frees_as_before() -> None:
    model, x = products(), torch.randn(64, 256, device="cuda")
    expected = model(x)
    graphed = wrap(model)
    model(x)
    wrap_broken = wrap(Synchronizes())
    assert torch.equal(wrap_broken.model(x), x + 2)
    assert wrap_broken.decisions[0]["reason"].startswith("capture failed: ")
    # Both raise where the allocator believes that a capture goes on.
    torch.cuda.empty_cache()
    block = torch.empty(2**20, device="cuda")
    stream = torch.cuda.Stream()
    block.record_stream(stream)
    del block
    torch.cuda.synchronize()
    own = torch.cuda.CUDAGraph()
    with torch.cuda.graph(own):
        y = x * 3
    pools = {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot() if _inside(segment, y)}
    assert pools == {own.pool()}
    own.replay()
    assert torch.equal(y, x * 3)
    assert torch.equal(model(x), expected)
    assert graphed.manager.statistics["replays"] > 0


def _inside(segment: dict[str, Any], tensor: torch.Tensor) -> bool:
    return segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]


def test_buffers_let_go_of_while_another_stream_uses_them_are_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    # However much a copy costs beside the rest: no address is to get a graph of its own.
    monkeypatch.setattr(trial, "_COSTLY", float("inf"))
    model = nn.ReLU()
    graphed = wrap(model)
    xs = [torch.randn(2**20, device="cuda") for _ in range(3)]
    for x in xs:
        model(x)
    assert graphed.decisions[-1]["copied_bytes"] == xs[0].nbytes, graphed.decisions
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(1_000_000_000)
        out = model(xs[0].clone())
    graphed.close()
    junk = [torch.full_like(xs[0], torch.nan) for _ in range(4)]
    torch.cuda.synchronize()
    assert all(bool(tensor.isnan().all()) for tensor in junk)
    assert torch.equal(out, xs[0].clamp(min=0))


def test_streams_that_others_draw_next_are_not_the_one_that_records() -> None:
    model, x = products(), torch.randn(64, 256, device="cuda")
    graphed = wrap(model)
    model(x)
    recorder = graphed.manager.recorder
    assert isinstance(recorder, CudaRecorder)
    assert recorder._stream not in [torch.cuda.Stream() for _ in range(8)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_device_is_not_recorded() -> None:
    model = products().to("cuda:1")
    graphed = wrap(model)
    for _ in range(3):
        x = torch.randn(64, 256, device="cuda:1")
        assert torch.equal(model(x), model.forward(x))
    # Its submodules are tried one by one after it: those of a model on two devices may be on this one.
    assert graphed.decisions[0]["reason"] == "the call uses memory of cuda:1; graphs are made on cuda:0"
    assert not any(decision["captured"] for decision in graphed.decisions)


def test_host_memory_that_the_call_makes_is_not_read_again_after_it() -> None:
    class Sends(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.full((4,), 3.0).pin_memory().to(x.device, non_blocking=True)

    model, x = Sends(), torch.ones(4, device="cuda")
    graphed = wrap(model)
    for _ in range(3):
        junk = [torch.full((4,), 7.0).pin_memory() for _ in range(8)]
        assert model(x).tolist() == [3.0] * 4
        del junk
    assert graphed.decisions[0]["reason"].startswith("the call takes host memory that the model does not hold"), graphed.decisions


class Widens(nn.Module):
    """float32 [N] to [N, 2**20]: an output beside which nothing else counts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, None] * torch.arange(2**20, device=x.device, dtype=x.dtype)


def test_outputs_of_all_graphs_share_memory_and_callers_keep_theirs() -> None:
    model = Widens()
    graphed = wrap(model)
    xs = [torch.full((rows,), float(rows), device="cuda") for rows in (8, 7, 6, 5)]
    kept = [model(x) for x in xs for _ in range(2)]
    torch.cuda.synchronize()
    recorder = graphed.manager.recorder
    assert isinstance(recorder, CudaRecorder)
    of_pool = [row["total_size"] for row in torch.cuda.memory_snapshot() if row["segment_pool_id"] == tuple(recorder._pool)]
    # The largest output is 32 MB, what it is made of 4, which torch takes 20 for; the four outputs together would be 104.
    assert sum(of_pool) <= 64 * 2**20, of_pool
    assert graphed.manager.statistics["captures"] == 4
    assert [decision["held_bytes"] for decision in graphed.decisions] == [
        x.nbytes if d["copied_bytes"] else 0 for x, d in zip(xs, graphed.decisions, strict=True)
    ]
    for _ in range(3):
        kept += [model(x) for x in reversed(xs)]
    column = torch.arange(2**20, device="cuda", dtype=torch.float32)
    assert graphed.manager.statistics["replays"] >= 12
    assert all(torch.equal(y, len(y) * column.expand(len(y), -1)) for y in kept)


class Layouts(nn.Module):
    """Outputs of many types and layouts, some of one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = (torch.arange(4.0, device="cuda"),)

    def forward(self, x: torch.Tensor) -> Any:
        y = x * 2
        z = torch.complex(x, y)
        return (
            y,
            y[1:, ::2],
            y.t(),
            x.bfloat16() + 1,
            x > 0,
            z,
            z.conj(),
            (x.half() * 3).to(torch.float8_e4m3fn),
            x.new_zeros(0),
            self.constant[0],
            y.sum(),
        )


def test_outputs_of_every_layout_are_what_the_call_returns() -> None:
    model = Layouts()
    graphed = wrap(model)
    xs = [torch.randn(6, rows, device="cuda") for rows in (8, 4)]
    expected = [model.forward(x) for x in xs]
    for _ in range(3):
        for x, outputs in zip(xs, expected, strict=True):
            for given, wanted in zip(model(x), outputs, strict=True):
                # What skips over memory comes back without the gaps, as clones do.
                assert (given.dtype, given.shape, given.stride()) == (wanted.dtype, wanted.shape, wanted.clone().stride())
                assert torch.equal(
                    given.float() if given.dtype == torch.float8_e4m3fn else given,
                    wanted.float() if wanted.dtype == torch.float8_e4m3fn else wanted,
                )
    assert (graphed.manager.statistics["captures"], [d["captured"] for d in graphed.decisions]) == (2, [True, True])


def test_an_output_that_was_there_before_stays_alive_with_the_graph() -> None:
    """Nothing of the call touches it, so nothing but the output says that it is used."""

    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.given = [torch.full((2**20,), 5.0, device="cuda")]

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * 2 + 1 - x, self.given[0]

    model = Gives()
    graphed = wrap(model)
    x = torch.ones(2**20, device="cuda")
    for _ in range(2):
        model(x)
    assert graphed.manager.statistics["captures"] == 1
    graph = graphed.manager._all()[0][1]
    del model.given[0]
    junk = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(4)]
    outputs = graph.run([x])
    assert (outputs[0].sum().item(), outputs[1].sum().item()) == (2.0 * 2**20, 5.0 * 2**20)
    assert all(bool(tensor.isnan().all()) for tensor in junk)
