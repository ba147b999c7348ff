"""The CUDA paths of the quantized linear: int8 matmul, scaled float8 matmul, 8-bit storage; eager and compiled."""

import copy

import pytest
import torch
from torch import nn

from kernel_pytorch.precision import float8
from kernel_pytorch.precision.matmul.scaled_mm import scaled_product
from kernel_pytorch.precision.quantized_linear import InputRange, QuantizedLinear
from kernel_pytorch.precision.reference import FakeQuantLinear
from kernel_pytorch.schema import ActivationConfig, ActivationGranularity, ActivationMode, WeightConfig, WeightGranularity

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DYNAMIC = ActivationMode.dynamic
INT8, FP8 = WeightConfig(format="int8"), WeightConfig(format="float8_e4m3fn")
SCHEMES = {
    "int8_weight_only": (INT8, ActivationConfig()),
    "fp8_weight_only": (FP8, ActivationConfig()),
    "int8_dynamic": (INT8, ActivationConfig(mode=DYNAMIC, format="int8", symmetric=False)),
    "int8_symmetric": (INT8, ActivationConfig(mode=DYNAMIC, format="int8")),
    "fp8_dynamic": (FP8, ActivationConfig(mode=DYNAMIC, format="float8_e4m3fn")),
    "fp8_dynamic_fast": (FP8, ActivationConfig(mode=DYNAMIC, format="float8_e4m3fn", fast_accumulation=True)),
    "fp8_static": (FP8, ActivationConfig(ActivationMode.static, "float8_e4m3fn", ActivationGranularity.tensor)),
    "int8_static": (INT8, ActivationConfig(ActivationMode.static, "int8", ActivationGranularity.tensor, False)),
    "e5m2_weight_only": (WeightConfig(format="float8_e5m2"), ActivationConfig()),
    "nvfp4": (WeightConfig(format="nvfp4"), ActivationConfig()),
    "mxfp4": (WeightConfig(format="mxfp4"), ActivationConfig()),
    "int4": (WeightConfig(format="int4"), ActivationConfig()),
    "mxfp6": (WeightConfig(format="mxfp6_e2m3"), ActivationConfig()),
    "mxfp8": (WeightConfig(format="mxfp8_e4m3fn"), ActivationConfig()),
    "fp8_tensor": (
        WeightConfig(format="float8_e4m3fn", granularity=WeightGranularity.tensor),
        ActivationConfig(mode=DYNAMIC, format="float8_e4m3fn", granularity=ActivationGranularity.tensor),
    ),
}


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("k", "n"), [(384, 1152), (33, 17), (4096, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_the_references(name: str, k: int, n: int, dtype: torch.dtype) -> None:
    weight, activation = SCHEMES[name]
    if "float8" in str(activation.format) and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 matmul needs sm_89 or newer")
    torch.manual_seed(k + n)
    torch._dynamo.reset()
    linear = nn.Linear(k, n).cuda().to(dtype)
    seen = InputRange(-4.5, 5.5)
    static = activation.mode is ActivationMode.static
    module = QuantizedLinear.from_linear(linear, weight, activation, input_range=seen if static else None)
    reference = FakeQuantLinear(linear, weight, activation, None, (seen.low, seen.high) if static else None)
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    # float8 products are rounded to bf16 by the hardware path. Inputs half-way between two codes may take either, and in float16 up to
    # four of 1,152 are (seen in 300 draws), which is 1.4e-3 of the output.
    floor = 4e-3 if "scaled_mm" in module.kernel else 2e-3 if module.quantizes_activations else 2e-6
    for rows in (0, 1, 3, 64, 300):
        x = torch.randn(rows, k, device="cuda", dtype=dtype)
        exact = copy.deepcopy(reference).double()(x.double())
        allowed = max(2 * relative_error(reference(x), exact), floor)
        for actual in (module(x), compiled(x)):
            assert actual.shape == (rows, n)
            assert actual.dtype == dtype
            assert relative_error(actual, exact) <= allowed, (rows, relative_error(actual, exact), allowed)


def test_fast_accumulation_costs_what_was_measured() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the error of fast accumulation was measured on Hopper")
    torch.manual_seed(0)
    x, w = torch.randn(256, 4096, device="cuda"), torch.randn(6144, 4096, device="cuda")
    codes, scale = float8.quantize_rows(x, torch.float8_e4m3fn)
    weight, weight_scale = float8.quantize_weight(w, torch.float8_e4m3fn, per_channel=True)
    exact = (codes.double() * scale.double()) @ (weight.double() * weight_scale.double()[:, None]).t()
    plain, fast = (scaled_product(codes, scale, weight, weight_scale, 6144, fast_accumulation=fast) for fast in (False, True))
    # bf16's rounding of the output alone is 1.66e-3.
    assert relative_error(plain, exact) <= 2e-3
    assert relative_error(fast, exact) <= 4e-3
    assert not torch.equal(plain, fast)


def test_kernels_are_named() -> None:
    linear = nn.Linear(64, 64).cuda()
    schemes = {name: scheme for name, scheme in SCHEMES.items() if "static" not in name}
    names = {name: QuantizedLinear.from_linear(linear, *scheme).kernel for name, scheme in schemes.items()}
    assert names == {
        "int8_weight_only": "skinny_w8a16+expand",
        "fp8_weight_only": "skinny_w8a16+expand",
        "int8_dynamic": "skinny_w8a16+int8_mm",
        "int8_symmetric": "skinny_w8a16+int8_mm",
        "fp8_dynamic": "skinny_w8a16+scaled_mm",
        "fp8_dynamic_fast": "skinny_w8a16+scaled_mm",
        "fp8_tensor": "skinny_w8a16+scaled_mm",
        "e5m2_weight_only": "dequantize",
        "nvfp4": "skinny_w4a16+expand",
        "mxfp4": "skinny_w4a16+expand",
        "int4": "dequantize",
        "mxfp6": "dequantize",
        "mxfp8": "dequantize",
    }
