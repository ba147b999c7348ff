"""What `tune` searches for skinny_w8a16: configurations, how they are launched, and the roads that win at many rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from kernel_pytorch.kernels import expand
from kernel_pytorch.kernels import skinny_w8a16 as op
from kernel_pytorch.kernels.skinny_w8a16 import Config
from kernel_pytorch.kernels.tune import Space

Stored = tuple[torch.Tensor, ...]

# A vector step of 512 values a warp: each thread then reads 16 bytes of weight and keeps its x where it loaded it.
VALUES_OF_A_WARP = 512
MAX_AHEAD = 32


def _overlaps(dependent_launch: bool) -> tuple[tuple[str, int], ...]:
    """(overlap, ahead) to try on this GPU."""
    return (("late", 2), ("early", 8), ("early", MAX_AHEAD), ("none", 2)) if dependent_launch else (("none", 2),)


def _vectors(k: int, dependent_launch: bool) -> list[Config]:
    sizes = [warps for warps in (1, 2, 4, 8) if warps == 1 or k % (VALUES_OF_A_WARP * warps) == 0]
    return [
        Config(block_n, VALUES_OF_A_WARP * warps, 0, 1, warps, 1, overlap, ahead)
        for overlap, ahead in _overlaps(dependent_launch)
        for block_n in (4, 2, 8, 1)
        for warps in sizes
    ]


def _matrices(m: int, k: int, dependent_launch: bool) -> list[Config]:
    tiles = [(64, 1, 4), (128, 1, 4), (128, 1, 8), (256, 1, 8), (32, 1, 2)]
    if m <= 16:
        tiles += [(16, 2, 2), (16, 4, 4), (32, 2, 4)]
    steps = [(256, 3), (128, 3)]
    if m > 32:
        # A program reads as many bytes of x as of the weight: wide tiles share it, and fit with short steps.
        tiles += [(256, 1, 16)]
        steps += [(256, 2), (128, 2), (128, 4), (64, 3), (64, 4)]
    overlap = "late" if dependent_launch else "none"
    return [
        Config(block_n, block_k, slices, split, warps, stages, overlap)
        for block_k, stages in steps
        for split in (1, 2, 4)
        for block_n, slices, warps in tiles
        if split == 1 or k >= 4 * split * block_k * slices
    ]


def candidates(m: int, n: int, k: int, device: torch.device) -> list[Config]:
    on = op.device(device.index)
    wide = _vectors(k, on.dependent_launch) if m == 1 else _matrices(m, k, on.dependent_launch)
    return list(dict.fromkeys([op.choose(m, n, k, on), *wide]))


def neighbours(config: Config, m: int, n: int, k: int, device: torch.device) -> list[Config]:
    on = op.device(device.index)
    pairs = [replace(config, overlap=overlap, ahead=ahead) for overlap, ahead in _overlaps(on.dependent_launch)]
    if config.slices == 0:
        return [*pairs, *(replace(config, num_stages=stages) for stages in (2, 3, 4))]
    if on.dependent_launch:
        pairs.append(replace(config, overlap="early", ahead=2))
    found = [replace(config, num_stages=stages) for stages in (config.num_stages - 1, config.num_stages + 1) if stages >= 2]
    found += [replace(config, split=split) for split in (config.split // 2, config.split * 2) if split]
    found += [replace(config, block_k=block_k) for block_k in (config.block_k // 2, config.block_k * 2) if 64 <= block_k <= 512]
    if config.slices == 1:
        found += [replace(config, num_warps=warps) for warps in (config.num_warps // 2, config.num_warps * 2) if 1 < warps <= 16]
    return [*pairs, *found]


def variant(config: Config, m: int, n: int, k: int) -> Hashable:
    """sum_splits, which takes little to compile, is left out."""
    if config.slices == 0:
        return "vector", config, k % op.GROUP == 0 and k % config.block_k == 0
    whole = k % op.GROUP == 0 and k % (config.split * config.block_k * config.slices) == 0
    return "matrix", op.block_m(m), replace(config, split=min(config.split, 2)), whole


def _store(fmt: str, weight: torch.Tensor) -> Stored:
    """Largest magnitude of a row to the format's largest."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / (127 if fmt == "int8" else 448)
    scaled = weight.float() / scale[:, None]
    return op.pack((scaled.round() if fmt == "int8" else scaled).to(op.DTYPES[fmt])), scale


def _launch(fmt: str, x: torch.Tensor, stored: Stored, config: Config) -> torch.Tensor:
    packed, scale = stored
    return op.launch(x, packed, scale, None, fmt != "int8", config)


def _reference(fmt: str, x: torch.Tensor, stored: Stored) -> torch.Tensor:
    packed, scale = stored
    return op.reference(x, op.unpack(packed, x.shape[-1], op.DTYPES[fmt]), scale)


def _expanded(fmt: str, stored: Stored) -> Callable[[torch.Tensor], torch.Tensor]:
    """The weight expanded to x's dtype at each call, a library's product."""
    packed, scale = stored
    return lambda x: torch.nn.functional.linear(x, expand.eight_bits(packed, scale, x.shape[-1], fmt, x.dtype))


@functools.lru_cache(maxsize=1)
def _codes(m: int, k: int, device: torch.device) -> Stored:
    return torch.randn(m, k, device=device).to(torch.float8_e4m3fn), torch.ones(m, 1, device=device)


def _scaled_mm(stored: Stored) -> Callable[[torch.Tensor], torch.Tensor]:
    """FP8 x FP8 on the matrix unit, x quantized before, as it is for the kernel in that scheme too."""
    packed, scale = stored
    weight, scale = op.unpack(packed, packed.shape[1] * 4, torch.float8_e4m3fn), scale[None, :]

    def road(x: torch.Tensor) -> torch.Tensor:
        codes, row_scale = _codes(*x.shape, x.device)
        narrow = weight[:, : x.shape[-1]].t()
        # As the layer calls it by default: without fast accumulation.
        return torch._scaled_mm(codes, narrow, row_scale, scale, out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateImportUsage]

    return road


def _space(fmt: str, dtype: torch.dtype = torch.bfloat16) -> Space:
    against = {"expand": functools.partial(_expanded, fmt)} | ({} if fmt == "int8" else {"scaled_mm": _scaled_mm})
    store, launch, reference = (functools.partial(_store, fmt), functools.partial(_launch, fmt), functools.partial(_reference, fmt))
    return Space(candidates, neighbours, variant, store, launch, reference, against, dtype)


SPACE = _space("float8_e4m3fn")
INT8 = _space("int8")
HALF = _space("float8_e4m3fn", torch.float16)
