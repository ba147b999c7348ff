"""4-bit weights on a GPU: few rows read the packed words; more rows expand the weight and take the matrix unit's own road."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernel_pytorch.kernels import expand, skinny_w4a16
from kernel_pytorch.precision.matmul.base import Matmul, Stored
from kernel_pytorch.schema import ActivationConfig, ActivationMode, WeightConfig

if TYPE_CHECKING:
    from kernel_pytorch.precision.quantized_linear import QuantizedLinear


def fits(weight: WeightConfig, activation: ActivationConfig, stored: Stored) -> bool:
    """Whether the kernel can read this weight: its format, and for mxfp4 the range of its scales."""
    if activation.mode is not ActivationMode.none or weight.format not in skinny_w4a16.BLOCK:
        return False
    return skinny_w4a16.fits(stored["weight_scale"], str(weight.format))


class Skinny4(Matmul):
    """The layer's weight holds the kernel's words, weight_scale its scale bytes, weight_channel what sums are multiplied by."""

    name = "skinny_w4a16+expand"

    def pack(self, layer: QuantizedLinear, stored: Stored, bias: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
        layer.max_skinny_rows = skinny_w4a16.crossover(layer.out_features, layer.in_features, stored["weight"].device)
        packed = skinny_w4a16.pack(stored["weight"], stored["weight_scale"], layer.format, stored.get("weight_global_scale"))
        return {
            "weight": packed.words,
            "weight_scale": packed.scales,
            "weight_channel": packed.channel,
            "bias": None if bias is None else bias.float(),
        }

    def unpack(self, layer: QuantizedLinear) -> Stored:
        codes, scale, global_scale = skinny_w4a16.unpack(_packed(layer), layer.format, layer.in_features)
        stored = {"weight": codes, "weight_scale": scale}
        return stored if global_scale is None else {**stored, "weight_global_scale": global_scale}

    def run(self, layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, layer.in_features)
        if x.dtype in (torch.bfloat16, torch.float16) and rows.shape[0] <= layer.max_skinny_rows:
            y = skinny_w4a16.linear(rows, _packed(layer), layer.bias)
        else:
            weight = expand.four_bits(_packed(layer), layer.in_features, x.dtype)
            y = F.linear(rows, weight, None if layer.bias is None else layer.bias.to(x.dtype))
        return y.reshape(*x.shape[:-1], layer.out_features)


def _packed(layer: QuantizedLinear) -> skinny_w4a16.Packed:
    assert layer.weight_channel is not None
    return skinny_w4a16.Packed(layer.weight, layer.weight_scale, layer.weight_channel)
