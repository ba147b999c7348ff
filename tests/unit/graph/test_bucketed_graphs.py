"""Padding around a GraphedCall: one graph a bucket, of inputs that stay where they are; from a recipe's keys to the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from kernel_pytorch.choices import BucketStrategy, GraphDeploymentStrategy
from kernel_pytorch.graph.bucketed_call import BucketedCall
from kernel_pytorch.graph.capture import CaptureWholeCall, bucket_calls
from kernel_pytorch.recipe.compose import compose
from kernel_pytorch.schema import BucketingConfig


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.linear = nn.Linear(16, 16)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear(self.embedding(input_ids))


class Flattens(Tokens):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids).flatten(0, 1)


class Waits(Tokens):
    """Cannot be recorded as a whole; its layers can."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.GELU())])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert int(input_ids.max()) < 50
        return super().forward(input_ids)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def around(model: nn.Module, wrap: Callable[..., Any], **bucketing: Any) -> tuple[BucketedCall, Any]:
    graphed, recorder = wrap(model.eval())
    return bucket_calls(model, graphed, ["input_ids:1"], BucketingConfig(**bucketing), None), recorder


def ids(length: int) -> torch.Tensor:
    return torch.randint(0, 50, (2, length))


def test_one_graph_serves_a_bucket(wrap: Callable[..., Any]) -> None:
    model = Tokens()
    call, recorder = around(model, wrap)
    for length in (9, 10, 11, 12, 13, 14, 15, 16, 5, 6, 7):
        x = ids(length)
        actual = model(x)
        assert actual.shape == (2, length, 16)
        assert torch.allclose(actual, model._call_impl(x), atol=1e-6)
    assert recorder.num_recorded == 2
    rows = call.report["buckets"]
    assert [(row["sizes"]["size"], row["captures"], row["num_calls"]) for row in rows] == [(16, 1, 7), (8, 1, 2)]
    # Nothing is copied twice: the graph reads the padded memory itself.
    assert [decision["copied_bytes"] for decision in call._inner.decisions] == [0, 0]  # pyright: ignore[reportFunctionMemberAccess]
    json.dumps(call.report)


def test_without_padding_every_size_is_a_graph(wrap: Callable[..., Any]) -> None:
    model = Tokens()
    _, recorder = wrap(model.eval())
    for length in (9, 10, 11, 12, 13, 14, 15, 16, 5, 6, 7):
        model(ids(length))
    assert recorder.num_recorded == 11


def test_outputs_are_kept_from_the_next_call(wrap: Callable[..., Any]) -> None:
    model = Tokens()
    around(model, wrap)
    xs = [ids(length) for length in (12, 13, 14, 16, 15)]
    outputs = [model(x) for x in xs]
    for x, output in zip(xs, outputs, strict=True):
        assert torch.allclose(output, model._call_impl(x), atol=1e-6)


def test_what_must_not_be_padded_gets_graphs_of_its_own_sizes(wrap: Callable[..., Any]) -> None:
    model = Flattens()
    call, recorder = around(model, wrap)
    x = ids(12)
    for _ in range(4):
        assert torch.allclose(model(x), model._call_impl(x), atol=1e-6)
    assert recorder.num_recorded == 1
    assert recorder.num_replays >= 3
    assert call.report["buckets"][0]["refused"] == "dim 0 of output 0 is 24 where size is 12, and 32 where it is 16: it cannot be cut"


def test_pieces_are_captured_for_buckets_and_left_out_of_checks(wrap: Callable[..., Any]) -> None:
    model = Waits()
    call, recorder = around(model, wrap)
    for length in (12, 13, 14, 15, 16, 12, 13, 5, 6, 7, 12, 6):
        x = ids(length)
        assert torch.allclose(model(x), model.linear._call_impl(model.embedding._call_impl(x)), atol=1e-6)
    assert {row["sizes"]["size"]: row["num_calls"] for row in call.report["buckets"]} == {16: 7, 8: 3}
    decisions = call._inner.decisions  # pyright: ignore[reportFunctionMemberAccess]
    captured = {(d["module"], d["inputs"]) for d in decisions if d["captured"] and "module" in d}
    assert captured == {("linear", "float32[2, 16, 16]"), ("linear", "float32[2, 8, 16]")}
    assert recorder.num_replays > 0


def test_a_model_that_went_to_training_never_sees_padding(wrap: Callable[..., Any], Rerun: Any) -> None:
    """Its graph of a padded call is there, and is launched before the model is looked at."""

    class Traced(Rerun):
        """Replays the operations of the recorded call, and not what the model would do now."""

        def record(self, call: Callable[[], Any]) -> Any:
            return super().record(make_fx(lambda: call())())

    with torch.inference_mode(False), torch.no_grad():
        model, twin = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
        twin.load_state_dict(model.state_dict())
        twin.eval()
        _, recorder = around_linear(model, wrap, Traced())
        for training in (False, True, False, True, False):
            model.train(training)
            twin.train(training)
            for size in (5, 6, 7, 8, 5, 6, 8, 7):
                x = torch.randn(size, 4)
                assert torch.allclose(model(x), twin(x), atol=1e-6)
            for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
                assert torch.allclose(mine, other, atol=1e-6)
        assert recorder.num_replays > 0


def test_weights_and_submodules_that_are_swapped_count_in_the_next_call(wrap: Callable[..., Any]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        _, recorder = around_linear(model, wrap)
        for step in range(6):
            for size in (5, 6, 7, 8, 5):
                x = torch.randn(size, 4)
                assert torch.allclose(model(x), model._call_impl(x), atol=1e-6)
            if step == 1:
                model[0].weight.fill_(0.5)
            if step == 2:
                model[0] = nn.Linear(4, 4).eval()
            if step == 3:
                model[2].weight = nn.Parameter(torch.ones(4, 4))
        assert recorder.num_replays > 10


def around_linear(model: nn.Module, wrap: Callable[..., Any], recorder: Any = None) -> tuple[BucketedCall, Any]:
    graphed, recorder = wrap(model.eval(), recorder)
    return bucket_calls(model, graphed, ["input:0"], BucketingConfig(), None), recorder


def test_a_recipes_keys_reach_the_step() -> None:
    config = compose(["graph=bucketed", "graph.bucketing.max_size=512"]).config.graph
    assert config.dynamic_dims == ["input_ids:1", "attention_mask:1"]
    assert (config.bucketing.strategy, config.bucketing.max_size, config.bucketing.growth) == (BucketStrategy.hardware_aware, 512, 1.5)
    step = CaptureWholeCall(
        strategy=GraphDeploymentStrategy.balanced,
        num_warmup_calls=3,
        min_speedup=None,
        memory_budget_bytes=None,
        dynamic_dims=config.dynamic_dims,
        bucketing=config.bucketing,
    )
    assert step.bucketing.max_size == 512
