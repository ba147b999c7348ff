"""How a weight of each number format lies in memory: the canonical packed buffers, before any kernel's own layout.

N output features, K input features. A stored weight is a dict of tensors by buffer name: `weight` (codes) and
`weight_scale`, and where the format has them `weight_global_scale` and `weight_zero`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from kernel_pytorch.precision import float8, int8
from kernel_pytorch.schema import WeightConfig, WeightGranularity

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Above it the product of a code and its rounded scale can pass float32's largest value.
LARGEST = 2.0**126


class Storage(ABC):
    """One number format. Rounds to nearest, half to even, and saturates."""

    def quantize(self, weight: torch.Tensor, config: WeightConfig) -> dict[str, torch.Tensor]:
        """[N, K] floating -> the stored buffers, on the weight's device. Raises ValueError for a weight that is not a
        filled floating matrix, is not finite, or has magnitudes above 2**126."""
        if weight.ndim != 2 or weight.numel() == 0 or weight.dtype not in DTYPES:
            raise ValueError(f"weight must be [N, K] in float64, float32, bfloat16 or float16, got {weight.dtype} {tuple(weight.shape)}")
        weight = weight.detach()
        low, high = (bound.item() for bound in torch.aminmax(weight))
        # NaN fails this comparison too.
        if not (-LARGEST <= low and high <= LARGEST):
            raise ValueError(f"weight has non-finite values or magnitudes above 2**126: {config.format} cannot store them")
        return self._quantize(weight, config)

    @abstractmethod
    def _quantize(self, weight: torch.Tensor, config: WeightConfig) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def dequantize(self, stored: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """The stored values as float32 [N, in_features]."""

    @abstractmethod
    def nbytes(self, n: int, k: int, config: WeightConfig) -> int:
        """Bytes of all buffers of a [n, k] weight."""


class RowScaled(Storage):
    """weight [N, K] in an 8-bit torch dtype and weight_scale float32 [N]: value = code * scale."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def _quantize(self, weight: torch.Tensor, config: WeightConfig) -> dict[str, torch.Tensor]:
        per_channel = config.granularity is WeightGranularity.channel
        if self.dtype is torch.int8:
            codes, scale = int8.quantize_weight(weight, per_channel=per_channel)
        else:
            codes, scale = float8.quantize_weight(weight, self.dtype, per_channel=per_channel)
        return {"weight": codes, "weight_scale": scale}

    def dequantize(self, stored: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        return stored["weight"][:, :in_features].float() * stored["weight_scale"][:, None]

    def nbytes(self, n: int, k: int, config: WeightConfig) -> int:
        return n * k + 4 * n


STORAGES: dict[str, Storage] = {
    "int8": RowScaled(torch.int8),
    "float8_e4m3fn": RowScaled(torch.float8_e4m3fn),
    "float8_e5m2": RowScaled(torch.float8_e5m2),
    "float8_e4m3fnuz": RowScaled(torch.float8_e4m3fnuz),
}
