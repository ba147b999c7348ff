"""MX formats: blocks of 32 values that share a power of two.   Source: OCP Microscaling Formats (MX) 1.0, sections 5 and 6.3

value = element * 2**(byte - 127). The shared exponent is floor(log2(block maximum)) less that of the element format's
largest value, as section 6.3 says; elements round to nearest, half to even, and saturate.
"""

from __future__ import annotations

import math

import torch

from kernel_pytorch.precision.minifloat import MiniFloat

BLOCK = 32
_BIAS, _MANTISSA = 127, 23


def max_exponent(element: MiniFloat | torch.dtype) -> int:
    """Power of two of the element format's largest value."""
    return element.max_exponent if isinstance(element, MiniFloat) else math.frexp(torch.finfo(element).max)[1] - 1


def quantize(values: torch.Tensor, element: MiniFloat | torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, K], K a multiple of 32 -> elements [N, K] (uint8 codes, or the float8 dtype) and uint8 scales [N, K / 32].

    A block of zeros, or of values too small for the shared exponent, has scale byte 0."""
    blocks = values.view(values.shape[0], -1, BLOCK)
    exponent = blocks.abs().amax(dim=2).view(torch.int32) >> _MANTISSA
    byte = (exponent - max_exponent(element)).clamp_min(0)
    scaled = blocks * _power_of_two(2 * _BIAS - byte)[..., None]
    if isinstance(element, MiniFloat):
        elements = element.encode(scaled)
    else:
        limit = torch.finfo(element).max
        elements = scaled.clamp(-limit, limit).to(element)
    return elements.view(values.shape), byte.to(torch.uint8)


def dequantize(elements: torch.Tensor, scale: torch.Tensor, element: MiniFloat | torch.dtype) -> torch.Tensor:
    """The inverse: float32 [N, K]."""
    values = element.decode(elements) if isinstance(element, MiniFloat) else elements.float()
    return (values.view(*scale.shape, BLOCK) * _power_of_two(scale.int())[..., None]).flatten(1)


def _power_of_two(byte: torch.Tensor) -> torch.Tensor:
    """2**(byte - 127) as float32, exact; byte 0 is the subnormal 2**-127."""
    return (byte << _MANTISSA).clamp_min(1 << (_MANTISSA - 1)).view(torch.float32)
