"""FP8 (float8_e4m3fn, float8_e5m2): values scaled so that the largest magnitude is the format's largest.

Rounds to nearest even and saturates. A non-finite weight is a ValueError. A non-finite activation makes its whole row
non-finite. A row of zeros has a tiny scale and stays zero.
"""

from __future__ import annotations

import torch

# Keeps max / largest finite in float32; a row whose values are all smaller becomes zeros.
TINY = 1e-30


def quantize_weight(weight: torch.Tensor, dtype: torch.dtype, *, per_channel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] floating -> [N, K] in `dtype` and float32 scale [N], with weight ~ q * scale[:, None]."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"weight has non-finite values: {dtype} scaling cannot store them")
    values = weight.float()
    largest = values.abs().amax(dim=1) if per_channel else values.abs().amax().expand(values.shape[0])
    limit = torch.finfo(dtype).max
    scale = (largest.clamp_min(TINY) / limit).contiguous()
    return (values / scale[:, None]).clamp_(-limit, limit).to(dtype), scale


def quantize_rows(x: torch.Tensor, dtype: torch.dtype, *, per_row: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] floating -> [M, K] in `dtype` and float32 scale [M, 1], with x ~ scale * q."""
    x = x.float()
    if x.shape[0] == 0:
        return x.to(dtype), x.new_empty((0, 1))
    limit = torch.finfo(dtype).max
    largest = x.abs().amax(dim=1, keepdim=True)
    if not per_row:
        largest = largest.amax(dim=0, keepdim=True).expand(x.shape[0], 1)
    largest = largest.clamp_min(TINY)
    return (x * (limit / largest)).clamp(-limit, limit).to(dtype), largest / limit


def quantize_with(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [M, K] -> codes under a scale that calibration gave (float32 [M, 1]); values outside the calibrated range saturate."""
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)
