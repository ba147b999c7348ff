"""Elements of 4, 6 and 8 bits against ml_dtypes, and their packing against integers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_pytorch.precision import mx
from kernel_pytorch.precision.minifloat import E2M1, E2M3, E3M2, MiniFloat, pack, unpack

ml_dtypes = pytest.importorskip("ml_dtypes")

ELEMENTS = {"float4_e2m1fn": E2M1, "float6_e2m3fn": E2M3, "float6_e3m2fn": E3M2}
element = pytest.mark.parametrize("name", ELEMENTS)
FLOAT8 = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
}


def grid(largest: float) -> torch.Tensor:
    """Every multiple of 1/256 in range: all values, all ties between two of them, and their neighbours in float32."""
    exact = torch.arange(-int(largest * 256), int(largest * 256) + 1) / 256
    return torch.cat(
        (exact, torch.nextafter(exact, torch.full_like(exact, torch.inf)), torch.nextafter(exact, -torch.ones_like(exact) * torch.inf))
    )


@element
def test_facts(name: str) -> None:
    ours, theirs = ELEMENTS[name], ml_dtypes.finfo(getattr(ml_dtypes, name))
    assert ours.bits == theirs.bits
    assert ours.max_value == float(theirs.max)


@element
def test_every_code_has_ml_dtypes_value_and_comes_back(name: str) -> None:
    ours = ELEMENTS[name]
    codes = np.arange(2**ours.bits, dtype=np.uint8)
    values = ours.decode(torch.from_numpy(codes))
    expected = torch.from_numpy(codes.view(getattr(ml_dtypes, name)).astype(np.float32))
    assert torch.equal(values, expected)
    assert torch.equal(torch.signbit(values), torch.signbit(expected))
    assert torch.equal(ours.encode(values), torch.from_numpy(codes))


@element
def test_rounds_as_ml_dtypes_does(name: str) -> None:
    ours = ELEMENTS[name]
    values = grid(ours.max_value)
    values = values[values.abs() <= ours.max_value]
    codes = torch.from_numpy(values.numpy().astype(getattr(ml_dtypes, name)).view(np.uint8).copy())
    assert torch.equal(ours.encode(values), codes)
    assert torch.equal(ours.round(values.abs()), ours.decode(codes).abs())


@element
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=200, deadline=None)
def test_any_number_becomes_the_nearest_value_or_the_largest(name: str, value: float) -> None:
    ours = ELEMENTS[name]
    values = ours.decode(torch.arange(2**ours.bits, dtype=torch.uint8)).double()
    actual = ours.decode(ours.encode(torch.tensor([value]))).double()
    clamped = min(max(value, -ours.max_value), ours.max_value)
    assert (actual - clamped).abs().item() == (values - clamped).abs().min().item()


@pytest.mark.parametrize(
    ("value", "expected"), [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0), (7.0, 6.0), (1e38, 6.0)]
)
def test_e2m1_ties_go_to_the_even_code_and_large_values_saturate(value: float, expected: float) -> None:
    signed = torch.tensor([value, -value])
    assert E2M1.decode(E2M1.encode(signed)).tolist() == [expected, -expected]
    assert E2M1.round(signed.abs()).tolist() == [expected, expected]


def test_zero_keeps_its_sign() -> None:
    assert E2M1.encode(torch.tensor([0.0, -0.0, -1e-45])).tolist() == [0, 8, 8]


@pytest.mark.parametrize("name", FLOAT8)
def test_torch_rounds_float8_as_ml_dtypes_does(name: str) -> None:
    dtype = FLOAT8[name]
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * torch.finfo(dtype).max / 8
    values = torch.cat((values, torch.arange(-2048, 2048) / 2048)).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    expected = values.numpy().astype(getattr(ml_dtypes, name)).view(np.uint8)
    assert np.array_equal(values.to(dtype).view(torch.uint8).numpy(), expected)


def test_shared_exponents_are_e8m0() -> None:
    byte = np.arange(255, dtype=np.uint8)
    powers = mx.dequantize(torch.full((255, 32), 2, dtype=torch.uint8), torch.from_numpy(byte)[:, None], E2M1)
    assert torch.equal(powers[:, 0], torch.from_numpy(byte.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)))


@pytest.mark.parametrize("bits", [4, 6])
@given(data=st.data(), n=st.integers(1, 3), quads=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_packing_is_a_little_endian_integer_and_exact(bits: int, data: st.DataObject, n: int, quads: int) -> None:
    rows = data.draw(st.lists(st.lists(st.integers(0, 2**bits - 1), min_size=4 * quads, max_size=4 * quads), min_size=n, max_size=n))
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (n, 4 * quads * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)
    for row, stored in zip(rows, packed, strict=True):
        whole = sum(code << (bits * column) for column, code in enumerate(row))
        assert bytes(stored.tolist()) == whole.to_bytes(len(stored), "little")


@pytest.mark.parametrize("wrong", [MiniFloat(2, 1, 2), MiniFloat(3, 0, 1)])
def test_a_wrong_layout_is_noticed(wrong: MiniFloat) -> None:
    codes = np.arange(16, dtype=np.uint8)
    expected = torch.from_numpy(codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert not torch.equal(wrong.decode(torch.from_numpy(codes)), expected)
