"""The TPU backend on torch_xla, on XLA's CPU device: `tests/tpu/run` makes the environment and runs this."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import kernel_pytorch
from kernel_pytorch.backends.detect import resolve
from kernel_pytorch.backends.doctor import diagnose
from kernel_pytorch.backends.tpu import TpuBackend, is_installed, memory_figures
from kernel_pytorch.backends.xla_programs import XlaPrograms
from kernel_pytorch.errors import MemoryReturnError
from kernel_pytorch.optimizer import tensor_bytes
from kernel_pytorch.schema import BackendConfig, OnMismatch

pytestmark = pytest.mark.skipif(not is_installed() or os.environ.get("PJRT_DEVICE") != "CPU", reason="tests/tpu/run runs these")


@pytest.fixture(scope="module")
def backend() -> TpuBackend:
    return TpuBackend(hardware="tpu_v5e", on_mismatch=OnMismatch.error)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.norm(self.up(x))))


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def test_the_machine_is_a_native_tpu_machine(backend):
    resolution = resolve(BackendConfig(hardware="tpu_v5e"))
    assert type(resolution.backend) is TpuBackend
    assert resolution.native
    assert "XLA's CPU device (PJRT_DEVICE=CPU)" in resolution.reason
    facts = backend.facts
    assert (facts.present, facts.arch, backend.device) == (True, None, torch.device("xla", 0))
    assert facts.details["runtime"] == "torch_xla 2.9.0, PJRT device CPU"
    assert facts.details["num_devices"] == 1


def test_values_are_those_of_torch(backend, block):
    x = torch.randn(4, 32)
    with backend.inference():
        expected = block(x)
        on_device = Block().eval()
        on_device.load_state_dict(block.state_dict())
        actual = on_device.to(backend.device)(x.to(backend.device))
    assert actual.device == backend.device
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_bf16_is_rounded_as_torch_rounds(backend):
    torch.manual_seed(0)
    a, b = torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(64, 64, dtype=torch.bfloat16)
    exact = a.double() @ b.double()
    actual = (a.to(backend.device) @ b.to(backend.device)).cpu()
    assert actual.dtype == torch.bfloat16
    error, low = (actual.double() - exact).norm(), ((a @ b).double() - exact).norm()
    assert error <= 2 * low


def test_what_nobody_reads_runs_only_when_it_is_held_until_the_flush(backend):
    import torch_xla.debug.metrics as metrics

    def executed() -> int:
        data = metrics.metric_data("ExecuteTime")
        return 0 if data is None else data[0]

    x = torch.randn(8, 8).to(backend.device)
    backend.synchronize()
    before = executed()
    # Dropped before the flush: there is nothing to compute.
    _ = None if (x @ x) is None else 0
    backend.flush()
    backend.synchronize()
    assert executed() == before
    held = x @ x
    backend.flush()
    backend.synchronize()
    assert executed() == before + 1
    assert held.device == backend.device


def test_a_program_a_shape_is_compiled_by_xla_and_the_oldest_is_forgotten(backend, block):
    programs = XlaPrograms(block.to(backend.device), max_programs=2, backend="openxla", fullgraph=True)
    with backend.inference():
        for rows in (1, 2, 1, 3, 2):
            x = torch.randn(rows, 32).to(backend.device)
            torch.testing.assert_close(programs(x).cpu(), block(x).cpu(), rtol=1e-5, atol=1e-6)
    stats = programs.stats
    assert (stats.misses, stats.hits, stats.evictions, stats.size) == (4, 1, 2, 2)


def test_bytes_of_a_model_on_the_device(backend, block):
    expected = tensor_bytes(block)
    assert expected == 4 * (32 * 64 + 64 + 2 * 64 + 64 * 32 + 32)
    assert tensor_bytes(block.to(backend.device)) == expected


def test_the_memory_manager_hands_out_xla_tensors_and_takes_them_back(backend):
    memory = backend.make_memory()
    first = memory.allocate_tensor((4, 8), torch.bfloat16)
    assert (first.device, tuple(first.shape), first.dtype) == (backend.device, (4, 8), torch.bfloat16)
    assert memory.get_memory_stats().device.in_use_bytes == 64
    memory.return_tensor(first)
    with pytest.raises(MemoryReturnError, match="returned before"):
        memory.return_tensor(first)
    memory.allocate_tensor((8, 4), torch.bfloat16)
    again = memory.allocate_tensor((4, 8), torch.bfloat16)
    again.fill_(2)
    assert again.float().sum().item() == 64
    stats = memory.get_memory_stats()
    assert (stats.device.num_allocations, stats.device.num_reused, stats.device.num_returned) == (3, 1, 1)
    assert memory.optimize_memory_usage() == 0


def test_a_runtime_without_statistics_is_unknown_not_zero(backend):
    assert memory_figures(backend.device) is None
    assert backend.memory.get_memory_stats().free_bytes is None
    assert backend.available_memory_bytes() is None


def test_doctor_shows_the_runtime():
    rows = {row.what: row.value for row in diagnose(measure=False)}
    assert rows["tpu runtime"] == "torch_xla 2.9.0, PJRT device CPU"


@pytest.mark.parametrize("compile", ["default", "none"])
def test_a_recipe_from_python(backend, block, compile):
    model = block.to(backend.device)
    x = torch.randn(16, 32).to(backend.device)
    done = kernel_pytorch.optimize(model, "tpu_v5e_bf16", args=(x,), overrides=[f"compile={compile}"], measure=False, trained=False)
    assert done.report.verdict == "pass"
    steps = {step.group: step for step in done.report.steps if step.changed}
    assert steps["precision"].kernels == ["bfloat16"]
    assert ("compile" in steps) == (compile == "default")
    assert done.report.model.bytes_after * 2 == done.report.model.bytes_before
    expected = model(x).detach().cpu()
    assert ((done.model(x).float().cpu() - expected).norm() / expected.norm()) < 0.01


def test_a_recipe_that_quantizes_is_emulated_and_says_so(backend, block):
    model = block.to(backend.device)
    x = torch.randn(16, 32).to(backend.device)
    done = kernel_pytorch.optimize(
        model, "tpu_v5e_bf16", args=(x,), overrides=["precision=int8_weight_only", "precision.min_features=1"], measure=False, trained=False
    )
    assert done.report.verdict == "emulated"
    row = next(step for step in done.report.steps if step.group == "precision")
    assert "no kernel here multiplies quantized weights on a TPU" in row.reason
