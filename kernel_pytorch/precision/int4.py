"""INT4 in groups: 16 even steps between a group's least and largest value, with a bfloat16 scale and zero a group.

value = (code - 8) * scale + zero. The codes are chosen against the rounded scale and zero that are stored.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

BITS = 4
ZERO_CODE = 8
# Keeps the division by a scale finite; a group that spans less becomes its zero.
TINY = 1e-30


def quantize(values: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 [N, K] -> uint8 codes [N, Kp], bfloat16 scale and zero [N, Kp / group_size], Kp being K padded up to whole
    groups. Padding has code 8 and no say in its group's scale."""
    n, k = values.shape
    pad = -k % group_size
    # Repeating the last column leaves the least and largest value of its group alone.
    filled = torch.cat((values, values[:, -1:].expand(n, pad)), dim=1) if pad else values
    groups = filled.view(n, -1, group_size)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    zero = (low + (high - low) / 15 * 8).bfloat16()
    # Rounding moves the zero, far where a group lies away from 0: the step grows until both ends are within reach again.
    reach = torch.maximum((high - zero.float()) / 7, (zero.float() - low) / 8)
    scale = reach.clamp_min(TINY).bfloat16()
    codes = torch.round((groups - zero.float()[..., None]) / scale.float()[..., None]).clamp(-8, 7) + ZERO_CODE
    codes = codes.to(torch.uint8).view(n, k + pad)
    return F.pad(codes[:, :k], (0, pad), value=ZERO_CODE), scale, zero


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """uint8 codes [N, Kp], scale and zero [N, Kp / group] -> float32 [N, Kp]."""
    groups = codes.view(*scale.shape, -1)
    return ((groups.float() - ZERO_CODE) * scale.float()[..., None] + zero.float()[..., None]).flatten(1)
