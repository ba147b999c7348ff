"""Static activations: scales from calibration, the same answer as the reference, saturation, layers that calibration misses."""

import copy

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.optimizer import Applied, Context
from kernel_pytorch.precision.calibration import observe_ranges
from kernel_pytorch.precision.quantize import QuantizeLinears
from kernel_pytorch.schema import ActivationConfig, ActivationGranularity, ActivationMode, OnMismatch, WeightConfig
from kernel_pytorch.verify.module import ModuleValidator

SCHEMES = {"int8": ("int8", True), "int8_zero_point": ("int8", False), "fp8": ("float8_e4m3fn", True), "e5m2": ("float8_e5m2", True)}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(48, 96)
        self.down = nn.Linear(96, 48)
        self.unused = nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def numbers(seed: int, rows: int = 64) -> torch.Tensor:
    return torch.randn(rows, 48, generator=torch.Generator().manual_seed(seed))


def apply(name: str, *, emulate: bool = True) -> tuple[QuantizeLinears, Applied, CallWorkload]:
    torch.manual_seed(1)
    format, symmetric = SCHEMES[name]
    activation = ActivationConfig(ActivationMode.static, format, ActivationGranularity.tensor, symmetric)
    optimizer = QuantizeLinears(
        include=[], exclude=[], dtype=None, weight=WeightConfig(format=format), activation=activation, min_features=16
    )
    calibration = [((numbers(seed),), {}) for seed in range(10, 14)]
    workload = CallWorkload((numbers(0),), held_out=[((numbers(1),), {})], calibration=calibration)
    context = Context(CpuBackend(hardware="cpu", on_mismatch=OnMismatch.emulate), workload, emulate=emulate)
    return optimizer, optimizer.apply(Branches(), context), workload


def test_ranges_are_those_of_the_calibration_inputs() -> None:
    model = Branches()
    calls = [((numbers(seed),), {}) for seed in range(3)]
    workload = CallWorkload((numbers(9),), calibration=calls)
    found = observe_ranges(model, {"up": model.up, "unused": model.unused}, workload, 2)
    seen = torch.cat([numbers(0), numbers(1)])
    assert set(found) == {"up"}
    assert (found["up"].low, found["up"].high) == (seen.min().item(), seen.max().item())
    assert not model.up._forward_pre_hooks


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("emulate", [True, False])
def test_the_gate_passes_and_catches_another_scale(name: str, emulate: bool) -> None:
    optimizer, applied, workload = apply(name, emulate=emulate)
    assert [change.name for change in applied.changes] == ["up", "down"]
    assert [skipped.reason for skipped in applied.skipped] == ["calibration saw no finite input of it, so it has no static scale"]
    checks = ModuleValidator(budget=2.0).check(applied.model, optimizer, applied.changes, workload)
    assert {check.name: check.passed for check in checks} == {"up": True, "down": True}
    applied.model.down.input_scale *= 1.05
    checks = ModuleValidator(budget=2.0).check(applied.model, optimizer, applied.changes, workload)
    assert {check.name: check.passed for check in checks} == {"up": True, "down": False}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_scale_is_the_ranges_over_the_codes(name: str) -> None:
    _, applied, _ = apply(name)
    seen = torch.cat([numbers(seed) for seed in range(10, 14)])
    low, high = seen.min().item(), seen.max().item()
    steps = {"int8": max(-low, high) / 127, "int8_zero_point": (high - low) / 255, "fp8": max(-low, high) / 448}
    expected = steps.get(name, max(-low, high) / 57344)
    assert applied.model.up.input_scale.item() == pytest.approx(expected, rel=1e-6)
    assert (applied.model.up.input_zero_point is not None) == (name == "int8_zero_point")


@pytest.mark.parametrize("name", SCHEMES)
def test_inputs_beyond_the_calibrated_range_saturate_and_nan_is_not_hidden(name: str) -> None:
    _, applied, _ = apply(name)
    x = numbers(3, rows=4)
    largest = torch.full((48,), 1e3)
    x[1] = largest
    layer = applied.model.up
    assert torch.isfinite(layer(x)).all()
    assert torch.equal(layer(x)[1], layer(x * 10)[1])
    x[2, 5] = float("nan")
    assert torch.isfinite(layer(x)).all(dim=1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("name", SCHEMES)
def test_copies_and_state_keep_the_scales(name: str) -> None:
    _, applied, _ = apply(name)
    x = numbers(5)
    assert torch.equal(copy.deepcopy(applied.model)(x), applied.model(x))
    assert "up.input_scale" in applied.model.state_dict()
