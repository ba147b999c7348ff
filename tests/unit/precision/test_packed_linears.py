"""Layers whose weights have scales of blocks: the same answer as the reference, real bytes, and a planted bug that is caught."""

import copy

import pytest
import torch
from torch import nn

from kernel_pytorch.formats import FORMATS
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.precision.reference import FakeQuantLinear
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import ActivationConfig, ActivationGranularity, ActivationMode, ScaleSearch, WeightConfig

BLOCKED = [name for name in FORMATS if name not in ("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz")]
CONFIGS = {name: WeightConfig(format=name) for name in BLOCKED}
CONFIGS["int4_g32"] = WeightConfig(format="int4", group_size=32)
CONFIGS["int4_g128"] = WeightConfig(format="int4", group_size=128)
CONFIGS["nvfp4_plain"] = WeightConfig(format="nvfp4", scale_search=ScaleSearch.plain)
CONFIGS["nvfp4_four_over_six"] = WeightConfig(format="nvfp4", scale_search=ScaleSearch.four_over_six)
scheme = pytest.mark.parametrize("name", CONFIGS)


def make(name: str, k: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, QuantizedLinear, FakeQuantLinear]:
    torch.manual_seed(k * 1000 + n)
    linear = nn.Linear(k, n).to(dtype)
    scheme = (CONFIGS[name], ActivationConfig())
    return linear, QuantizedLinear.from_linear(linear, *scheme), FakeQuantLinear(linear, *scheme, None)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(7))
    x[..., 1] *= 30
    return x.to(dtype)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@scheme
@pytest.mark.parametrize(("k", "n"), [(96, 80), (33, 17), (256, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_the_references(name: str, k: int, n: int, dtype: torch.dtype) -> None:
    _, module, reference = make(name, k, n, dtype)
    assert torch.equal(module.dequantize(), reference.weight)
    x = inputs(3, 5, k, dtype=dtype)
    exact = copy.deepcopy(reference).double()(x.double())
    actual = module(x)
    assert (actual.shape, actual.dtype) == ((3, 5, n), dtype)
    assert error(actual, exact) <= 2 * error(reference(x), exact) + 1e-7


@scheme
def test_one_changed_scale_shows(name: str) -> None:
    _, module, reference = make(name, 256, 48)
    x = inputs(40, 256)
    exact = copy.deepcopy(reference).double()(x.double())
    scale = module.weight_scale
    scale.view(torch.uint8)[3, 1 if scale.element_size() == 1 else 2] ^= 1
    assert error(module(x), exact) > 2 * error(reference(x), exact) + 1e-7


@scheme
def test_buffers_are_the_bytes_that_planning_counts(name: str) -> None:
    _, module, _ = make(name, 300, 50)
    sizes = {key: value.nbytes for key, value in module.state_dict().items()}
    assert sum(sizes.values()) - sizes["bias"] == STORAGES[module.format].nbytes(50, 300, CONFIGS[name])
    assert list(module.parameters()) == []


@scheme
def test_state_and_copies_keep_the_answer_and_the_graph_is_one(name: str) -> None:
    torch._dynamo.reset()
    _, module, _ = make(name, 96, 80)
    x = inputs(5, 96)
    other = QuantizedLinear.from_linear(nn.Linear(96, 80), CONFIGS[name], ActivationConfig())
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    again = QuantizedLinear.from_stored(module.stored(), module.bias, (80, 96), CONFIGS[name], ActivationConfig())
    assert torch.equal(again(x), module(x))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_activations_are_the_references(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(100, 48).to(dtype)
    scheme = (WeightConfig(format="nvfp4"), ActivationConfig(ActivationMode.dynamic, "nvfp4", ActivationGranularity.tensor))
    module, reference = QuantizedLinear.from_linear(linear, *scheme), FakeQuantLinear(linear, *scheme, None)
    x = inputs(6, 5, 100, dtype=dtype)
    exact = copy.deepcopy(reference).double()(x.double())
    assert module.kernel == "reference"
    assert error(module(x), exact) <= 2 * error(reference(x), exact) + 1e-7
    assert 0.05 < error(module(x), copy.deepcopy(linear).double()(x.double())) < 0.25
    assert module(x[:0]).shape == (0, 5, 48)
