"""How a quantized linear multiplies: which layout its buffers have, and what reads them."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from kernel_pytorch.precision import float8, int8
from kernel_pytorch.schema import ActivationMode

if TYPE_CHECKING:
    from kernel_pytorch.precision.quantized_linear import QuantizedLinear

Stored = dict[str, torch.Tensor]
HAS_TRITON = importlib.util.find_spec("triton") is not None


class Matmul(ABC):
    """One way to compute a layer. Has no state: a layer's tensors are the layer's buffers.

    name: what the receipt calls it."""

    name: str

    def pack(self, layer: QuantizedLinear, stored: Stored, bias: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
        """The layer's buffers, from the format's canonical ones; `bias` is among them."""
        return {**stored, "bias": bias}

    def unpack(self, layer: QuantizedLinear) -> Stored:
        """The canonical buffers that `pack` was given."""
        return {name: buffer for name, buffer in layer._buffers.items() if buffer is not None and name not in layer.OWN_BUFFERS}

    @abstractmethod
    def run(self, layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] in the dtype computed in -> [..., N]."""


def quantize_input(layer: QuantizedLinear, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """[M, K] -> codes [M, K], float32 scale [M, 1] and, where int8 has zero points, float32 offset [M, 1]:
    rows ~ scale * (codes - offset)."""
    activation = layer.activation
    integer = activation.format == "int8"
    if activation.mode is ActivationMode.static:
        assert layer.input_scale is not None
        scale = layer.input_scale.expand(rows.shape[0], 1)
        if integer:
            offset = None if layer.input_zero_point is None else layer.input_zero_point.expand(rows.shape[0], 1)
            # An integer code cannot be NaN: the scale of a row that is not finite is, as in the dynamic schemes.
            spoiled = rows.float().abs().amax(dim=1, keepdim=True) * 0
            return int8.quantize_with(rows, scale, offset), scale + spoiled, offset
        return float8.quantize_with(rows, scale, getattr(torch, str(activation.format))), scale, None
    # A kernel of ours instead of half a dozen of torch's, where nothing is compiled: Inductor writes one itself, together with
    # the norm that precedes it.
    if rows.is_cuda and HAS_TRITON and not torch.compiler.is_compiling():
        from kernel_pytorch.kernels import row_quant

        if layer.per_row and 0 < rows.shape[1] <= row_quant.MAX_COLUMNS and rows.stride(1) == 1:
            found = row_quant.quantize_rows(rows, str(activation.format), symmetric=activation.symmetric)
            zero_point = found.zero_point
            return found.q, found.scale[:, None], None if zero_point is None else zero_point[:, None]
    if integer:
        return int8.quantize_rows(rows, symmetric=activation.symmetric, per_row=layer.per_row)
    codes, scale = float8.quantize_rows(rows, getattr(torch, str(activation.format)), per_row=layer.per_row)
    return codes, scale, None


def as_bytes(codes: torch.Tensor) -> torch.Tensor:
    """The same bytes as int8: float8 has no padding or permuting kernels, and its zero is the byte 0."""
    return codes if codes.dtype == torch.int8 else codes.view(torch.int8)
