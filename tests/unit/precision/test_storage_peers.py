"""Stored values against torchao's, relative errors on N(0,1) against known ones, and what the NVFP4 scale search gains."""

import pytest
import torch

from kernel_pytorch.precision import nvfp4
from kernel_pytorch.precision.minifloat import E2M1, unpack
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import WeightConfig


def gaussian(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def relative_l2(weight: torch.Tensor, config: WeightConfig) -> float:
    storage = STORAGES[str(config.format)]
    values = storage.dequantize(storage.quantize(weight, config), weight.shape[1])
    return ((values.double() - weight.double()).norm() / weight.double().norm()).item()


# Relative L2 error on N(0,1). The MX scale rule is the specification's: floor(log2(maximum)) less the element's exponent.
KNOWN = {
    "nvfp4 plain": (WeightConfig(format="nvfp4", scale_search="plain"), 0.0951),
    "nvfp4 four_over_six": (WeightConfig(format="nvfp4", scale_search="four_over_six"), 0.0870),
    "nvfp4 search": (WeightConfig(format="nvfp4"), 0.0813),
    "mxfp4": (WeightConfig(format="mxfp4"), 0.1150),
    "mxfp6_e2m3": (WeightConfig(format="mxfp6_e2m3"), 0.0284),
    "mxfp6_e3m2": (WeightConfig(format="mxfp6_e3m2"), 0.0539),
    "mxfp8_e4m3fn": (WeightConfig(format="mxfp8_e4m3fn"), 0.0293),
    "mxfp8_e5m2": (WeightConfig(format="mxfp8_e5m2"), 0.0539),
    "int4 g32": (WeightConfig(format="int4", group_size=32), 0.0783),
    "int4 g64": (WeightConfig(format="int4"), 0.0896),
    "int4 g128": (WeightConfig(format="int4", group_size=128), 0.0998),
}


@pytest.mark.parametrize("name", KNOWN)
def test_relative_error_on_a_normal_weight(name: str) -> None:
    config, expected = KNOWN[name]
    assert relative_l2(gaussian(1024, 1024), config) == pytest.approx(expected, rel=0.005)


def test_search_gains_a_fifth_of_the_squared_error_over_plain() -> None:
    errors = {
        search: relative_l2(gaussian(1024, 1024), WeightConfig(format="nvfp4", scale_search=search))
        for search in ("search", "four_over_six", "plain")
    }
    assert errors["search"] ** 2 <= 0.80 * errors["plain"] ** 2
    assert errors["search"] <= 0.89 * errors["plain"]
    # The control: the smaller search does not reach it.
    assert errors["four_over_six"] ** 2 > 0.80 * errors["plain"] ** 2


def test_search_finds_nearly_what_all_scales_would() -> None:
    weight = gaussian(64, 512) ** 3
    stored = STORAGES["nvfp4"].quantize(weight, WeightConfig(format="nvfp4"))
    scale_of_tensor = stored["weight_global_scale"]
    found = (STORAGES["nvfp4"].dequantize(stored, 512) - weight).square().view(64, -1, 16).sum(2)
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    blocks = weight.view(64, -1, 16)
    least = torch.full_like(found, torch.inf)
    for scale in every:
        step = scale.float() * scale_of_tensor
        least = torch.minimum(least, (E2M1.round(blocks.abs() / step) * step - blocks.abs()).square().sum(2))
    assert found.sum() <= 1.002 * least.sum()
    # In most blocks it is the least error itself.
    assert (found <= least * 1.0001 + 1e-12).float().mean() >= 0.95


def test_the_tensor_scale_leaves_room_for_the_largest_block() -> None:
    weight = gaussian(8, 64)
    weight[3, 5] = 100
    for search, top in (("search", 256.0), ("four_over_six", 256.0), ("plain", 448.0)):
        stored = STORAGES["nvfp4"].quantize(weight, WeightConfig(format="nvfp4", scale_search=search))
        assert stored["weight_global_scale"].item() == pytest.approx(100 / (6 * top), rel=1e-6)
        assert nvfp4.TOP_SCALE[WeightConfig(format="nvfp4", scale_search=search).scale_search] == top


def test_plain_nvfp4_is_torchaos() -> None:
    theirs = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = gaussian(256, 512)
    stored = STORAGES["nvfp4"].quantize(weight, WeightConfig(format="nvfp4", scale_search="plain"))
    assert stored["weight_global_scale"].item() == (weight.abs().max() / (448 * 6)).item()
    scale, codes = theirs.nvfp4_quantize(weight, 16, stored["weight_global_scale"])
    assert torch.equal(scale.view(torch.uint8), stored["weight_scale"].view(torch.uint8))
    assert torch.equal(codes, stored["weight"])


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("mxfp4", "float4_e2m1fn_x2"),
        ("mxfp6_e2m3", "fp6_e2m3"),
        ("mxfp6_e3m2", "fp6_e3m2"),
        ("mxfp8_e4m3fn", "float8_e4m3fn"),
        ("mxfp8_e5m2", "float8_e5m2"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mx_is_torchaos(name: str, theirs: str, dtype: torch.dtype) -> None:
    module = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    # Blocks of very different magnitudes.
    weight = (gaussian(64, 256) * torch.exp2(torch.arange(-32, 32.0))[:, None]).to(dtype)
    scale, elements = module.to_mx(weight, getattr(torch, theirs, theirs), 32)
    stored = STORAGES[name].quantize(weight, WeightConfig(format=name))
    assert torch.equal(scale.view(torch.uint8), stored["weight_scale"])
    ours = unpack(stored["weight"], 6) if "mxfp6" in name else stored["weight"]
    assert torch.equal(elements.view(torch.uint8), ours.view(torch.uint8))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_int4_is_torchaos_with_zeros_alike_and_no_more_error(size: int) -> None:
    theirs = pytest.importorskip("torchao.quantization.utils")
    weight = gaussian(256, 512)
    scale, zero = theirs.get_groupwise_affine_qparams(weight, 4, size)
    packed = theirs.groupwise_affine_quantize_tensor_from_qparams(weight, scale, zero, 4, size)
    values = theirs.groupwise_affine_dequantize_tensor_from_qparams(packed, scale, zero, 4, size)
    config = WeightConfig(format="int4", group_size=size)
    stored = STORAGES["int4"].quantize(weight, config)
    assert torch.equal(zero, stored["weight_zero"])
    # Scales differ by at most one bfloat16 rounding, where ours covers what the zero's rounding moved.
    assert ((scale.float() / stored["weight_scale"].float()) - 1).abs().max() <= 2**-7
    assert (scale == stored["weight_scale"]).float().mean() >= 0.9
    ours = STORAGES["int4"].dequantize(stored, 512)
    assert (ours - weight).norm() <= (values.float() - weight).norm()
