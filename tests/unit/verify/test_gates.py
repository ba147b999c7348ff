"""The implementation gate must fail on planted bugs and pass on what is right: a check that cannot fail is none."""

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.optimizer import Applied, Context, Optimizer
from kernel_pytorch.precision.quantize import QuantizeLinears
from kernel_pytorch.schema import ActivationConfig, ActivationMode, OnMismatch, WeightConfig
from kernel_pytorch.verify.module import ModuleValidator

SCHEMES = {
    "int8_weight_only": (WeightConfig(format="int8"), ActivationConfig()),
    "int8_dynamic": (WeightConfig(format="int8"), ActivationConfig(mode=ActivationMode.dynamic, format="int8")),
    "fp8_weight_only": (WeightConfig(format="float8_e4m3fn"), ActivationConfig()),
    "fp8_dynamic": (WeightConfig(format="float8_e4m3fn"), ActivationConfig(mode=ActivationMode.dynamic, format="float8_e4m3fn")),
}


def quantizer(scheme: str) -> QuantizeLinears:
    weight, activation = SCHEMES[scheme]
    return QuantizeLinears(include=[], exclude=[], dtype=None, weight=weight, activation=activation, min_features=16)


class Planted(Optimizer):
    """A right optimizer whose result is spoiled before anyone looks at it."""

    def __init__(self, inner: Optimizer, spoil) -> None:
        self.inner, self.spoil = inner, spoil

    def support(self, backend):
        return self.inner.support(backend)

    def apply(self, model: nn.Module, context: Context) -> Applied:
        applied = self.inner.apply(model, context)
        with torch.no_grad():
            self.spoil(applied.changes[1].replacement)
        return applied

    def reference(self, original: nn.Module) -> nn.Module:
        return self.inner.reference(original)


def drop_bias(layer) -> None:
    layer.bias.zero_()


def scale_off(layer) -> None:
    layer.weight_scale.mul_(1.05)


def one_weight_off(layer) -> None:
    """One stored weight, five percent of its value off, written as the nearest other code."""
    flat = layer.weight.reshape(-1)
    index = int(flat.float().abs().argmax())
    value = flat[index].float() * 0.95
    flat[index] = value.round().to(flat.dtype) if flat.dtype == torch.int8 else value.to(flat.dtype)


def model_and_workload():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)).eval()
    x = torch.randn(40, 96)
    x[:, 3] *= 30
    return model, CallWorkload((x,), {})


def checks_of(optimizer: Optimizer):
    model, workload = model_and_workload()
    backend = CpuBackend(hardware="any", on_mismatch=OnMismatch.emulate)
    clone = structural_clone(model)
    with torch.no_grad():
        applied = optimizer.apply(clone, Context(backend, workload, emulate=backend.facts.vendor != "cpu"))
        return ModuleValidator(budget=2.0).check(applied.model, optimizer, applied.changes, workload)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_right_layers_pass(scheme):
    checks = checks_of(quantizer(scheme))
    assert [check.name for check in checks] == ["0", "2", "4"]
    assert max(check.ratio for check in checks) <= 1


@pytest.mark.parametrize("spoil", [drop_bias, scale_off, one_weight_off])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_planted_bug_is_caught_and_its_module_named(scheme, spoil):
    checks = checks_of(Planted(quantizer(scheme), spoil))
    assert [check.name for check in checks if not check.passed] == ["2"]


def test_a_module_that_is_never_called_is_not_counted_as_checked():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model, workload = Unused().eval(), CallWorkload((torch.randn(4, 32),), {})
    optimizer = quantizer("int8_weight_only")
    backend = CpuBackend(hardware="any", on_mismatch=OnMismatch.emulate)
    with torch.no_grad():
        applied = optimizer.apply(model, Context(backend, workload))
        checks = ModuleValidator(budget=2.0).check(applied.model, optimizer, applied.changes, workload)
    assert {check.name: check.reached for check in checks} == {"used": True, "unused": False}
