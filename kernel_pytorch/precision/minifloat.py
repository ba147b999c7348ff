"""Floating-point elements of 4 and 6 bits, and their packing into bytes.   Source: OCP Microscaling Formats (MX) 1.0, section 5.3

A code is sign, exponent, mantissa from the highest bit down. These formats have no infinity and no NaN. Arithmetic runs on
float32's bits, so that CPUs and GPUs give the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_F32_BIAS, _F32_MANTISSA, _F16_BIAS, _F16_MANTISSA = 127, 23, 15, 10


@dataclass(frozen=True)
class MiniFloat:
    """Normal values are 2**(exponent - bias) * 1.mantissa; exponent 0 holds the subnormals."""

    exponent_bits: int
    mantissa_bits: int
    bias: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max_exponent(self) -> int:
        """Power of two of the largest value."""
        return 2**self.exponent_bits - 1 - self.bias

    @property
    def max_value(self) -> float:
        return 2.0**self.max_exponent * (2 - 2.0**-self.mantissa_bits)

    def _shifted(self, magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The exponent of each magnitude's binade as float32 bits, and a power of two whose last place is the binade's step:
        adding it rounds to a whole number of steps, half to even."""
        exponent = (magnitude.view(torch.int32) & 0x7F800000).clamp_min((_F32_BIAS + 1 - self.bias) << _F32_MANTISSA)
        return exponent, (exponent + ((_F32_MANTISSA - self.mantissa_bits) << _F32_MANTISSA)).view(torch.float32)

    def round(self, magnitude: torch.Tensor) -> torch.Tensor:
        """float32, at least 0 -> the nearest value, half to even; saturates."""
        magnitude = magnitude.clamp_max(self.max_value)
        _, shift = self._shifted(magnitude)
        return (magnitude + shift) - shift

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """float32 -> uint8 codes of the nearest values, half to even; saturates and keeps the sign of zero."""
        magnitude = values.abs().clamp_max(self.max_value)
        exponent, shift = self._shifted(magnitude)
        steps = (magnitude + shift).view(torch.int32) & 0x7FFFFF
        binade = (exponent >> _F32_MANTISSA) - (_F32_BIAS + 1 - self.bias)
        sign = (values.view(torch.int32) >> 31) & (1 << (self.bits - 1))
        return (sign + (binade << self.mantissa_bits) + steps).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 codes -> float32."""
        codes = codes.to(torch.int16)
        sign, low = 1 << (self.bits - 1), (1 << (self.bits - 1)) - 1
        # As float16 bits the subnormal codes are float16 subnormals, which every device converts exactly.
        half = ((codes & sign) << (16 - self.bits)) | ((codes & low) << (_F16_MANTISSA - self.mantissa_bits))
        return half.view(torch.float16).float() * 2.0 ** (_F16_BIAS - self.bias)


E2M1 = MiniFloat(2, 1, 1)
E2M3 = MiniFloat(2, 3, 1)
E3M2 = MiniFloat(3, 2, 3)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [N, K] of 4 or 6 bits -> uint8 [N, K * bits / 8], the first code in the lowest bits. K: a multiple of 4."""
    if bits == 4:
        return codes[:, 0::2] | (codes[:, 1::2] << 4)
    first, second, third, fourth = (codes[:, index::4] for index in range(4))
    # Shifts of uint8 drop what passes bit 7, which is the part that the next byte holds.
    packed = torch.stack((first | (second << 6), (second >> 2) | (third << 4), (third >> 4) | (fourth << 2)), dim=2)
    return packed.flatten(1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`."""
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
    low, middle, high = (packed[:, index::3] for index in range(3))
    codes = (low & 63, (low >> 6) | ((middle & 15) << 2), (middle >> 4) | ((high & 3) << 4), high >> 2)
    return torch.stack(codes, dim=2).flatten(1)
