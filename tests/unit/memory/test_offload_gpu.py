"""Offload on a CUDA device: equal bits over many calls, peak memory, a model larger than the memory allowed, and a control that fails."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.detect import resolve
from kernel_pytorch.engine.api import load, optimize
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.memory.lanes import CudaLanes, Mark
from kernel_pytorch.memory.offload import OffloadWeights
from kernel_pytorch.memory.streamed import StreamedBlock
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.models.llama import Llama, LlamaConfig
from kernel_pytorch.optimizer import Applied, Context
from kernel_pytorch.precision.quantize import QuantizeLinears
from kernel_pytorch.schema import ActivationConfig, BackendConfig, WeightConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MiB = 2**20
# 43 MB a layer in bf16, 41 MiB.
CONFIG = LlamaConfig(12, 1024, 16, 4, 6144, 1000, 64)
DEVICE = torch.device("cuda")


def llama(device: torch.device = DEVICE, config: LlamaConfig = CONFIG) -> Llama:
    model = Llama(config, dtype=torch.bfloat16, device=device)
    model.init_weights(0)
    return model.eval()


def offload(model: nn.Module, lanes: type[CudaLanes] = CudaLanes, depth: int = 1) -> Applied:
    backend = resolve(BackendConfig()).backend

    class Step(OffloadWeights):
        def lanes(self, backend: Any) -> CudaLanes:
            return lanes(backend.device)

    step = Step(include=[], exclude=[], prefetch_depth=depth, num_resident_blocks=0)
    with torch.no_grad():
        return step.apply(structural_clone(model), Context(backend, CallWorkload((torch.zeros(1, 4, dtype=torch.int64, device=DEVICE),))))


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1000, (1, length), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 2048])
def test_many_calls_in_a_row_give_the_resident_models_bits(depth: int, length: int) -> None:
    model = llama()
    applied = offload(model, depth=depth)
    ids = [tokens(length, seed) for seed in range(8)]
    with torch.inference_mode():
        expected = [model(each) for each in ids]
        # Nothing waits for the device between the calls.
        equal = [(applied.model(ids[call % 8]) == expected[call % 8]).all() for call in range(120)]
    assert all(flag.item() for flag in equal)
    assert applied.details["copies"]["late"] == 0


def test_two_streams_that_take_turns_give_the_same_bits() -> None:
    model = llama()
    applied = offload(model)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    ids = tokens(256)
    with torch.inference_mode():
        expected = model(ids)
        torch.cuda.synchronize()
        equal = []
        for call in range(60):
            with torch.cuda.stream(streams[call % 2]):
                equal.append((applied.model(ids) == expected).all())
        torch.cuda.synchronize()
    assert all(flag.item() for flag in equal)


class Slow(nn.Module):
    """Waits on the device, so that copies which do not wait for it overwrite its weight; and takes long to copy."""

    def __init__(self, value: float, cycles: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((16 * MiB,), value, device=DEVICE))
        self.cycles = cycles

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cycles:
            torch.cuda._sleep(self.cycles)
        return x + self.weight.amax() + self.weight.amin()


class NoWaitForUsers(CudaLanes):
    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Iterable[Mark]) -> Mark:
        return super().copy(source, target, ())


class NoWaitForCopies(CudaLanes):
    def wait(self, mark: Mark) -> None: ...


@pytest.mark.parametrize(("lanes", "cycles"), [(NoWaitForUsers, 100_000_000), (NoWaitForCopies, 0)])
def test_without_either_wait_the_answer_is_wrong(lanes: type[CudaLanes], cycles: int) -> None:
    model = nn.Sequential(*(Slow(float(2**index), cycles) for index in range(6)))
    x = torch.zeros(4, device=DEVICE)
    with torch.inference_mode():
        expected = model(x)
        right, wrong = offload(model), offload(model, lanes)
        assert all(torch.equal(right.model(x), expected) for _ in range(3))
        assert not all(torch.equal(wrong.model(x), expected) for _ in range(3))
        torch.cuda.synchronize()


def test_a_state_dict_that_is_loaded_while_a_call_computes_counts_in_the_next_one() -> None:
    model, other = (nn.Sequential(*(Slow(float(base**index), 50_000_000) for index in range(6))) for base in (2, 3))
    x = torch.zeros(4, device=DEVICE)
    with torch.inference_mode():
        expected, then = model(x), other(x)
        state = {name: value.cpu() for name, value in other.state_dict().items()}
        applied = offload(model)
        # Nothing waits for the device in between.
        first = applied.model(x)
        applied.model.load_state_dict(state)
        second = applied.model(x)
        assert torch.equal(first, expected)
        assert torch.equal(second, then)


class Gives(Slow):
    """Its weight is looked at when other blocks have come to its slot."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), self.weight[:4]


class Collects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Gives(float(2**index), 10_000_000) for index in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = []
        for layer in self.layers:
            x, weight = layer(x)
            given.append(weight)
        return x + torch.stack(given).sum(0)


def test_weights_that_a_block_returns_outlive_its_slot() -> None:
    model = Collects()
    x = torch.zeros(4, device=DEVICE)
    with torch.inference_mode():
        expected = model(x)
        applied = offload(model)
        assert all(torch.equal(applied.model(x), expected) for _ in range(3))


def test_only_the_slots_and_the_rest_are_on_the_device() -> None:
    with torch.inference_mode():
        # Libraries take their workspaces once.
        llama(config=replace(CONFIG, num_layers=1))(tokens(16))
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = llama()
    whole = torch.cuda.memory_allocated() - before
    block = sum(parameter.nbytes for parameter in model.layers[0].parameters())
    applied = offload(model)
    model_bytes = applied.details["slot_bytes"] + whole - 12 * block
    offloaded, details = applied.model, applied.details
    del model, applied
    gc.collect()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    assert held <= model_bytes + 2 * MiB
    assert 2 * block <= details["slot_bytes"] <= 2 * block * 9 / 8
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        offloaded(tokens(16))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= model_bytes + 32 * MiB
    del offloaded
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 12 * MiB


@pytest.fixture
def little_memory() -> Iterator[int]:
    """At most so many bytes of the device for this process, beyond what it has."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    limit = 320 * MiB
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + limit) / total)
    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_a_model_larger_than_the_memory_allowed_runs_is_verified_and_timed(little_memory: int) -> None:
    model = llama(torch.device("cpu"))
    assert sum(parameter.nbytes for parameter in model.parameters()) > little_memory
    ids = tokens(64)
    with pytest.raises(torch.OutOfMemoryError):
        copy.deepcopy(model).to(DEVICE)
    gc.collect()
    torch.cuda.empty_cache()
    optimized = optimize(
        model,
        "eager",
        args=(ids,),
        trained=False,
        overrides=["memory=offload_weights", "measure.num_rounds=3", "measure.min_round_ms=0", "measure.require_gain=false"],
    )
    report = optimized.report
    assert report.verdict == "pass"
    assert report.verification.max_abs == 0
    assert report.model.bytes_after is not None
    assert report.model.bytes_before is not None
    assert report.model.bytes_after < report.model.bytes_before / 3
    assert sum(isinstance(module, StreamedBlock) for module in optimized.model.modules()) == 12
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert report.ladder[0].name == "eager"
    recipe = report.rung("recipe")
    assert recipe is not None
    assert recipe.peak_memory_bytes is not None
    assert recipe.peak_memory_bytes < little_memory


@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn", "nvfp4"])
def test_packed_weights_give_the_same_bits(format: str) -> None:
    quantize = QuantizeLinears(
        include=[],
        exclude=["lm_head"],
        dtype="bfloat16",
        weight=WeightConfig(format=format),
        activation=ActivationConfig(),
        min_features=16,
    )
    backend = resolve(BackendConfig()).backend
    with torch.no_grad():
        packed = quantize.apply(structural_clone(llama()), Context(backend, CallWorkload((tokens(4),)))).model
    applied = offload(packed)
    with torch.inference_mode():
        for length in (1, 64):
            expected = packed(tokens(length))
            assert all(torch.equal(applied.model(tokens(length)), expected) for _ in range(5))


@pytest.mark.parametrize("compiled", ["regional", "default"])
def test_compiled_blocks_and_a_graph_that_is_left_out(compiled: str) -> None:
    model = llama()
    overrides = ["memory=offload_weights", f"compile={compiled}", "graph=auto", "measure=off"]
    optimized = optimize(model, "eager", args=(tokens(64),), trained=False, overrides=overrides)
    rows = {row.group: row for row in optimized.report.steps}
    assert optimized.report.verdict == "pass"
    assert rows["graph"].status == "not_applicable"
    assert (rows["memory"].status, rows["memory"].changed) == ("applied", 12)
    assert rows["memory"].details["copies"]["late"] == 0


@pytest.mark.parametrize("words", ["fusion=qkv", "precision=fp8_weight_only", "precision=fp8_dynamic", "fusion=qkv precision=nvfp4"])
def test_steps_before_it_change_a_model_that_stays_on_the_host(words: str) -> None:
    overrides = ["memory=offload_weights", "measure=off", *words.split()]
    # Weights drawn on the host and on the device are others.
    models = llama(torch.device("cpu")), llama(torch.device("cpu")).to(DEVICE)
    on_host, on_device = (optimize(model, "eager", args=(tokens(64),), trained=False, overrides=overrides) for model in models)
    assert on_host.report.verdict == on_device.report.verdict == "pass"
    rows = [{row.group: row for row in optimized.report.steps} for optimized in (on_host, on_device)]
    for group in ("fusion", "precision", "memory"):
        assert (rows[0][group].changed, rows[0][group].kernels) == (rows[1][group].changed, rows[1][group].kernels)
    # Packed on the device, one layer at a time: the same bits.
    assert torch.equal(on_host.model(tokens(64)), on_device.model(tokens(64)))


@pytest.mark.parametrize("precision", ["none", "int8_weight_only"])
def test_save_and_load(tmp_path: Path, precision: str) -> None:
    overrides = ["memory=offload_weights", f"precision={precision}", "measure=off"]
    optimized = optimize(llama(), "eager", args=(tokens(16),), trained=False, overrides=overrides)
    expected = optimized.model(tokens(16))
    optimized.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", llama())
    assert torch.equal(loaded.model(tokens(16)), expected)


def test_pinned_memory_is_counted_as_torch_counts_it() -> None:
    gc.collect()
    torch.cuda.synchronize()
    # An allocation makes torch count what has become free.
    torch.empty(1, pin_memory=True)
    before = torch.cuda.host_memory_stats().get("active_bytes.current", 0)
    applied = offload(llama())
    held = torch.cuda.host_memory_stats().get("active_bytes.current", 0) - before
    # torch rounds each block up to a power of two.
    assert applied.details["pinned_bytes"] <= held < 2 * applied.details["pinned_bytes"]
