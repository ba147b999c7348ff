"""The reference's tables against ml_dtypes, and its values against ones worked out by hand."""

import numpy as np
import pytest
import torch

from kernel_pytorch.precision import reference_weights
from kernel_pytorch.precision.reference_weights import fake_quantize_weight
from kernel_pytorch.schema import WeightConfig

TABLES = {
    "float8_e4m3fn": reference_weights._E4M3,
    "float8_e5m2": reference_weights._E5M2,
    "float8_e4m3fnuz": reference_weights._ROWS["float8_e4m3fnuz"],
    "float4_e2m1fn": reference_weights._E2M1,
    "float6_e2m3fn": reference_weights._MX["mxfp6_e2m3"][0],
    "float6_e3m2fn": reference_weights._MX["mxfp6_e3m2"][0],
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_ml_dtypes_values(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = {"float4": 4, "float6": 6, "float8": 8}[name.split("_")[0]]
    # The codes without a sign, less infinities and NaN.
    values = np.arange(2 ** (bits - 1), dtype=np.uint8).view(getattr(ml_dtypes, name)).astype(np.float32)
    assert TABLES[name] == values[np.isfinite(values)].tolist()


def fake(values: list[float], format: str, **facts: object) -> list[float]:
    return fake_quantize_weight(torch.tensor([values]), WeightConfig(format=format, **facts))[0].tolist()


def test_int8_rounds_half_to_even() -> None:
    assert fake([127.0, 0.5, 1.5, -2.5, -127.0], "int8") == [127.0, 0.0, 2.0, -2.0, -127.0]


def test_one_scale_a_tensor() -> None:
    weight = torch.tensor([[127.0, 1.0], [1.6, 0.4]])
    by_tensor = fake_quantize_weight(weight, WeightConfig(format="int8", granularity="tensor"))
    assert by_tensor.tolist() == [[127.0, 1.0], [2.0, 0.0]]
    assert fake_quantize_weight(weight, WeightConfig(format="int8"))[1, 1].item() == pytest.approx(0.4, rel=0.02)


def test_float8_with_a_scale_of_one() -> None:
    # Ties at 17 and 19 between multiples of 2; 2**-9 is the smallest value, half of it is a tie with 0.
    assert fake([448.0, 17.0, 19.0, -18.5, 2.0**-9, 2.0**-10], "float8_e4m3fn") == [448.0, 16.0, 20.0, -18.0, 2.0**-9, 0.0]
    assert fake([57344.0, 9.0, 11.0], "float8_e5m2") == [57344.0, 8.0, 12.0]
    assert fake([240.0, 2.0**-10, 2.0**-11], "float8_e4m3fnuz") == [240.0, 2.0**-10, 0.0]


def test_mx_saturates_and_shares_a_power_of_two() -> None:
    # floor(log2(7.9)) is 2, as is E2M1's largest exponent: a scale of 1.
    assert fake([7.9, 2.5, 0.25, -5.0, 0.3], "mxfp4") == [6.0, 2.0, 0.0, -4.0, 0.5]
    # A maximum of 8 doubles it.
    assert fake([8.0, 2.5, 1.1, -5.0], "mxfp4") == [8.0, 2.0, 1.0, -4.0]
    assert fake([7.9, 0.3125, 0.0625], "mxfp6_e2m3") == [7.5, 0.25, 0.0]
    assert fake([28.0, 0.3], "mxfp6_e3m2") == [28.0, 0.3125]
    assert fake([500.0, 17.0], "mxfp8_e4m3fn") == [448.0, 16.0]
    # The next block has a scale of its own.
    assert fake([8.0] + [0.0] * 31 + [0.3], "mxfp4")[32] == 0.25


def test_nvfp4_scales() -> None:
    # The tensor's maximum 2688 = 6 * 448 makes plain's tensor scale 1: blocks of maximum 6 and 9 have the scales 1 and 1.5.
    row = [2688.0] + [0.0] * 15 + [6.0, 2.5, 0.2, -1.3] + [0.0] * 12 + [9.0, 2.0] + [0.0] * 14
    plain = fake(row, "nvfp4", scale_search="plain")
    assert [plain[0], *plain[16:20], *plain[32:34]] == [2688.0, 6.0, 2.0, 0.0, -1.5, 9.0, 2.25]
    # 1536 = 6 * 256 does so for the searches. Over 4 the block of maximum 4 is stored without loss, over 6 it is not.
    row = [1536.0] + [0.0] * 15 + [4.0, 3.0, 2.0, 1.0] + [0.0] * 12
    assert fake(row, "nvfp4", scale_search="four_over_six")[16:20] == [4.0, 3.0, 2.0, 1.0]
    assert fake(row, "nvfp4")[16:20] == [4.0, 3.0, 2.0, 1.0]
    assert fake(row, "nvfp4", scale_search="plain")[16:20] != [4.0, 3.0, 2.0, 1.0]


def test_int4_groups() -> None:
    # Least -8 and largest 7: a step of 1 about a zero of 0.
    assert fake([-8.0, 7.0, 0.4, 0.5, 1.5, -2.6], "int4") == [-8.0, 7.0, 0.0, 0.0, 2.0, -3.0]
    # Values of one sign use all steps too, and the second group has its own.
    values = fake([16.0 + step for step in range(16)] * 2 + [0.25], "int4", group_size=32)
    assert values[:16] == [16.0 + step for step in range(16)]
    assert values[32] == 0.25
