"""Properties of every stored format: layout, bytes, exact agreement with the reference, what a second rounding changes."""

import io

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernel_pytorch.precision import int4
from kernel_pytorch.precision.minifloat import E2M1, E2M3, E3M2, unpack
from kernel_pytorch.precision.reference_weights import fake_quantize_weight
from kernel_pytorch.precision.storage import LARGEST, STORAGES
from kernel_pytorch.schema import WeightConfig

CONFIGS = {
    **{name: WeightConfig(format=name) for name in STORAGES},
    **{f"{name}_tensor": WeightConfig(format=name, granularity="tensor") for name in ("int8", "float8_e4m3fn")},
    **{f"int4_g{size}": WeightConfig(format="int4", group_size=size) for size in (32, 128)},
    **{f"nvfp4_{search}": WeightConfig(format="nvfp4", scale_search=search) for search in ("plain", "four_over_six")},
}
MX = [name for name in CONFIGS if name.startswith("mx")]
ROWS = [name for name in CONFIGS if name.startswith(("int8", "float8"))]
EVERY = pytest.mark.parametrize("name", CONFIGS)
# Packed code widths; the others are a torch dtype of 8 bits.
CODE_BITS = {"int4": 4, "nvfp4": 4, "mxfp4": 4, "mxfp6_e2m3": 6, "mxfp6_e3m2": 6}
examples = settings(max_examples=40, deadline=None)

magnitudes = st.floats(width=32, min_value=-LARGEST, max_value=LARGEST, allow_nan=False)
ordinary = st.floats(width=32, min_value=-4, max_value=4, allow_nan=False)
anything = st.one_of(magnitudes, ordinary)


@st.composite
def weights(draw: st.DrawFn, values: st.SearchStrategy[float] = anything) -> torch.Tensor:
    """Small matrices of any number from -0.0 and subnormals to 2**126, some with a whole block of zeros or of one value."""
    n, k = draw(st.integers(1, 3)), draw(st.integers(1, 37))
    drawn = draw(st.lists(values, min_size=n * k, max_size=n * k))
    weight = torch.tensor(drawn).view(n, k)
    if draw(st.booleans()):
        weight[0, : draw(st.integers(1, k))] = draw(st.sampled_from([0.0, -0.0, 1.0, drawn[0]]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return weight.to(dtype)


def gaussian(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def roundtrip(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    config = CONFIGS[name]
    storage = STORAGES[str(config.format)]
    stored = storage.quantize(weight, config)
    return stored, storage.dequantize(stored, weight.shape[1])


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype
        assert tensor.shape == second[key].shape
        assert torch.equal(tensor.flatten().view(torch.uint8), second[key].flatten().view(torch.uint8)), key


@EVERY
@given(weight=weights())
@examples
def test_values_are_finite_and_exactly_the_references(name: str, weight: torch.Tensor) -> None:
    _, values = roundtrip(name, weight)
    assert values.dtype == torch.float32
    assert values.shape == weight.shape
    assert torch.isfinite(values).all()
    assert torch.equal(values, fake_quantize_weight(weight, CONFIGS[name]))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(7, 1027), (64, 512)])
def test_larger_weights_are_exactly_the_references(name: str, dtype: torch.dtype, n: int, k: int) -> None:
    weight = gaussian(n, k)
    weight[:, 3] *= 40
    weight = weight.to(dtype)
    stored, values = roundtrip(name, weight)
    assert torch.equal(values, fake_quantize_weight(weight, CONFIGS[name]))
    wider, _ = roundtrip(name, weight.float())
    assert_same(stored, wider)


@EVERY
def test_the_comparison_notices_one_wrong_code(name: str) -> None:
    weight = gaussian(4, 96)
    stored, _ = roundtrip(name, weight)
    stored["weight"].view(torch.uint8)[2, 5] ^= 1
    values = STORAGES[str(CONFIGS[name].format)].dequantize(stored, 96)
    assert (values != fake_quantize_weight(weight, CONFIGS[name])).sum() == 1


@EVERY
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 31), (5, 128), (2, 129), (9, 333)])
def test_nbytes_is_the_sum_of_the_tensors(name: str, n: int, k: int) -> None:
    config = CONFIGS[name]
    stored, _ = roundtrip(name, gaussian(n, k))
    assert sum(tensor.nbytes for tensor in stored.values()) == STORAGES[str(config.format)].nbytes(n, k, config)
    assert all(tensor.is_contiguous() for tensor in stored.values())


def layout(name: str, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    stored, _ = roundtrip(name, gaussian(n, k))
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in stored.items()}


def test_layouts() -> None:
    byte = torch.uint8
    assert layout("int8", 3, 33) == {"weight": (torch.int8, (3, 33)), "weight_scale": (torch.float32, (3,))}
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"):
        assert layout(name, 3, 33) == {"weight": (getattr(torch, name), (3, 33)), "weight_scale": (torch.float32, (3,))}
    pair = (torch.bfloat16, (3, 2))
    assert layout("int4", 3, 65) == {"weight": (byte, (3, 64)), "weight_scale": pair, "weight_zero": pair}
    assert layout("nvfp4", 3, 33) == {
        "weight": (byte, (3, 24)),
        "weight_scale": (torch.float8_e4m3fn, (3, 3)),
        "weight_global_scale": (torch.float32, ()),
    }
    scale = (byte, (3, 2))
    assert layout("mxfp4", 3, 33) == {"weight": (byte, (3, 32)), "weight_scale": scale}
    for name in ("mxfp6_e2m3", "mxfp6_e3m2"):
        assert layout(name, 3, 33) == {"weight": (byte, (3, 48)), "weight_scale": scale}
    assert layout("mxfp8_e4m3fn", 3, 33) == {"weight": (torch.float8_e4m3fn, (3, 64)), "weight_scale": scale}
    assert layout("mxfp8_e5m2", 3, 33) == {"weight": (torch.float8_e5m2, (3, 64)), "weight_scale": scale}


def test_the_even_column_is_in_the_low_half_of_a_byte() -> None:
    weight = torch.tensor([[6.0, -3.0] + [0.0] * 30])
    assert roundtrip("mxfp4", weight)[0]["weight"][0, :2].tolist() == [0x7 | 0xD << 4, 0]
    assert roundtrip("nvfp4_plain", weight)[0]["weight"][0, :2].tolist() == [0x7 | 0xD << 4, 0]
    # Two codes of int4, 0 and 15, at the ends of the group's range.
    weight = torch.tensor([[-8.0, 7.0] * 16])
    assert set(roundtrip("int4_g32", weight)[0]["weight"][0].tolist()) == {0xF0}


@pytest.mark.parametrize("name", CODE_BITS)
def test_padding_holds_the_code_of_zero(name: str) -> None:
    stored, values = roundtrip(name, gaussian(4, 37) + 5)
    codes = unpack(stored["weight"], CODE_BITS[name])[:, 37:]
    assert codes.shape[1] > 0
    assert set(codes.unique().tolist()) == {int4.ZERO_CODE if name == "int4" else 0}
    # And it widens no block: the same columns in a weight of whole blocks have the same values.
    config = CONFIGS[name]
    filler = values[:, -1:].expand(4, 128 - 37)
    whole = STORAGES[str(config.format)].quantize(torch.cat((gaussian(4, 37) + 5, filler), dim=1), config)
    if name != "nvfp4":
        assert torch.equal(STORAGES[str(config.format)].dequantize(whole, 128)[:, :37], values)


@pytest.mark.parametrize("name", MX)
@given(weight=weights())
@examples
def test_mx_values_are_stored_without_loss(name: str, weight: torch.Tensor) -> None:
    stored, values = roundtrip(name, weight)
    again, same = roundtrip(name, values)
    assert torch.equal(values, same)
    assert_same(stored, again)


@pytest.mark.parametrize("name", ROWS)
@given(weight=weights())
@examples
def test_row_scaled_codes_are_kept_and_scales_move_by_a_rounding(name: str, weight: torch.Tensor) -> None:
    stored, values = roundtrip(name, weight)
    again, _ = roundtrip(name, values)
    # A small negative number rounds to a code of -0, which is a zero to the second rounding too.
    assert torch.equal(stored["weight"].float(), again["weight"].float())
    assert ((again["weight_scale"] / stored["weight_scale"]) - 1).abs().max() <= 2**-23


@given(weight=weights(ordinary), size=st.sampled_from([32, 64, 128]))
@examples
def test_int4_groups_that_use_both_ends_are_kept(weight: torch.Tensor, size: int) -> None:
    name = {32: "int4_g32", 64: "int4", 128: "int4_g128"}[size]
    stored, values = roundtrip(name, weight)
    codes = unpack(stored["weight"], 4)[:, : weight.shape[1]]
    assume(all((part == 0).any(1).all() and (part == 15).any(1).all() for part in codes.split(size, dim=1)))
    again, _ = roundtrip(name, values)
    assert_same(stored, again)


@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 5))
@examples
def test_plain_nvfp4_is_kept_where_no_scale_is_subnormal(seed: int, spread: float) -> None:
    weight = gaussian(4, 64, seed) * torch.exp(spread * gaussian(4, 4, seed + 1).clamp(-1, 1)).repeat_interleave(16, dim=1)
    stored, values = roundtrip("nvfp4_plain", weight)
    assume(stored["weight_scale"].float().min() >= 2**-6)
    again, same = roundtrip("nvfp4_plain", values)
    assert torch.equal(stored["weight_scale"].float(), again["weight_scale"].float())
    assert (values - same).abs().max() <= 2**-22 * values.abs().max()


# The largest error of a value over the largest magnitude that shares its scale: half a step of the top binade, or what
# saturation cuts off a block whose maximum lies above the element's largest value (MX).
WORST = {
    "int8": 0.5 / 127,
    "float8_e4m3fn": 16 / 448,
    "float8_e5m2": 4096 / 57344,
    "float8_e4m3fnuz": 8 / 240,
    "mxfp4": 2 / 8,
    "mxfp6_e2m3": 0.5 / 8,
    "mxfp6_e3m2": 4 / 32,
    "mxfp8_e4m3fn": 64 / 512,
    "mxfp8_e5m2": 8192 / 65536,
}


@pytest.mark.parametrize("name", WORST)
@given(weight=weights(ordinary))
@examples
def test_no_value_is_off_by_more_than_the_format_allows(name: str, weight: torch.Tensor) -> None:
    _, values = roundtrip(name, weight)
    exact = weight.double()
    size = 32 if name in MX else weight.shape[1]
    for part, stored in zip(exact.split(size, dim=1), values.double().split(size, dim=1), strict=True):
        largest = part.abs().amax(dim=1, keepdim=True)
        # Beside it the roundings of float32, and rows that are too small for a scale.
        assert ((stored - part).abs() <= (WORST[name] + 2**-22) * largest + 1e-30).all()


@EVERY
def test_zeros_stay_zero(name: str) -> None:
    weight = gaussian(4, 256)
    weight[1] = 0
    weight[2, 128:] = -0.0
    _, values = roundtrip(name, weight)
    assert (values[1] == 0).all()
    if name not in ROWS:
        assert (values[2, 128:] == 0).all()
    stored, values = roundtrip(name, torch.zeros(2, 40))
    assert (values == 0).all()
    assert all(torch.isfinite(tensor.float()).all() for tensor in stored.values())


@EVERY
@pytest.mark.parametrize("size", [2.0**-140, 2.0**-126, 1e-30, 1e30, 2.0**126])
def test_extreme_magnitudes_are_finite_and_no_larger(name: str, size: float) -> None:
    weight = gaussian(3, 50).clamp(-1, 1) * size
    _, values = roundtrip(name, weight)
    assert torch.isfinite(values).all()
    # A search may round a block's maximum up, by at most a step of the scale.
    assert values.abs().max() <= 1.5 * weight.abs().max() + 1e-28
    if size >= 1e30:
        assert ((values - weight).norm(dtype=torch.float64) / weight.norm(dtype=torch.float64)).item() < 0.2


@EVERY
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_a_weight_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    config = CONFIGS[name]
    weight = gaussian(3, 40)
    weight[1, 7] = bad
    with pytest.raises(ValueError, match="non-finite values or magnitudes above"):
        STORAGES[str(config.format)].quantize(weight, config)


@EVERY
@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(4, 0), torch.zeros(3, 3, dtype=torch.int32)])
def test_what_is_no_floating_matrix_is_refused(name: str, weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="weight must be"):
        STORAGES[str(CONFIGS[name].format)].quantize(weight, CONFIGS[name])


@EVERY
@pytest.mark.parametrize("k", [70, 128])
def test_the_weight_is_read_only_and_may_be_a_transposed_parameter(name: str, k: int) -> None:
    base = gaussian(k, 12)
    parameter = torch.nn.Parameter(base.clone())
    stored, values = roundtrip(name, parameter.t())
    assert torch.equal(parameter, base)
    assert not values.requires_grad
    assert_same(stored, roundtrip(name, base.t().contiguous())[0])


@pytest.mark.parametrize("name", [name for name in CONFIGS if "nvfp4" not in name and "tensor" not in name])
def test_rows_are_quantized_apart(name: str) -> None:
    # Wider than the part that is worked on at once, so that rows fall into three parts, the last one short.
    weight = gaussian(5, 2**17 - 3)
    _, values = roundtrip(name, weight)
    assert torch.equal(values, torch.cat([roundtrip(name, row[None])[1] for row in weight]))


@EVERY
def test_serialization(name: str) -> None:
    stored, values = roundtrip(name, gaussian(6, 70))
    file = io.BytesIO()
    torch.save(stored, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same(stored, loaded)
    assert torch.equal(STORAGES[str(CONFIGS[name].format)].dequantize(loaded, 70), values)


@EVERY
def test_safetensors(name: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    stored, _ = roundtrip(name, gaussian(6, 70))
    assert_same(stored, safetensors.load(safetensors.save(stored)))


@pytest.mark.parametrize(("name", "element"), [("nvfp4", E2M1), ("mxfp4", E2M1), ("mxfp6_e2m3", E2M3), ("mxfp6_e3m2", E3M2)])
def test_the_value_is_what_the_layout_says(name: str, element: object) -> None:
    weight = gaussian(3, 64)
    stored, values = roundtrip(name, weight)
    table = element.decode(torch.arange(2**element.bits, dtype=torch.uint8)).tolist()
    packed = stored["weight"]
    for row in range(3):
        whole = int.from_bytes(bytes(packed[row].tolist()), "little")
        for column in range(64):
            code = (whole >> (element.bits * column)) & (2**element.bits - 1)
            if name == "nvfp4":
                scale = stored["weight_scale"][row, column // 16].float() * stored["weight_global_scale"].double()
            else:
                scale = 2.0 ** (stored["weight_scale"][row, column // 32].item() - 127)
            assert float(table[code] * scale) == pytest.approx(values[row, column].item(), rel=1e-6)


def test_the_value_of_int4_is_what_the_layout_says() -> None:
    stored, values = roundtrip("int4", gaussian(2, 100))
    for row in range(2):
        whole = int.from_bytes(bytes(stored["weight"][row].tolist()), "little")
        for column in range(100):
            code = (whole >> (4 * column)) & 15
            scale, zero = (stored[key][row, column // 64].item() for key in ("weight_scale", "weight_zero"))
            assert (code - 8) * scale + zero == pytest.approx(values[row, column].item(), rel=1e-5, abs=1e-7)


def test_int4_groups_far_from_zero_keep_their_range() -> None:
    # The stored bfloat16 zero is off by up to 2 here; a step that covered only the group's width would cut values off.
    weight = 1000 + torch.arange(64.0)[None] / 64
    _, values = roundtrip("int4", weight)
    assert (values - weight).abs().max() <= 0.25


@EVERY
def test_compiles_without_a_graph_break(name: str) -> None:
    config = CONFIGS[name]
    storage = STORAGES[str(config.format)]
    stored, values = roundtrip(name, gaussian(4, 70))
    # Torch counts compilations by line of code.
    torch._dynamo.reset()
    compiled = torch.compile(lambda buffers: storage.dequantize(buffers, 70), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(stored), values)
