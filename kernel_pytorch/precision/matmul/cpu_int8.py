"""INT8 on a CPU with AVX512-VNNI or AMX: one operator that quantizes rows, multiplies and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernel_pytorch.kernels import int8_linear
from kernel_pytorch.precision.matmul.base import Matmul, Stored
from kernel_pytorch.precision.matmul.dequantize import Emulate

if TYPE_CHECKING:
    from kernel_pytorch.precision.quantized_linear import QuantizedLinear

_PLAIN = Emulate()


class CpuInt8(Matmul):
    """name: `int8_amx` or `int8_avx512_vnni`, as `int8_linear.choose` gave it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __setstate__(self, state: dict[str, str]) -> None:
        self.name = state["name"]
        # A layer that another process pickled: this one must have the operator, and a processor for it.
        int8_linear.require(self.name)

    def pack(self, layer: QuantizedLinear, stored: Stored, bias: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
        return {
            "weight": int8_linear.pack(stored["weight"]),
            "weight_scale": int8_linear.pad_outputs(stored["weight_scale"]),
            "weight_sum": int8_linear.pad_outputs(stored["weight"].sum(dim=1, dtype=torch.int32)),
            "bias": None if bias is None else bias.float(),
        }

    def unpack(self, layer: QuantizedLinear) -> Stored:
        n = layer.out_features
        return {"weight": int8_linear.unpack(layer.weight, n, layer.in_features), "weight_scale": layer.weight_scale[:n]}

    def run(self, layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16):
            return _PLAIN.run(layer, x)
        assert layer.weight_sum is not None
        return int8_linear.run(
            x,
            layer.weight,
            layer.weight_scale,
            layer.weight_sum,
            layer.bias,
            layer.out_features,
            symmetric=layer.activation.symmetric,
            amx=self.name == "int8_amx",
        )
