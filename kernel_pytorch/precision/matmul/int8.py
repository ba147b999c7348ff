"""INT8 weights times INT8 activations through torch._int_mm; scales and zero points in plain torch around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernel_pytorch.precision.matmul.base import Matmul, Stored, quantize_input

if TYPE_CHECKING:
    from kernel_pytorch.precision.quantized_linear import QuantizedLinear

# The matrix unit takes K and N in eights, and more than 16 rows.
MULTIPLE, _LEAST_ROWS = 8, 24


class Int8Mm(Matmul):
    name = "int8_mm"

    def pack(self, layer: QuantizedLinear, stored: Stored, bias: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
        codes = stored["weight"]
        n, k = codes.shape
        weight_sum = None if layer.activation.symmetric else codes.sum(dim=1, dtype=torch.int32)
        padded = F.pad(codes, (0, -k % MULTIPLE, 0, -n % MULTIPLE)).contiguous()
        return {"weight": padded, "weight_scale": stored["weight_scale"], "weight_sum": weight_sum, "bias": bias}

    def unpack(self, layer: QuantizedLinear) -> Stored:
        return {"weight": layer.weight[: layer.out_features, : layer.in_features], "weight_scale": layer.weight_scale}

    def run(self, layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, layer.in_features)
        codes, scale, offset = quantize_input(layer, rows)
        y = int8_product(codes, layer.weight, layer.out_features)
        if offset is not None:
            assert layer.weight_sum is not None
            y = y - offset * layer.weight_sum
        y = y * (scale * layer.weight_scale)
        y = y if layer.bias is None else y + layer.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], layer.out_features)


def int8_product(codes: torch.Tensor, weight: torch.Tensor, out_features: int) -> torch.Tensor:
    """codes int8 [M, K] times weight int8 [Np, Kp] transposed, Kp >= K and Np >= out_features padded: float32 [M, out_features]."""
    num_rows = codes.shape[0]
    extra_inputs = weight.shape[1] - codes.shape[1]
    extra_rows = max(_LEAST_ROWS, -(-num_rows // 8) * 8) - num_rows if codes.is_cuda else 0
    if extra_inputs or extra_rows:
        codes = F.pad(codes, (0, extra_inputs, 0, extra_rows))
    return torch.ops.aten._int_mm(codes, weight.t())[:num_rows, :out_features].float()
