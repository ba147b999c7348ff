"""How a weight of each number format lies in memory: the canonical packed buffers, before any kernel's own layout.

N output features, K input features, Kp: K padded up to whole blocks. A stored weight is a dict of tensors by buffer name:
`weight` (codes) and `weight_scale`, and where the format has them `weight_global_scale` and `weight_zero`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch.nn import functional as F

from kernel_pytorch.precision import float8, int4, int8, mx, nvfp4
from kernel_pytorch.precision.minifloat import E2M1, E2M3, E3M2, MiniFloat, pack, unpack
from kernel_pytorch.schema import WeightConfig, WeightGranularity

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Above it the product of a code and its rounded scale can pass float32's largest value.
LARGEST = 2.0**126
# Values quantized at once: what a CPU core's cache holds, and what keeps a GPU busy within some hundred MiB of temporaries.
_CPU_CHUNK, _GPU_CHUNK = 2**18, 2**24


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
        if not (low >= -LARGEST and high <= LARGEST):
            raise ValueError("weight has non-finite values or magnitudes above 2**126: no scale can store them")
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

        def quantize(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if self.dtype is torch.int8:
                return int8.quantize_weight(values, per_channel=per_channel)
            return float8.quantize_weight(values, self.dtype, per_channel=per_channel)

        codes, scale = _by_rows(weight, quantize) if per_channel else quantize(weight)
        return {"weight": codes, "weight_scale": scale}

    def dequantize(self, stored: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        return stored["weight"][:, :in_features].float() * stored["weight_scale"][:, None]

    def nbytes(self, n: int, k: int, config: WeightConfig) -> int:
        return n * k + 4 * n


class Int4(Storage):
    """weight uint8 [N, Kp / 2], the even column in the low half; weight_scale and weight_zero bfloat16 [N, Kp / group_size]."""

    def _quantize(self, weight: torch.Tensor, config: WeightConfig) -> dict[str, torch.Tensor]:
        def quantize(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            codes, scale, zero = int4.quantize(values, config.group_size)
            return pack(codes, int4.BITS), scale, zero

        codes, scale, zero = _by_rows(weight, quantize)
        return {"weight": codes, "weight_scale": scale, "weight_zero": zero}

    def dequantize(self, stored: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        codes = unpack(stored["weight"], int4.BITS)
        return int4.dequantize(codes, stored["weight_scale"], stored["weight_zero"])[:, :in_features]

    def nbytes(self, n: int, k: int, config: WeightConfig) -> int:
        groups = -(-k // config.group_size)
        return n * groups * (config.group_size // 2 + 2 + 2)


class Nvfp4(Storage):
    """weight uint8 [N, Kp / 2], the even column in the low half; weight_scale float8_e4m3fn [N, Kp / 16]; weight_global_scale
    float32 []."""

    def _quantize(self, weight: torch.Tensor, config: WeightConfig) -> dict[str, torch.Tensor]:
        low, high = torch.aminmax(weight)
        global_scale = nvfp4.global_scale(torch.maximum(-low, high), config.scale_search)

        def quantize(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            codes, scale = nvfp4.quantize(_pad(values, nvfp4.BLOCK), global_scale, config.scale_search)
            return pack(codes, E2M1.bits), scale

        codes, scale = _by_rows(weight, quantize)
        return {"weight": codes, "weight_scale": scale, "weight_global_scale": global_scale}

    def dequantize(self, stored: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        codes = unpack(stored["weight"], E2M1.bits)
        return nvfp4.dequantize(codes, stored["weight_scale"], stored["weight_global_scale"])[:, :in_features]

    def nbytes(self, n: int, k: int, config: WeightConfig) -> int:
        return n * -(-k // nvfp4.BLOCK) * (nvfp4.BLOCK // 2 + 1) + 4


class Mx(Storage):
    """weight_scale uint8 [N, Kp / 32], an exponent: 2**(byte - 127). weight: float8 [N, Kp], or uint8 [N, Kp * bits / 8] with
    the first code in the lowest bits."""

    def __init__(self, element: MiniFloat | torch.dtype) -> None:
        self.element = element

    def _quantize(self, weight: torch.Tensor, config: WeightConfig) -> dict[str, torch.Tensor]:
        def quantize(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            elements, scale = mx.quantize(_pad(values, mx.BLOCK), self.element)
            return pack(elements, self.element.bits) if isinstance(self.element, MiniFloat) else elements, scale

        elements, scale = _by_rows(weight, quantize)
        return {"weight": elements, "weight_scale": scale}

    def dequantize(self, stored: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        elements = stored["weight"]
        if isinstance(self.element, MiniFloat):
            elements = unpack(elements, self.element.bits)
        return mx.dequantize(elements, stored["weight_scale"], self.element)[:, :in_features]

    def nbytes(self, n: int, k: int, config: WeightConfig) -> int:
        bits = self.element.bits if isinstance(self.element, MiniFloat) else 8
        return n * -(-k // mx.BLOCK) * (mx.BLOCK * bits // 8 + 1)


def _pad(values: torch.Tensor, block: int) -> torch.Tensor:
    return F.pad(values, (0, -values.shape[1] % block))


def _by_rows(weight: torch.Tensor, quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """`quantize` on some rows at a time in float32, so that the temporaries of a large weight stay small."""
    rows = max(1, (_CPU_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK) // weight.shape[1])
    parts = [quantize(part.float().contiguous()) for part in weight.split(rows)]
    return tuple(_concatenate(tensors) for tensors in zip(*parts, strict=True))


def _concatenate(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    if parts[0].dtype.itemsize > 1:
        return torch.cat(parts)
    # Older versions of torch concatenate bytes on every device, and float8 on some.
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


STORAGES: dict[str, Storage] = {
    "int8": RowScaled(torch.int8),
    "int4": Int4(),
    "float8_e4m3fn": RowScaled(torch.float8_e4m3fn),
    "float8_e5m2": RowScaled(torch.float8_e5m2),
    "float8_e4m3fnuz": RowScaled(torch.float8_e4m3fnuz),
    "nvfp4": Nvfp4(),
    "mxfp4": Mx(E2M1),
    "mxfp6_e2m3": Mx(E2M3),
    "mxfp6_e3m2": Mx(E3M2),
    "mxfp8_e4m3fn": Mx(torch.float8_e4m3fn),
    "mxfp8_e5m2": Mx(torch.float8_e5m2),
}
