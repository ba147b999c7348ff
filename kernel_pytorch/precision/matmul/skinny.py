"""Few rows on a GPU: our Triton kernel reads the packed bytes; more rows take the matrix unit's own road on the same bytes."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernel_pytorch.kernels import expand, skinny_w8a16
from kernel_pytorch.kernels.expand import HALF
from kernel_pytorch.precision.matmul.base import Matmul, Stored, as_bytes, quantize_input
from kernel_pytorch.precision.matmul.int8 import int8_product
from kernel_pytorch.precision.matmul.scaled_mm import scaled_product

if TYPE_CHECKING:
    from kernel_pytorch.precision.quantized_linear import QuantizedLinear


class Skinny(Matmul):
    """8-bit weights in the layout of `skinny_w8a16.pack`. The road is chosen by the number of rows, so a compiled model
    has one graph a side of the crossover.

    against: the road of many rows, as the tables of measured crossovers name it."""

    against: str

    def pack(self, layer: QuantizedLinear, stored: Stored, bias: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
        codes = stored["weight"]
        # One row too: on an H200 the kernel beat Inductor's own product of one row on three of four Llama-3-8B layers, was 8 % behind
        # on 6144 x 4096, and Inductor needs mode="max-autotune" for it; by default it converts the whole weight, 34 us for 8.
        layer.max_skinny_rows = skinny_w8a16.crossover(layer.out_features, layer.in_features, codes.device, self.against)
        has_zero_points = layer.quantizes_activations and codes.dtype == torch.int8 and not layer.activation.symmetric
        return {
            "weight": skinny_w8a16.pack(codes),
            "weight_scale": stored["weight_scale"].contiguous(),
            "weight_sum": codes.sum(dim=1, dtype=torch.int32) if has_zero_points else None,
            "bias": None if bias is None else bias.float(),
        }

    def unpack(self, layer: QuantizedLinear) -> Stored:
        weight = skinny_w8a16.unpack(layer.weight, layer.in_features, skinny_w8a16.DTYPES[layer.format])
        return {"weight": weight, "weight_scale": layer.weight_scale}

    def run(self, layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, layer.in_features)
        few = x.dtype in HALF and rows.shape[0] <= layer.max_skinny_rows
        y = self._few(layer, rows) if few else self._many(layer, rows)
        return y.reshape(*x.shape[:-1], layer.out_features)

    @abstractmethod
    def _few(self, layer: QuantizedLinear, rows: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _many(self, layer: QuantizedLinear, rows: torch.Tensor) -> torch.Tensor: ...


class SkinnyWeightOnly(Skinny):
    name, against = "skinny_w8a16+expand", "expand"

    def _few(self, layer: QuantizedLinear, rows: torch.Tensor) -> torch.Tensor:
        return skinny_w8a16.linear(rows, layer.weight, layer.weight_scale, layer.bias, format=layer.format)

    def _many(self, layer: QuantizedLinear, rows: torch.Tensor) -> torch.Tensor:
        bias = None if layer.bias is None else layer.bias.to(rows.dtype)
        if rows.dtype in HALF:
            # With the scale in it: in float16 a product with codes up to 448 would pass 65504 before a scale brings it back.
            return F.linear(rows, expand.eight_bits(layer.weight, layer.weight_scale, layer.in_features, layer.format, rows.dtype), bias)
        weight = layer.weight.view(skinny_w8a16.DTYPES[layer.format]).to(rows.dtype)
        y = F.linear(skinny_w8a16.permute_columns(rows), weight) * layer.weight_scale.to(rows.dtype)
        return y if bias is None else y + bias


class SkinnyQuantized(Skinny):
    """Activations are quantized too. Their codes, and code minus zero point, are integers of at most 8 bits or FP8 values:
    exact in 16 bits, so few rows take the same kernel with the row scales on its float32 sums."""

    def __init__(self, dense: str) -> None:
        self.name, self.against = f"skinny_w8a16+{dense}", dense

    def _few(self, layer: QuantizedLinear, rows: torch.Tensor) -> torch.Tensor:
        codes, scale, offset = quantize_input(layer, rows)
        values = codes.to(rows.dtype)
        if offset is not None:
            values = values - offset.to(rows.dtype)
        row_scale = scale.reshape(-1).contiguous()
        return skinny_w8a16.linear(values, layer.weight, layer.weight_scale, layer.bias, format=layer.format, row_scale=row_scale)

    def _many(self, layer: QuantizedLinear, rows: torch.Tensor) -> torch.Tensor:
        codes, scale, offset = quantize_input(layer, rows)
        weight = layer.weight.view(codes.dtype)
        columns = skinny_w8a16.permute_columns(as_bytes(codes)).contiguous()
        if codes.dtype != torch.int8:
            y = scaled_product(
                columns.view(codes.dtype),
                scale,
                weight,
                layer.weight_scale,
                layer.out_features,
                fast_accumulation=layer.activation.fast_accumulation,
            )
            return (y if layer.bias is None else y + layer.bias.to(y.dtype)).to(rows.dtype)
        y = int8_product(columns, weight, layer.out_features)
        if offset is not None:
            assert layer.weight_sum is not None
            y = y - offset * layer.weight_sum
        y = y * (scale * layer.weight_scale)
        return (y if layer.bias is None else y + layer.bias).to(rows.dtype)
