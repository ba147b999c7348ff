"""Plain torch: expand the weight and multiply. For every format and device; a compiler may fuse the expansion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernel_pytorch.precision import nvfp4
from kernel_pytorch.precision.matmul.base import Matmul, quantize_input
from kernel_pytorch.schema import ScaleSearch

if TYPE_CHECKING:
    from kernel_pytorch.precision.quantized_linear import QuantizedLinear


class Dequantize(Matmul):
    """Weight-only: the stored weight is expanded in every call."""

    name = "dequantize"

    def run(self, layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        # float16 ends at 65504: a product with codes up to 127, 448 or 57344 passes it before a scale brings it back.
        if layer.has_row_scales and x.dtype != torch.float16:
            # The scale multiplies the product, not the weight: the compiler then converts the weight inside the matmul.
            y = F.linear(x, layer.weight.to(x.dtype)) * layer.weight_scale.to(x.dtype)
            return y if layer.bias is None else y + layer.bias.to(x.dtype)
        return expanded(layer, x)


class Emulate(Matmul):
    """The scheme's numerics in plain torch, activations included: what runs where there is no kernel."""

    name = "reference"

    def run(self, layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        if layer.activation.format == "nvfp4":
            x = nvfp4_values(x)
        elif layer.quantizes_activations:
            rows = x.reshape(-1, layer.in_features)
            codes, scale, offset = quantize_input(layer, rows)
            values = codes.to(x.dtype) if offset is None else codes.to(x.dtype) - offset.to(x.dtype)
            x = (values * scale.to(x.dtype)).reshape(x.shape)
        return expanded(layer, x)


def nvfp4_values(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] rounded to NVFP4 with the plain scales, its tensor's scale from its own largest value; in x's dtype."""
    k = x.shape[-1]
    rows = F.pad(x.reshape(-1, k).float(), (0, -k % nvfp4.BLOCK))
    if not rows.numel():
        return x
    scale_of_all = nvfp4.global_scale(rows.abs().amax(), ScaleSearch.plain)
    codes, scale = nvfp4.quantize(rows, scale_of_all, ScaleSearch.plain)
    return nvfp4.dequantize(codes, scale, scale_of_all)[:, :k].to(x.dtype).reshape(x.shape)


def expanded(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """F.linear on the layer's dequantized weight, in x's dtype."""
    return F.linear(x, layer.dequantize().to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
