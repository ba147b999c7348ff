"""FP8 weights times FP8 activations through torch._scaled_mm: one scale a row and one a column, bf16 out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernel_pytorch.precision.matmul.base import Matmul, Stored, as_bytes, quantize_input

if TYPE_CHECKING:
    from kernel_pytorch.precision.quantized_linear import QuantizedLinear

# The matrix unit takes K and N in sixteens.
MULTIPLE = 16


class ScaledMm(Matmul):
    name = "scaled_mm"

    def pack(self, layer: QuantizedLinear, stored: Stored, bias: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
        codes = stored["weight"]
        n, k = codes.shape
        padded = F.pad(as_bytes(codes), (0, -k % MULTIPLE, 0, -n % MULTIPLE)).contiguous().view(codes.dtype)
        return {"weight": padded, "weight_scale": stored["weight_scale"], "bias": bias}

    def unpack(self, layer: QuantizedLinear) -> Stored:
        return {"weight": layer.weight[: layer.out_features, : layer.in_features], "weight_scale": layer.weight_scale}

    def run(self, layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, layer.in_features)
        codes, scale, _ = quantize_input(layer, rows)
        codes = F.pad(as_bytes(codes), (0, layer.weight.shape[1] - codes.shape[1])).view(codes.dtype)
        fast = layer.activation.fast_accumulation
        y = scaled_product(codes, scale, layer.weight, layer.weight_scale, layer.out_features, fast_accumulation=fast)
        y = y if layer.bias is None else y + layer.bias.to(y.dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], layer.out_features)


def scaled_product(
    codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, n: int, *, fast_accumulation: bool
) -> torch.Tensor:
    """codes [M, Kp] and weight [Np, Kp] of one FP8 dtype, scale float32 [M, 1], weight_scale float32 [n]: bfloat16 [M, n].
    fast_accumulation: on Ada and Hopper, sums are not promoted to float32 on the way; elsewhere it changes nothing."""
    columns = F.pad(weight_scale, (0, weight.shape[0] - n), value=1.0)[None, :]
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        codes, weight.t(), scale_a=scale.contiguous(), scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=fast_accumulation
    )[:, :n]
