"""8-bit and 4-bit weights as a GPU keeps them, above the crossover: other dtypes, casts of the layer, errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernel_pytorch.kernels import skinny_w4a16, skinny_w8a16
from kernel_pytorch.precision import quantized_linear
from kernel_pytorch.precision.matmul.skinny import SkinnyWeightOnly
from kernel_pytorch.precision.matmul.skinny4 import Skinny4
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.schema import ActivationConfig, ActivationMode, WeightConfig


def layer(monkeypatch: pytest.MonkeyPatch, fmt: str) -> QuantizedLinear:
    """As on a GPU; here every input takes the road of many rows."""
    matmul = Skinny4() if fmt in skinny_w4a16.BLOCK else SkinnyWeightOnly()
    monkeypatch.setattr(quantized_linear, "choose", lambda *words: matmul)
    monkeypatch.setattr(skinny_w8a16, "crossover", lambda *words: 0)
    monkeypatch.setattr(skinny_w4a16, "crossover", lambda *words: 0)
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(torch.nn.Linear(300, 48), WeightConfig(format=fmt), ActivationConfig(mode=ActivationMode.none))


@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_is_of_what_is_computed_and_not_of_what_is_stored(monkeypatch, fmt, dtype):
    made = layer(monkeypatch, fmt)
    assert made.bias is not None
    weight, bias = made.dequantize().double(), made.bias.double()
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    x = torch.randn(5, 300, dtype=dtype)
    y = made.to(dtype)(x)
    exact = F.linear(x.double(), weight, bias)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= (1e-6 if dtype is torch.float64 else 5e-3) * exact.norm()
    for name, buffer in made.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("format", ["float8_e5m2", "float8_e4m3fn", "mxfp8_e4m3fn", "int4"])
def test_stored_float8_is_not_cast_either(format):
    made = QuantizedLinear.from_linear(torch.nn.Linear(64, 48), WeightConfig(format=format), ActivationConfig(mode=ActivationMode.none))
    stored = made.stored()
    after = made.half().stored()
    assert {name: buffer.dtype for name, buffer in after.items()} == {name: buffer.dtype for name, buffer in stored.items()}


def test_a_move_moves():
    made = QuantizedLinear.from_linear(torch.nn.Linear(64, 48), WeightConfig(format="int8"), ActivationConfig(mode=ActivationMode.none))
    moved = made.to(device="meta", dtype=torch.float16)
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}


@pytest.mark.parametrize("fmt", ["int8", "float8_e4m3fn"])
def test_float64_inputs_are_computed_in_float64(monkeypatch, fmt):
    made = layer(monkeypatch, fmt)
    assert made.bias is not None
    stored = made.stored()
    weight = stored["weight"].double() * stored["weight_scale"].double()[:, None]
    x = torch.randn(5, 300, dtype=torch.float64)
    exact = F.linear(x, weight, made.bias.double())
    assert (made(x) - exact).norm() <= 1e-13 * exact.norm()


@pytest.mark.parametrize("k", [4096, 14336])
def test_a_scale_in_the_weight_errs_less_than_one_on_the_product(k):
    """bf16, x with outliers, against float64 on the stored weight."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(256, k, generator=rng)
    scale = weight.abs().amax(1) / 448
    codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    x = torch.randn(64, k, generator=rng)
    x[:, k // 2] *= 100
    x = x.bfloat16()
    exact = x.double() @ (codes.double() * scale.double()[:, None]).t()

    def relative(y: torch.Tensor) -> float:
        return float((y.double() - exact).norm() / exact.norm())

    in_weight = relative(F.linear(x, (codes.float() * scale[:, None]).bfloat16()))
    on_product = relative(F.linear(x, codes.bfloat16()) * scale.bfloat16())
    assert 2.2e-3 < in_weight < 2.5e-3
    assert 2.7e-3 < on_product < 3.2e-3
