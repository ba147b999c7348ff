"""Every scheme of the quantized linear against the independent plain-torch reference."""

import copy
import io

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.precision import float8, int8
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.precision.reference import FakeQuantLinear
from kernel_pytorch.schema import (
    ActivationConfig,
    ActivationGranularity,
    ActivationMode,
    OnMismatch,
    WeightConfig,
    WeightGranularity,
)

ISA = CpuBackend(hardware="cpu", on_mismatch=OnMismatch.emulate).facts.isa
NONE = ActivationConfig()
INT8 = ActivationConfig(mode=ActivationMode.dynamic, format="int8", symmetric=False)
INT8_SYMMETRIC = ActivationConfig(mode=ActivationMode.dynamic, format="int8")
INT8_TENSOR = ActivationConfig(mode=ActivationMode.dynamic, format="int8", granularity=ActivationGranularity.tensor)
FP8 = ActivationConfig(mode=ActivationMode.dynamic, format="float8_e4m3fn")
SCHEMES = {
    "int8_dynamic": (WeightConfig(format="int8"), INT8, {"isa": ISA}),
    "int8_dynamic_plain": (WeightConfig(format="int8"), INT8, {"isa": ("avx_vnni",)}),
    "int8_dynamic_emulated": (WeightConfig(format="int8"), INT8, {"emulate": True}),
    "int8_symmetric": (WeightConfig(format="int8"), INT8_SYMMETRIC, {"isa": ISA}),
    "int8_symmetric_plain": (WeightConfig(format="int8"), INT8_SYMMETRIC, {"isa": ("avx_vnni",)}),
    "int8_tensor": (WeightConfig(format="int8", granularity=WeightGranularity.tensor), INT8_TENSOR, {"isa": ISA}),
    "int8_weight_only": (WeightConfig(format="int8"), NONE, {}),
    "fp8_weight_only": (WeightConfig(format="float8_e4m3fn"), NONE, {}),
    "fp8_e5m2_weight_only": (WeightConfig(format="float8_e5m2"), NONE, {}),
    "fp8_dynamic": (WeightConfig(format="float8_e4m3fn"), FP8, {}),
}
scheme = pytest.mark.parametrize("name", SCHEMES)


def make(name: str, *, k: int = 96, n: int = 80, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple:
    torch.manual_seed(k * 1000 + n)
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    weight, activation, options = SCHEMES[name]
    return linear, QuantizedLinear.from_linear(linear, weight, activation, **options), FakeQuantLinear(linear, weight, activation, None)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(7))
    x[..., 1] *= 30
    return x.to(dtype)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def assert_within_budget(actual: torch.Tensor, reference: FakeQuantLinear, x: torch.Tensor) -> None:
    exact = copy.deepcopy(reference).double()(x.double())
    low = relative_error(reference(x), exact)
    error = relative_error(actual, exact)
    assert error <= 2 * low + 1e-7, f"{error:.2e} exceeds the budget of twice {low:.2e}"


@scheme
@pytest.mark.parametrize(("k", "n"), [(96, 80), (33, 17), (384, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_the_references(name: str, k: int, n: int, dtype: torch.dtype) -> None:
    _, module, reference = make(name, k=k, n=n, dtype=dtype)
    x = inputs(3, 5, k, dtype=dtype)
    actual = module(x)
    assert actual.shape == (3, 5, n)
    assert actual.dtype == dtype
    assert_within_budget(actual, reference, x)


@scheme
def test_the_budget_rejects_planted_bugs(name: str) -> None:
    linear, module, reference = make(name)
    x = inputs(40, 96)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(module(x) - linear.bias, reference, x)
    module.weight_scale[3] *= 1.05
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(module(x), reference, x)


@scheme
def test_stored_values_are_the_references(name: str) -> None:
    _, module, reference = make(name, k=33, n=17)
    assert torch.equal(module.dequantize(), reference.weight)


@scheme
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
def test_any_number_of_rows_and_leading_dimensions(name: str, rows: int) -> None:
    _, module, reference = make(name, bias=False)
    x = inputs(rows, 96)
    assert module(x).shape == (rows, 80)
    assert module(x.view(1, rows, 1, 96)).shape == (1, rows, 1, 80)
    assert_within_budget(module(x), reference, x)
    if rows and module.per_row:
        torch.testing.assert_close(module(x[0]), module(x)[0], rtol=1e-5, atol=1e-5)


@scheme
def test_rows_of_zeros_and_outliers(name: str) -> None:
    linear, module, reference = make(name)
    x = inputs(6, 96)
    x[2] = 0
    x[3] *= 1e-25
    x[4, 7] = 1e6
    actual = module(x)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual[2], linear.bias.detach(), rtol=0, atol=1e-6)
    assert_within_budget(actual, reference, x)


@scheme
def test_a_row_with_nan_spoils_itself_only(name: str) -> None:
    _, module, _ = make(name)
    x = inputs(6, 96)
    x[4, 7] = float("nan")
    finite = torch.isfinite(module(x)).all(dim=1).tolist()
    assert finite == ([True] * 4 + [False, True] if module.per_row or not module.quantizes_activations else [False] * 6)


@scheme
def test_state_dict_copy_and_pickle_keep_the_answer(name: str) -> None:
    _, module, _ = make(name)
    x = inputs(5, 96)
    expected = module(x)
    weight, activation, options = SCHEMES[name]
    other = QuantizedLinear.from_linear(nn.Linear(96, 80), weight, activation, **options)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


@scheme
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    _, module, _ = make(name)
    x = inputs(5, 96)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x), rtol=1e-5, atol=1e-5)


@scheme
def test_buffers_are_the_packed_bytes_and_the_original_is_untouched(name: str) -> None:
    linear, module, _ = make(name, k=128, n=64)
    before = {key: value.clone() for key, value in linear.state_dict().items()}
    sizes = {key: value.nbytes for key, value in module.state_dict().items()}
    assert sizes["weight"] == 128 * 64
    assert sizes["weight_scale"] == 64 * 4
    assert sizes["bias"] == 64 * 4
    assert set(sizes) <= {"weight", "weight_scale", "weight_sum", "bias"}
    assert list(module.parameters()) == []
    assert all(torch.equal(value, before[key]) for key, value in linear.state_dict().items())


def test_the_kernel_is_named() -> None:
    assert make("int8_dynamic_plain")[1].kernel == "int8_mm"
    assert make("int8_dynamic_emulated")[1].kernel == "reference"
    assert make("int8_weight_only")[1].kernel == "dequantize"
    assert make("fp8_dynamic")[1].kernel == "reference"
    if "avx512_vnni" in ISA:
        assert make("int8_dynamic")[1].kernel == ("int8_amx" if "amx_int8" in ISA else "int8_avx512_vnni")
        assert make("int8_tensor")[1].kernel == "int8_mm"


def test_compute_dtype_is_used_and_the_inputs_dtype_returned() -> None:
    linear = nn.Linear(64, 32)
    weight = WeightConfig(format="float8_e4m3fn")
    module = QuantizedLinear.from_linear(linear, weight, NONE, dtype=torch.bfloat16, emulate=True)
    x = inputs(4, 64)
    actual = module(x)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, actual.to(torch.bfloat16).float())
    assert torch.equal(actual, FakeQuantLinear(linear, weight, NONE, torch.bfloat16)(x))


def test_zero_points_halve_the_error_of_one_sided_values() -> None:
    x = torch.rand(50, 256, generator=torch.Generator().manual_seed(0))
    errors = {}
    for symmetric in (True, False):
        q, scale, offset = int8.quantize_rows(x, symmetric=symmetric)
        values = scale * (q.float() - (0 if offset is None else offset))
        errors[symmetric] = (values - x).norm().item()
    assert 0.45 < errors[False] / errors[True] < 0.55


def test_quantizers_round_half_to_even_and_refuse_bad_weights() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]])
    q, scale = int8.quantize_weight(weight, per_channel=True)
    assert q.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert scale[0] == 1.0
    assert torch.isfinite(scale).all()
    q8, scale8 = float8.quantize_weight(weight, torch.float8_e4m3fn, per_channel=True)
    assert q8[0, 0].float() == 448.0
    assert (q8[1].float() * scale8[1]).tolist() == [0.0] * 4
    bad = torch.full((2, 2), float("inf"))
    with pytest.raises(ValueError, match="non-finite"):
        int8.quantize_weight(bad, per_channel=True)
    with pytest.raises(ValueError, match="non-finite"):
        float8.quantize_weight(bad, torch.float8_e4m3fn, per_channel=True)


@pytest.mark.parametrize("name", ["int8_weight_only", "fp8_weight_only", "fp8_e5m2_weight_only"])
@pytest.mark.parametrize("rows", [1, 5])
def test_float16_holds_large_activations(name: str, rows: int) -> None:
    linear, _, _ = make(name, k=384, n=48, dtype=torch.float16)
    nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator().manual_seed(3))
    weight, activation, options = SCHEMES[name]
    module = QuantizedLinear.from_linear(linear, weight, activation, **options)
    x = torch.randn(rows, 384, generator=torch.Generator().manual_seed(7)).half()
    x[0, 5] = 2000
    actual = module(x)
    assert module.kernel == "dequantize"
    assert torch.isfinite(actual).all()
    assert_within_budget(actual, FakeQuantLinear(linear, weight, activation, None), x)


@scheme
def test_called_by_the_name_that_linear_gives_its_input(name: str) -> None:
    _, module, reference = make(name)
    x = inputs(5, 96)
    assert torch.equal(module(input=x), module(x))
    assert torch.equal(reference(input=x), reference(x))
