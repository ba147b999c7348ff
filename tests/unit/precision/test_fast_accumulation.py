"""Fast accumulation: who may ask for it, who is told that nothing reads it, and that the flag reaches torch's FP8 matmul."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.capabilities import adds_fast
from kernel_pytorch.backends.detect import plan_backend
from kernel_pytorch.devices import DEVICES
from kernel_pytorch.optimizer import Level
from kernel_pytorch.precision.matmul.base import HAS_TRITON, Matmul
from kernel_pytorch.precision.matmul.scaled_mm import ScaledMm
from kernel_pytorch.precision.portable import from_portable, to_portable
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.precision.support import linear_support
from kernel_pytorch.schema import (
    ActivationConfig,
    ActivationGranularity,
    ActivationMode,
    BackendConfig,
    PrecisionConfig,
    WeightConfig,
)

FORMAT = "float8_e4m3fn"
WEIGHT = WeightConfig(format=FORMAT)
EXACT = ActivationConfig(mode=ActivationMode.dynamic, format=FORMAT)
FAST = replace(EXACT, fast_accumulation=True)
UNREAD = "precision.activation.fast_accumulation is not read: "


def on_gpu(matmul: Matmul, activation: ActivationConfig) -> QuantizedLinear:
    """A layer [48, 32] with the buffers that it has on a GPU."""
    torch.manual_seed(0)
    stored = STORAGES[FORMAT].quantize(torch.randn(48, 32), WEIGHT)
    module = QuantizedLinear((48, 32), WEIGHT, activation, matmul, dtype=torch.bfloat16)
    for name, buffer in {**dict.fromkeys(module.OWN_BUFFERS), **matmul.pack(module, stored, torch.randn(48))}.items():
        module.register_buffer(name, buffer)
    return module


def test_the_default_is_exact() -> None:
    assert ActivationConfig().fast_accumulation is False
    assert PrecisionConfig().activation.fast_accumulation is False


@pytest.mark.parametrize("format", [None, "int8", "float8_e5m2", "float8_e4m3fnuz", "nvfp4"])
def test_other_formats_than_e4m3_have_none(format: str | None) -> None:
    mode = ActivationMode.none if format is None else ActivationMode.dynamic
    granularity = ActivationGranularity.tensor if format == "nvfp4" else ActivationGranularity.token
    scheme = ActivationConfig(mode=mode, format=format, granularity=granularity)
    weight = WeightConfig(format=format or FORMAT)
    PrecisionConfig(weight=weight, activation=scheme)
    with pytest.raises(ValueError, match=f"activation.fast_accumulation=true with activation.format={format or 'null'}: only "):
        PrecisionConfig(weight=weight, activation=replace(scheme, fast_accumulation=True))


@pytest.mark.parametrize("mode", [ActivationMode.dynamic, ActivationMode.static])
def test_both_modes_may_have_it(mode: ActivationMode) -> None:
    activation = replace(FAST, mode=mode, granularity=ActivationGranularity.tensor)
    assert PrecisionConfig(weight=WEIGHT, activation=activation).activation.fast_accumulation


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("road", ["scaled_mm", "skinny"])
def test_the_flag_reaches_torch(road: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if road == "skinny":
        if not HAS_TRITON:
            pytest.skip("no Triton on this platform")
        from kernel_pytorch.precision.matmul.skinny import SkinnyQuantized

        matmul: Matmul = SkinnyQuantized("scaled_mm")
    else:
        matmul = ScaledMm()
    seen: list[bool] = []

    def product(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum=False):
        seen.append(use_fast_accum)
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    module, x = on_gpu(matmul, FAST if fast else EXACT), torch.randn(100, 32)
    y = module(x)
    assert seen == [fast]
    exact = torch.nn.functional.linear(x, module.dequantize(), module.bias)
    assert ((y - exact).norm() / exact.norm()).item() < 0.05


def test_the_emulated_layer_computes_the_same_bits() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(5, 64)
    fast, exact = (QuantizedLinear.from_linear(linear, WEIGHT, activation, dtype=torch.bfloat16) for activation in (FAST, EXACT))
    assert fast.kernel == exact.kernel == "reference"
    assert torch.equal(fast(x), exact(x))


def test_a_layer_from_a_file_has_the_recipes() -> None:
    linear = nn.Linear(64, 48)
    saved = to_portable(QuantizedLinear.from_linear(linear, WEIGHT, FAST))
    again = from_portable("layer", saved, linear, WEIGHT, FAST, dtype=None, emulate=False, isa=())
    assert again.activation.fast_accumulation


SAID = {
    **dict.fromkeys(("h100", "h200", "rtx4090"), (Level.native, f"{UNREAD[:-2]} by calls of few rows, whose kernel adds in float32")),
    **{
        name: (Level.native, f"{UNREAD}only Ada and Hopper GPUs (sm_89, sm_90) have it, this is {name} ({DEVICES[name].arch})")
        for name in ("b200", "b300", "rtx5090")
    },
    **{
        name: (
            Level.native,
            f"not yet run on AMD hardware; {UNREAD}only Ada and Hopper GPUs (sm_89, sm_90) have it, this is {name} ({DEVICES[name].arch})",
        )
        for name in ("mi355x", "rx9070xt")
    },
    **dict.fromkeys(("a100", "t4", "mi300x", "tpu_v5e", "cpu"), (Level.emulated, f"{UNREAD}no FP8 matmul runs here")),
}


@pytest.mark.parametrize("device", SAID)
def test_the_plan_says_what_reads_it(device: str) -> None:
    backend = plan_backend(device, BackendConfig())
    plain, answer = (linear_support([FORMAT], activation, torch.bfloat16, backend) for activation in (EXACT, FAST))
    assert "accumulation" not in plain.reason
    level, says = SAID[device]
    assert answer.level is plain.level is level
    assert answer.reason == says if level is Level.native else answer.reason == f"{plain.reason}; {says}"


@pytest.mark.parametrize(
    ("arch", "fast"), [("sm_80", False), ("sm_89", True), ("sm_90a", True), ("sm_100", False), ("gfx950", False), (None, False)]
)
def test_gpus_that_add_fast(arch: str | None, fast: bool) -> None:
    assert adds_fast(arch) is fast
