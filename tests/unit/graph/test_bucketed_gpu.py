"""Padding around real CUDA graphs. By hand on a GPU machine: python -m pytest -n 0 -s tests/unit/graph/test_bucketed_gpu.py"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.choices import BucketStrategy, GraphDeploymentStrategy
from kernel_pytorch.graph.bucketed_call import BucketedCall
from kernel_pytorch.graph.capture import bucket_calls, graph_calls
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.recorder import CudaRecorder
from kernel_pytorch.graph.strategy import terms
from kernel_pytorch.schema import BucketingConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = (17, 24, 31, 37, 45, 52, 60, 77, 90, 101, 115, 127)


class Encoder(nn.Module):
    """A small text encoder with a mask of [B, T]; returns hidden states and a masked mean."""

    def __init__(self, num_layers: int = 4, dim: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, dim)
        layers = [nn.TransformerEncoderLayer(dim, 4, 2 * dim, batch_first=True, dropout=0.0, norm_first=True) for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x, hidden = self.embedding(input_ids), attention_mask == 0
        for layer in self.layers:
            # Not the fused path of inference, which packs rows by their mask, on the host.
            x = x + layer._sa_block(layer.norm1(x), None, torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, float("-inf")))
            x = x + layer._ff_block(layer.norm2(x))
        weights = attention_mask[..., None].to(x.dtype)
        return {"hidden": x, "pooled": (x * weights).sum(1) / weights.sum(1)}


def make(dtype: torch.dtype) -> Encoder:
    torch.manual_seed(0)
    return Encoder().to("cuda", dtype).eval()


def graphs(model: nn.Module) -> Any:
    """min_speedup 0 keeps every graph, so that what is tested does not depend on a timing."""
    recorder = CudaRecorder(torch.device("cuda", 0))
    manager = CUDAGraphManager(recorder, terms(GraphDeploymentStrategy.aggressive, 0.0), num_warmup_calls=3)
    return graph_calls(model, manager)


def padded(model: nn.Module, **bucketing: Any) -> BucketedCall:
    return bucket_calls(model, graphs(model), ["input_ids:1", "attention_mask:1"], BucketingConfig(**bucketing), 64)


def inputs(length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(4, length, dtype=torch.int64, device="cuda")
    mask[1, length // 2 :] = 0
    return {"input_ids": torch.randint(0, 1000, (4, length), device="cuda"), "attention_mask": mask}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).double().norm() / expected.double().norm()).item()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twelve_lengths_are_a_graph_a_bucket_and_come_back_as_they_are(dtype: torch.dtype) -> None:
    model = make(dtype)
    calls = [inputs(length) for length in LENGTHS]
    expected = [model._call_impl(**given) for given in calls]
    bucketed = padded(model)
    for _ in range(3):
        for given, wanted in zip(calls, expected, strict=True):
            actual = model(**given)
            for name in ("hidden", "pooled"):
                assert actual[name].shape == wanted[name].shape
                assert actual[name].stride() == wanted[name].stride()
                assert relative(actual[name], wanted[name]) < (1e-5 if dtype is torch.float32 else 2e-2)
    rows = {row["sizes"]["size"]: row for row in bucketed.report["buckets"]}
    assert {size: row["captures"] for size, row in rows.items()} == {32: 1, 64: 1, 128: 1}, bucketed.report
    assert all("check" in row for row in rows.values()), bucketed.report
    print(bucketed.report, bucketed.waste)


def test_kept_graphs_are_fewer_and_take_what_the_largest_one_does() -> None:
    """Without padding too: outputs and what a call needs while it runs are memory that all graphs share."""
    held = {}
    for name in ("padded", "not padded"):
        gc.collect()
        torch.cuda.empty_cache()
        model = make(torch.bfloat16)
        graphed = padded(model)._inner if name == "padded" else graphs(model)
        for _ in range(2):
            for length in LENGTHS:
                model(**inputs(length))
        held[name] = (graphed.manager.statistics["captures"], graphed.manager.statistics["held_bytes"])  # pyright: ignore[reportFunctionMemberAccess]
        del model, graphed
    print(held)
    assert held["padded"][0] < held["not padded"][0]
    assert held["padded"][1] == pytest.approx(held["not padded"][1], rel=0.05)


def test_calls_on_two_streams_do_not_overwrite_each_others_inputs() -> None:
    model = make(torch.float32)
    calls = [inputs(60 - index) for index in range(8)]
    expected = [model._call_impl(**given) for given in calls]
    padded(model)
    for given in calls[:2]:
        model(**given)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    outputs = []
    for index, given in enumerate(calls):
        with torch.cuda.stream(streams[index % 2]):
            outputs.append(model(**given))
    torch.cuda.synchronize()
    for actual, wanted in zip(outputs, expected, strict=True):
        assert relative(actual["hidden"], wanted["hidden"]) < 1e-5


def test_a_model_without_a_mask_is_refused_and_stays_right() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(*[self.linear(x)[:, None]] * 3)

    model = Mixes().cuda().half()
    bucketed = bucket_calls(model, graphs(model), ["x:1"], BucketingConfig(), 64)
    x = torch.randn(2, 50, 64, device="cuda", dtype=torch.float16)
    for _ in range(3):
        assert relative(model(x), model._call_impl(x)) < 1e-3
    assert all("refused" in row for row in bucketed.report["buckets"]), bucketed.report


@pytest.mark.parametrize("strategy", list(BucketStrategy))
def test_every_strategy_is_right_and_says_what_it_costs(strategy: BucketStrategy) -> None:
    model = make(torch.bfloat16)
    bucketed = padded(model, strategy=strategy, fit_after=24, num_buckets=4, max_size=128, step=32, growth=1.5)
    for _ in range(4):
        for length in LENGTHS:
            given = inputs(length)
            assert relative(model(**given)["pooled"], model._call_impl(**given)["pooled"]) < 2e-2
    captures = sum(row["captures"] for row in bucketed.report["buckets"])
    print(strategy.value, bucketed.report["sizes"], f"waste {bucketed.waste:.3f}, {captures} captures", bucketed.report["straight"])
    assert captures > 0


def test_overhead_of_padding_in_microseconds() -> None:
    """Prints, asserts nothing: a call of a bucket through padding, the same call of the bucket's own size, and the plain call."""
    model = make(torch.bfloat16)
    bucketed = padded(model)
    own, short = inputs(64), inputs(60)
    recorder = bucketed._inner.manager.recorder  # pyright: ignore[reportFunctionMemberAccess]
    for _ in range(20):
        model(**short)
        model(**own)
    for name, call in (
        ("padded", lambda: model(**short)),
        ("fits", lambda: model(**own)),
        ("graph alone", lambda: bucketed._inner(**own)),
        ("plain", lambda: model._call_impl(**short)),
    ):
        print(name, sorted(recorder.milliseconds(call, 50) * 1e3 for _ in range(9))[4])
