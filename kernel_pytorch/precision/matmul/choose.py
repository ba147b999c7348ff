"""Which way of computing a layer gets: by scheme, device and shape."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection

import torch

from kernel_pytorch.kernels import int8_linear
from kernel_pytorch.precision.matmul.base import Matmul
from kernel_pytorch.precision.matmul.cpu_int8 import CpuInt8
from kernel_pytorch.precision.matmul.dequantize import Dequantize, Emulate
from kernel_pytorch.precision.matmul.int8 import Int8Mm
from kernel_pytorch.precision.matmul.scaled_mm import MULTIPLE, ScaledMm
from kernel_pytorch.precision.matmul.skinny import SkinnyQuantized, SkinnyWeightOnly
from kernel_pytorch.schema import ActivationConfig, ActivationGranularity, ActivationMode, WeightConfig

# Formats whose bytes the skinny kernel unpacks.
SKINNY_8_BIT = ("int8", "float8_e4m3fn")


def choose(
    weight: WeightConfig, activation: ActivationConfig, shape: tuple[int, int], device: torch.device, isa: Collection[str]
) -> Matmul:
    """shape: (out_features, in_features). isa: the CPU's instruction sets."""
    n, k = shape
    on_gpu = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if activation.mode is ActivationMode.none:
        return SkinnyWeightOnly() if on_gpu and weight.format in SKINNY_8_BIT else Dequantize()
    if activation.format == "int8":
        if on_gpu:
            return SkinnyQuantized("int8_mm") if n % 8 == 0 else Int8Mm()
        return _on_cpu(activation, k, isa)
    if device.type != "cuda":
        return Emulate()
    return SkinnyQuantized("scaled_mm") if on_gpu and weight.format in SKINNY_8_BIT and n % MULTIPLE == 0 else ScaledMm()


def _on_cpu(activation: ActivationConfig, k: int, isa: Collection[str]) -> Matmul:
    by_token = activation.mode is ActivationMode.dynamic and activation.granularity is ActivationGranularity.token
    name, _ = int8_linear.choose(isa) if by_token and k <= int8_linear.MAX_K else (None, "")
    return Int8Mm() if name is None else CpuInt8(name)
