"""A model that does not fit, from the plan to the verdict, on a device that is host memory with little room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.backends.detect import plan_backend
from kernel_pytorch.engine import child
from kernel_pytorch.engine.api import load as restored
from kernel_pytorch.engine.api import optimize
from kernel_pytorch.engine.explain import explain_plan
from kernel_pytorch.engine.run import Job, Run
from kernel_pytorch.errors import OutOfMemoryError, UnsupportedOperationError
from kernel_pytorch.memory.fetched import FetchedBlock
from kernel_pytorch.memory.offload import OffloadWeights
from kernel_pytorch.memory.streamed import StreamedBlock
from kernel_pytorch.models.decoder import DecoderSource
from kernel_pytorch.models.source import Loaded
from kernel_pytorch.optimizer import tensor_bytes
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.recipe.compose import compose
from kernel_pytorch.report.progress import Progress
from kernel_pytorch.report.result import Report
from kernel_pytorch.schema import BackendConfig

# The tiny decoder has 12.7 MB of weights in three layers of 2.8 MB.
SMALL = ["+recipe=eager", "memory=offload_weights", "model=decoder", "data.length=16", "measure.num_rounds=3", "measure.min_round_ms=0"]


@pytest.fixture
def make_run(monkeypatch: pytest.MonkeyPatch, lanes: Any, backend: Any):
    def make(capacity: int, *overrides: str) -> Run:
        monkeypatch.setattr(OffloadWeights, "lanes", lambda self, backend: lanes)
        backend.memory.capacity = capacity
        composed = compose([*SMALL, *overrides])
        return Run(Job(composed.config, composed.choices, composed.ignored, backend, True, ""), Report(), Progress(None))

    return make


def load(run: Run) -> Loaded:
    return child._load(run, run.plan()[0], DecoderSource())


def kinds(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_a_model_that_fits_is_loaded_as_ever(make_run) -> None:
    assert kinds(load(make_run(13_000_000)).model, FetchedBlock) == 0


def test_a_model_that_does_not_fit_stays_on_the_host_and_runs(make_run) -> None:
    run = make_run(10_500_000)
    loaded = load(run)
    assert kinds(loaded.model, FetchedBlock) == 3
    assert run.report.warnings[0].startswith("the model's 12,655,616 bytes stay on the host; 10,500,000 bytes were available: eager copies")
    with torch.inference_mode():
        expected = DecoderSource().load(data=None, seed=0, device=torch.device("cpu"))
        ids = torch.arange(8).view(1, 8)
        assert torch.equal(loaded.model(ids), expected.model(ids))


def test_without_room_for_the_slots_it_is_out_of_memory_with_both_figures(make_run) -> None:
    with pytest.raises(OutOfMemoryError, match="nor what memory=offload_weights leaves of it") as caught:
        load(make_run(9_000_000))
    assert 9_800_000 < caught.value.required_bytes < 10_500_000
    assert caught.value.available_bytes == 9_000_000


def test_without_offload_the_error_says_what_would_help(make_run) -> None:
    with pytest.raises(OutOfMemoryError, match="memory=offload_weights needs less"):
        load(make_run(9_000_000, "memory=none"))


def test_a_run_of_it_is_verified_and_timed_against_the_plain_way(make_run) -> None:
    run = make_run(10_500_000, "measure.require_gain=false")
    steps, plan = run.plan()
    loaded = child._load(run, steps, DecoderSource())
    model = run.execute(steps, plan, loaded.model, loaded.workload, name=loaded.name, inplace=False)
    assert run.report.verdict == "pass"
    assert kinds(model, StreamedBlock) == 3
    assert kinds(model, FetchedBlock) == 0
    assert run.report.verification.max_abs == 0
    row = next(row for row in run.report.steps if row.group == "memory")
    assert (row.changed, row.kernels, row.details["num_slots"]) == (3, ["streamed"], 2)
    assert [rung.name for rung in run.report.ladder] == ["eager", "compiled", "recipe"]
    assert run.report.model.bytes_before == 12_655_616
    # What is timed copied each block once a call, and was never late.
    assert row.details["copies"]["on_time"] > 0
    assert row.details["copies"]["late"] == 0


def test_steps_before_it_may_put_modules_into_blocks_on_the_host(make_run) -> None:
    run = make_run(10_500_000, "fusion=qkv", "measure=off", "measure.require_gain=false")
    steps, plan = run.plan()
    loaded = child._load(run, steps, DecoderSource())
    run.execute(steps, plan, loaded.model, loaded.workload, name=loaded.name, inplace=False)
    assert run.report.verdict == "pass"
    rows = {row.group: row for row in run.report.steps}
    assert (rows["fusion"].changed, rows["memory"].changed) == (15, 3)
    assert run.report.verification.implementation.passed


@pytest.mark.parametrize("option", ["int8_weight_only", "nvfp4", "int8_dynamic", "int8_static"])
def test_packed_weights_go_with_a_model_on_the_host_and_lessen_what_is_copied(make_run, option: str) -> None:
    run = make_run(10_500_000, f"precision={option}", "measure=off", "measure.require_gain=false")
    steps, plan = run.plan()
    loaded = child._load(run, steps, DecoderSource())
    model = run.execute(steps, plan, loaded.model, loaded.workload, name=loaded.name, inplace=False)
    assert run.report.verdict == ("emulated" if option == "nvfp4" else "pass")
    assert run.report.verification.implementation.passed
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    rows = {row.group: row for row in run.report.steps}
    assert rows["precision"].changed == len(packed) == 3 * 7
    share = rows["precision"].bytes_after / rows["precision"].bytes_before
    assert share == pytest.approx({"nvfp4": 4.5 / 32}.get(option, 8 / 32), rel=0.05)
    # Blocks have norms too, and tensors begin at multiples of 512 bytes.
    assert 1.0 <= rows["memory"].details["pinned_bytes"] / rows["precision"].bytes_after < 1.1


def test_formats_are_not_allocated_for_a_model_on_the_host(make_run) -> None:
    words = ["precision=nvfp4", "precision.allocation.strategy=layer_adaptive", "precision.allocation.effective_bits=6"]
    with pytest.raises(UnsupportedOperationError, match="layer_adaptive measures what layers tolerate on a model that is on"):
        load(make_run(10_500_000, *words, "precision.allocation.formats=[nvfp4,float8_e4m3fn]"))


def test_a_model_that_fits_gets_its_device_bytes_from_the_slots(make_run) -> None:
    run = make_run(10**12, "measure=off", "measure.require_gain=false")
    steps, plan = run.plan()
    loaded = child._load(run, steps, DecoderSource())
    run.execute(steps, plan, loaded.model, loaded.workload, name=loaded.name, inplace=False)
    offload = OffloadWeights(include=[], exclude=[], prefetch_depth=1, num_resident_blocks=0)
    row = next(row for row in run.report.steps if row.group == "memory")
    pinned = row.details["pinned_bytes"]
    # Host memory is the device here, so pinned memory counts as well.
    assert run.report.model.bytes_after == offload.device_bytes(loaded.model) + pinned
    assert row.bytes_before == sum(tensor_bytes(layer) for layer in loaded.model.layers)  # pyright: ignore[reportGeneralTypeIssues]


def planned(*overrides: str, device: str = "h100") -> tuple[dict[str, Any], str]:
    composed = compose(["+recipe=h100_bf16", "memory=offload_weights", *overrides])
    rows, outcome = explain_plan(composed.config, composed.choices, composed.ignored, device)
    return {row.group: row for row in rows}, outcome


def test_the_plan_leaves_capture_out_and_says_why() -> None:
    rows, outcome = planned("graph=auto", "compile=regional")
    assert outcome.startswith("native")
    assert rows["graph"].status == "not_applicable"
    assert rows["graph"].reason.startswith("left out: a graph holds one call, and offloaded weights are fetched across calls")
    assert rows["memory"].status == "planned"
    assert planned("graph=auto", "memory=none")[0]["graph"].status == "planned"


def test_the_plan_refuses_one_graph_around_fetches_and_notes_the_breaks() -> None:
    rows, outcome = planned("compile=default", "compile.fullgraph=true")
    assert outcome.startswith("unsupported: compile=default: compile.fullgraph=true: offloaded weights are fetched between the blocks")
    assert rows["compile"].support == "unsupported"
    rows, outcome = planned("compile=default")
    assert "compiled one by one, as by compile=regional" in rows["compile"].reason
    assert outcome.startswith("native")


def test_a_cpu_keeps_capture_and_compile_as_they_are() -> None:
    backend: Backend = plan_backend("cpu", BackendConfig())
    assert backend.facts.vendor == "cpu"
    composed = compose(["+recipe=eager", "memory=offload_weights", "graph=auto"])
    rows, _ = explain_plan(composed.config, composed.choices, composed.ignored, "cpu")
    assert {row.group: row.reason for row in rows}["memory"] == "not applicable on cpu"
    assert {row.group: row.status for row in rows}["graph"] == "planned"


@pytest.mark.parametrize("precision", ["none", "int8_weight_only"])
def test_an_offloaded_model_is_saved_and_loaded_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lanes: Any, backend: Any, precision: str
) -> None:
    monkeypatch.setattr(OffloadWeights, "lanes", lambda self, backend: lanes)
    monkeypatch.setattr(CpuBackend, "make_memory", lambda self: type(backend.memory)(self))
    model = DecoderSource().load(data=None, seed=0, device=torch.device("cpu")).model
    args = (torch.arange(64).view(2, 32),)
    overrides = ["memory=offload_weights", f"precision={precision}", "measure=off"]
    optimized = optimize(model, "eager", args=args, trained=False, overrides=overrides)
    expected = optimized.model(*args)
    optimized.save(tmp_path / "saved")
    other = DecoderSource().load(data=None, seed=1, device=torch.device("cpu")).model
    loaded = restored(tmp_path / "saved", other)
    assert kinds(loaded.model, StreamedBlock) == 3
    assert torch.equal(loaded.model(*args), expected)
    assert list(loaded.model.state_dict()) == list(optimized.model.state_dict())


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def test_the_backends_layout_leaves_convolutions_of_streamed_blocks_alone(
    monkeypatch: pytest.MonkeyPatch, lanes: Any, backend: Any
) -> None:
    monkeypatch.setattr(OffloadWeights, "lanes", lambda self, backend: lanes)
    monkeypatch.setattr(CpuBackend, "make_memory", lambda self: type(backend.memory)(self))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(*(ConvBlock() for _ in range(4))))
    args = (torch.randn(2, 3, 10, 10),)
    optimized = optimize(model, "eager", args=args, trained=False, overrides=["memory=offload_weights", "measure=off"])
    assert kinds(optimized.model, StreamedBlock) == 4
    layout = next(hook for hook in optimized.report.hooks if hook["name"] == "conv_layout")
    assert layout["after"]["num_convolutions"] == 1
    with torch.inference_mode():
        torch.testing.assert_close(optimized.model(*args), model(*args))


def test_an_attribute_that_holds_a_weight_goes_to_the_device_with_it() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
            self.__dict__["alias"] = self.first

    model = nn.Sequential(*(Aliased() for _ in range(3)), nn.Linear(4, 4))
    model.__dict__["head"] = model[3].weight
    step = OffloadWeights(include=[], exclude=[], prefetch_depth=1, num_resident_blocks=0)
    step.stage(model, torch.device("meta"))
    assert all(block.alias is block.first for block in model[:3])
    assert model.head is model[3].weight
    assert [model[0].first.device.type, model[0].other.device.type] == ["meta", "cpu"]
