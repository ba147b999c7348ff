"""INT8: symmetric weights in [-127, 127]; activations symmetric, or with a zero point in [-128, 127].

Rounds half to even. A non-finite weight is a ValueError. A non-finite activation makes its whole row non-finite: the
row's scale is. A row of zeros has a tiny scale and stays zero.
"""

from __future__ import annotations

import torch

MAX = 127.0
STEPS = 255.0
# Keeps 255 / range finite; a row whose values are all smaller becomes zeros.
TINY = 1e-30


def quantize_weight(weight: torch.Tensor, *, per_channel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] floating -> int8 [N, K] and float32 scale [N], with weight ~ q * scale[:, None]."""
    if not torch.isfinite(weight).all():
        raise ValueError("weight has non-finite values: int8 cannot store them")
    values = weight.float()
    largest = values.abs().amax(dim=1) if per_channel else values.abs().amax().expand(values.shape[0])
    scale = (largest.clamp_min(TINY) / MAX).contiguous()
    q = torch.round(values / scale[:, None]).clamp_(-MAX, MAX).to(torch.int8)
    return q, scale


def row_range(x: torch.Tensor, *, symmetric: bool, per_row: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The width that the codes span and, unless symmetric, the lower end; float32 [M, 1]."""
    if symmetric:
        largest = x.abs().amax(dim=1, keepdim=True)
        if not per_row:
            largest = largest.amax(dim=0, keepdim=True).expand(x.shape[0], 1)
        return largest.clamp_min(TINY), None
    low = x.amin(dim=1, keepdim=True).clamp_max(0)
    high = x.amax(dim=1, keepdim=True).clamp_min(0)
    if not per_row:
        low = low.amin(dim=0, keepdim=True).expand(x.shape[0], 1)
        high = high.amax(dim=0, keepdim=True).expand(x.shape[0], 1)
    return (high - low).clamp_min(TINY), low


def quantize_rows(x: torch.Tensor, *, symmetric: bool, per_row: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """[M, K] floating -> int8 [M, K], float32 scale [M, 1] and offset [M, 1] (None when symmetric), x ~ scale * (q - offset)."""
    x = x.float()
    if x.shape[0] == 0:
        empty = x.new_empty((0, 1))
        return x.to(torch.int8), empty, None if symmetric else empty
    width, low = row_range(x, symmetric=symmetric, per_row=per_row)
    if low is None:
        q = torch.round(x * (MAX / width)).clamp(-MAX, MAX)
        return q.to(torch.int8), width / MAX, None
    inverse = STEPS / width
    zero_point = torch.round(-low * inverse) - 128.0
    q = (torch.round(x * inverse) + zero_point).clamp(-128.0, 127.0)
    return q.to(torch.int8), width / STEPS, zero_point


def quantize_with(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] -> int8 codes under a scale, and a zero point where there is one, that calibration gave (float32 [M, 1]).
    Values outside the calibrated range saturate; the code of a value that is not finite means nothing."""
    codes = torch.round(x.float() / scale)
    if zero_point is None:
        return codes.clamp(-MAX, MAX).to(torch.int8)
    return (codes + zero_point).clamp(-128.0, 127.0).to(torch.int8)
