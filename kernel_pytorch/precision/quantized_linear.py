"""One linear layer for every quantized scheme: its buffers are the packed bytes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.kernels import int8_linear
from kernel_pytorch.precision import float8, int8
from kernel_pytorch.schema import ActivationConfig, ActivationGranularity, ActivationMode, WeightConfig, WeightGranularity

# Multiples that the matrix units ask of K and N.
_CUDA_MULTIPLE = {"int8_mm": 8, "scaled_mm": 16}


class QuantizedLinear(nn.Module):
    """Computes `F.linear` on weights stored in 8 bits. Build it with `from_linear`.

    Buffers: weight (int8 or float8, in the kernel's layout), weight_scale (float32), weight_sum (int32, only where a zero
    point needs it), bias. `kernel` names what computes: `reference` is the plain-torch emulation.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_sum: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, kernel: str, *, dtype: torch.dtype | None, symmetric: bool, per_row: bool):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.kernel = kernel
        self.dtype = dtype
        self.symmetric = symmetric
        self.per_row = per_row

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weight: WeightConfig,
        activation: ActivationConfig,
        *,
        dtype: torch.dtype | None = None,
        emulate: bool = False,
        isa: Collection[str] = (),
    ) -> QuantizedLinear:
        """Reads `linear`, changes nothing of it. dtype: computed in; None is the input's. isa: the CPU's instruction sets.
        Raises ValueError for a weight that is not finite."""
        per_channel = weight.granularity is WeightGranularity.channel
        if weight.format == "int8":
            q, scale = int8.quantize_weight(linear.weight.detach(), per_channel=per_channel)
        else:
            q, scale = float8.quantize_weight(linear.weight.detach(), getattr(torch, str(weight.format)), per_channel=per_channel)
        per_row = activation.granularity is ActivationGranularity.token
        kernel = "reference" if emulate else choose_kernel(weight, activation, linear, isa)
        module = cls(linear.in_features, linear.out_features, kernel, dtype=dtype, symmetric=activation.symmetric, per_row=per_row)
        module.quantizes_activations = activation.mode is ActivationMode.dynamic
        module._store(q, scale, None if linear.bias is None else linear.bias.detach())
        return module.train(linear.training)

    quantizes_activations: bool = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._packed:
            # A module that another process pickled: this one must have the operator, and a processor for it.
            int8_linear.require(self.kernel)

    @property
    def _packed(self) -> bool:
        return self.kernel in ("int8_amx", "int8_avx512_vnni")

    def _store(self, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        weight_sum = None
        if self.quantizes_activations and q.dtype == torch.int8 and (self._packed or not self.symmetric):
            weight_sum = q.sum(dim=1, dtype=torch.int32)
        if self._packed:
            q, scale = int8_linear.pack(q), int8_linear.pad_outputs(scale)
            weight_sum = None if weight_sum is None else int8_linear.pad_outputs(weight_sum)
            bias = None if bias is None else bias.float()
        elif self.kernel in _CUDA_MULTIPLE:
            multiple = _CUDA_MULTIPLE[self.kernel]
            q = _pad(q, multiple)
        self.register_buffer("weight", q.contiguous())
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_sum", weight_sum)
        self.register_buffer("bias", None if bias is None else bias.clone())

    def dequantize(self) -> torch.Tensor:
        """The stored weights as float32 [out_features, in_features]."""
        n, k = self.out_features, self.in_features
        q = int8_linear.unpack(self.weight, n, k) if self._packed else self.weight[:n, :k]
        return q.float() * self.weight_scale[:n, None]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Named as in nn.Linear, for callers that name it.
        compute = input if self.dtype is None else input.to(self.dtype)
        if self._packed and compute.dtype in (torch.float32, torch.bfloat16):
            assert self.weight_sum is not None
            y = int8_linear.run(
                compute,
                self.weight,
                self.weight_scale,
                self.weight_sum,
                self.bias,
                self.out_features,
                symmetric=self.symmetric,
                amx=self.kernel == "int8_amx",
            )
        elif self.kernel == "reference" or self._packed:
            y = self._emulate(compute)
        elif not self.quantizes_activations:
            y = self._weight_only(compute)
        else:
            rows = compute.reshape(-1, self.in_features)
            y = self._int8_mm(rows) if self.kernel == "int8_mm" else self._scaled_mm(rows)
            y = y.reshape(*input.shape[:-1], self.out_features)
        return y if y.dtype == input.dtype else y.to(input.dtype)

    def _weight_only(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float16:
            # float16 ends at 65504: a product with codes up to 127, 448 or 57344 passes it before a scale brings it back.
            return F.linear(x, self.dequantize().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        # The scale multiplies the product, not the weight: the compiler then converts the weight inside the matmul.
        y = F.linear(x, self.weight.to(x.dtype)) * self.weight_scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def _emulate(self, x: torch.Tensor) -> torch.Tensor:
        if self.quantizes_activations:
            rows = x.reshape(-1, self.in_features)
            if self.weight.dtype == torch.int8:
                q, scale, offset = int8.quantize_rows(rows, symmetric=self.symmetric, per_row=self.per_row)
                values = (q.to(x.dtype) if offset is None else q.to(x.dtype) - offset.to(x.dtype)) * scale.to(x.dtype)
            else:
                q, scale = float8.quantize_rows(rows, self.weight.dtype, per_row=self.per_row)
                values = q.to(x.dtype) * scale.to(x.dtype)
            x = values.reshape(x.shape)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantize().to(x.dtype), bias)

    def _int8_mm(self, rows: torch.Tensor) -> torch.Tensor:
        q, scale, offset = int8.quantize_rows(rows, symmetric=self.symmetric, per_row=self.per_row)
        num_rows = rows.shape[0]
        # The stored weight may be wider than the input; cuBLASLt's int8 matmul wants more than 16 rows, in eights.
        extra_inputs = self.weight.shape[1] - self.in_features
        extra_rows = max(24, -(-num_rows // 8) * 8) - num_rows if rows.is_cuda else 0
        if extra_inputs or extra_rows:
            q = F.pad(q, (0, extra_inputs, 0, extra_rows))
        sums = torch.ops.aten._int_mm(q, self.weight.t())[:num_rows, : self.out_features]
        y = sums.float()
        if offset is not None:
            assert self.weight_sum is not None
            y = y - offset * self.weight_sum
        y = y * (scale * self.weight_scale)
        return (y if self.bias is None else y + self.bias.float()).to(rows.dtype)

    def _scaled_mm(self, rows: torch.Tensor) -> torch.Tensor:
        q, scale = float8.quantize_rows(rows, self.weight.dtype, per_row=self.per_row)
        # float8 has no padding kernel; its zero is the byte 0.
        q = F.pad(q.view(torch.int8), (0, self.weight.shape[1] - q.shape[1])).view(q.dtype)
        weight_scale = F.pad(self.weight_scale, (0, self.weight.shape[0] - self.out_features), value=1.0)
        y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            q, self.weight.t(), scale_a=scale.contiguous(), scale_b=weight_scale[None, :], out_dtype=torch.bfloat16
        )
        y = y[:, : self.out_features]
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(rows.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, kernel={self.kernel}"


def choose_kernel(weight: WeightConfig, activation: ActivationConfig, linear: nn.Linear, isa: Collection[str]) -> str:
    """What computes a layer that is not emulated: by scheme, device and shape."""
    cuda = linear.weight.is_cuda
    if activation.mode is ActivationMode.none:
        return "dequantize"
    if weight.format != "int8":
        return "scaled_mm" if cuda else "reference"
    fits = linear.in_features <= int8_linear.MAX_K and activation.granularity is ActivationGranularity.token
    if not cuda and fits:
        name, _ = int8_linear.choose(isa)
        if name is not None:
            return name
    return "int8_mm"


def _pad(q: torch.Tensor, multiple: int) -> torch.Tensor:
    n, k = q.shape
    pad_n, pad_k = -n % multiple, -k % multiple
    if not pad_n and not pad_k:
        return q
    # float8 has no padding kernel; its zero is the byte 0.
    return F.pad(q.view(torch.int8), (0, pad_k, 0, pad_n)).view(q.dtype)
