"""A quantized linear of the GPU takes the kernel for few rows up to the crossover that was measured for its shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernel_pytorch.precision.matmul.base import HAS_TRITON
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import ActivationConfig, ActivationMode, WeightConfig

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton on this platform")

WEIGHT = WeightConfig(format="float8_e4m3fn")
DYNAMIC = ActivationConfig(mode=ActivationMode.dynamic, format="float8_e4m3fn")
ROWS = [
    {"n": 32, "k": 64, "against": "expand", "m": 300},
    {"n": 32, "k": 64, "against": "scaled_mm", "m": 5},
]


@pytest.fixture(autouse=True)
def _measured(tmp_path, monkeypatch):
    from kernel_pytorch.kernels import tables

    monkeypatch.setenv("KERNEL_PYTORCH_CACHE", str(tmp_path))
    tables.load.cache_clear()
    tables.write(tables.user_file("skinny_w8a16", "cpu"), {"configs": [], "crossover": ROWS})
    yield
    tables.load.cache_clear()


def layer(n: int, k: int, dynamic: bool) -> QuantizedLinear:
    from kernel_pytorch.precision.matmul.skinny import SkinnyQuantized, SkinnyWeightOnly

    activation = DYNAMIC if dynamic else ActivationConfig()
    module = QuantizedLinear((n, k), WEIGHT, activation, SkinnyQuantized("scaled_mm") if dynamic else SkinnyWeightOnly(), dtype=None)
    stored = STORAGES["float8_e4m3fn"].quantize(torch.randn(n, k), WEIGHT)
    for name, buffer in module.matmul.pack(module, stored, None).items():
        module.register_buffer(name, buffer)
    return module


@pytest.mark.parametrize(("dynamic", "most"), [(False, 300), (True, 5)])
def test_rows_up_to_the_measured_crossover_take_the_kernel(dynamic, most, monkeypatch):
    module = layer(32, 64, dynamic)
    assert type(module.max_skinny_rows) is int
    assert module.max_skinny_rows == most
    taken = []
    for road in ("_few", "_many"):
        monkeypatch.setattr(module.matmul, road, lambda _, rows, road=road: (taken.append(road), rows.new_zeros(len(rows), 32))[1])
    for rows in (1, most, most + 1):
        assert module(torch.zeros(rows, 64, dtype=torch.bfloat16)).shape == (rows, 32)
    assert taken == ["_few", "_few", "_many"]
    # The kernel takes 16-bit inputs only.
    module(torch.zeros(1, 64))
    assert taken[3:] == ["_many"]


@pytest.mark.parametrize(("dynamic", "most"), [(False, 128), (True, 64)])
def test_a_shape_that_nobody_measured_takes_it_up_to_one_or_two_passes(dynamic, most):
    assert layer(64, 32, dynamic).max_skinny_rows == most


def test_other_matmuls_have_no_kernel_for_few_rows():
    assert QuantizedLinear.from_linear(nn.Linear(64, 32), WEIGHT, ActivationConfig()).max_skinny_rows == 0
