"""The torch-free facts of each number format against its stored bytes and its largest value."""

import pytest
import torch

from kernel_pytorch.formats import FORMATS, SCALE_BITS
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import WeightConfig

EFFECTIVE_BITS = {
    "int8": 8.0,
    "float8_e4m3fn": 8.0,
    "float8_e5m2": 8.0,
    "float8_e4m3fnuz": 8.0,
    "nvfp4": 4.5,
    "mxfp4": 4.25,
    "mxfp6_e2m3": 6.25,
    "mxfp6_e3m2": 6.25,
    "mxfp8_e4m3fn": 8.25,
    "mxfp8_e5m2": 8.25,
}


def test_every_format_is_stored_and_every_storage_is_a_format() -> None:
    assert list(FORMATS) == [number_format.name for number_format in FORMATS.values()]
    assert set(FORMATS) == set(STORAGES)
    assert {number_format.scale_format for number_format in FORMATS.values()} <= set(SCALE_BITS)


@pytest.mark.parametrize(("name", "bits"), EFFECTIVE_BITS.items())
def test_effective_bits(name: str, bits: float) -> None:
    assert FORMATS[name].effective_bits() == bits


@pytest.mark.parametrize(("group_size", "bits"), [(0, 4.0), (32, 5.0), (64, 4.5), (128, 4.25)])
def test_effective_bits_of_groups(group_size: int, bits: float) -> None:
    assert FORMATS["int4"].effective_bits(group_size) == bits


@pytest.mark.parametrize("name", FORMATS)
def test_effective_bits_are_the_bytes_of_a_large_weight(name: str) -> None:
    config = WeightConfig(format=name)
    n, k = 4096, 65536
    stored = STORAGES[name].nbytes(n, k, config) * 8 / (n * k)
    # What they leave out: a float32 a row (0.0005 bits a value here) or a tensor.
    assert 0 <= stored - FORMATS[name].effective_bits(config.group_size if name == "int4" else 0) <= 32 / k


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int4"])
def test_the_largest_value_is_reached_and_not_passed(name: str) -> None:
    number_format = FORMATS[name]
    weight = torch.zeros(1, 32)
    weight[0, 0] = number_format.max_value
    stored = STORAGES[name].quantize(weight, WeightConfig(format=name, scale_search="plain"))
    # The scale is 1 (MX: an exponent of 0; rows: the maximum over the largest value), up to the two scales of NVFP4.
    if name.startswith("mx"):
        assert stored["weight_scale"].item() == 127
    elif name == "nvfp4":
        assert (stored["weight_scale"].float() * stored["weight_global_scale"]).unique()[-1].item() == pytest.approx(1.0, rel=1e-6)
    else:
        assert stored["weight_scale"].item() == 1.0
    assert STORAGES[name].dequantize(stored, 32)[0, 0].item() == pytest.approx(number_format.max_value, rel=1e-6)
