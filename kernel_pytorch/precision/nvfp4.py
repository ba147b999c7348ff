"""NVFP4: E2M1 values, an E4M3 scale for each block of 16, and a float32 scale of the tensor.   Source: arXiv:2509.25149, section 2

value = e2m1 * scale * global_scale. The block's scale is what an offline search is free to choose: `plain` takes the
block's maximum over 6, `four_over_six` the better of that and the maximum over 4 (arXiv:2512.02010), `search` the best of
nine neighbouring E4M3 numbers, maximum / 7.1 to maximum / 3.4. Better is less squared error of the block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernel_pytorch.choices import ScaleSearch
from kernel_pytorch.precision.minifloat import E2M1

BLOCK = 16
# Steps through the E4M3 numbers, counted from the one nearest to maximum / 6. Others practically never win.
OFFSETS = range(-2, 7)
SCALE_MAX = 448.0
# The E4M3 number that the tensor's largest block gets from maximum / 6. At 256, maximum / 3.4 is still below 448.
TOP_SCALE = {ScaleSearch.plain: 448.0, ScaleSearch.four_over_six: 256.0, ScaleSearch.search: 256.0}
# E4M3's smallest positive number: a zero scale would erase its block.
SCALE_MIN = 2.0**-9
SCALE_MIN_CODE, SCALE_MAX_CODE = 1, 126
# Keeps the global scale a normal float32; a tensor whose values are all much smaller becomes zeros.
TINY = 1e-30


def global_scale(largest: torch.Tensor, search: ScaleSearch) -> torch.Tensor:
    """float32 [] from the tensor's largest magnitude."""
    return (largest.float() / (E2M1.max_value * TOP_SCALE[search])).clamp_min(TINY)


def quantize(values: torch.Tensor, global_scale: torch.Tensor, search: ScaleSearch) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, K], K a multiple of 16 -> uint8 codes [N, K] and float8_e4m3fn scales [N, K / 16]."""
    blocks = values.view(values.shape[0], -1, BLOCK)
    candidates = _candidates(blocks.abs().amax(dim=2), global_scale, search)
    scale = next(candidates)
    if search is not ScaleSearch.plain:
        magnitude = blocks.abs()
        least = _squared_error(magnitude, scale, global_scale)
        for candidate in candidates:
            error = _squared_error(magnitude, candidate, global_scale)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better, candidate, scale)
    codes = E2M1.encode(blocks / (scale * global_scale)[..., None])
    return codes.view(values.shape), scale.to(torch.float8_e4m3fn)


def _candidates(largest: torch.Tensor, global_scale: torch.Tensor, search: ScaleSearch) -> Iterator[torch.Tensor]:
    """E4M3 numbers as float32 [N, blocks], the first one of plain NVFP4 first where the search is not of neighbours."""
    nearest = _to_e4m3(largest / 6 / global_scale)
    if search is not ScaleSearch.search:
        yield nearest.float()
        if search is ScaleSearch.four_over_six:
            yield _to_e4m3(largest / 4 / global_scale).float()
        return
    code = nearest.view(torch.uint8).int()
    for offset in OFFSETS:
        yield (code + offset).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE).to(torch.uint8).view(torch.float8_e4m3fn).float()


def _to_e4m3(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(SCALE_MIN, SCALE_MAX).to(torch.float8_e4m3fn)


def _squared_error(magnitude: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    rounded = E2M1.round(magnitude / (scale * global_scale)[..., None])
    # Summed in float64, so that the order of the sum does not decide between near-equal scales.
    return (rounded * scale[..., None] * global_scale - magnitude).square_().sum(dim=2, dtype=torch.float64)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """uint8 codes [N, K], float8_e4m3fn scales [N, K / 16] -> float32 [N, K]."""
    blocks = E2M1.decode(codes).view(*scale.shape, BLOCK)
    return (blocks * scale.float()[..., None] * global_scale).flatten(1)
