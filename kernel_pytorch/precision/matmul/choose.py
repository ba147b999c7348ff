"""Which way of computing a layer gets: by scheme, device and shape."""

from __future__ import annotations

from collections.abc import Collection

from kernel_pytorch.backends.capabilities import cpu_has
from kernel_pytorch.kernels import int8_linear
from kernel_pytorch.precision.matmul.base import HAS_TRITON, Matmul, Stored
from kernel_pytorch.precision.matmul.cpu_int8 import CpuInt8
from kernel_pytorch.precision.matmul.dequantize import Dequantize, Emulate
from kernel_pytorch.precision.matmul.int8 import MULTIPLE as INT8_MULTIPLE
from kernel_pytorch.precision.matmul.int8 import Int8Mm
from kernel_pytorch.precision.matmul.scaled_mm import MULTIPLE as FP8_MULTIPLE
from kernel_pytorch.precision.matmul.scaled_mm import ScaledMm
from kernel_pytorch.schema import ActivationConfig, ActivationGranularity, ActivationMode, WeightConfig

# Formats whose bytes the skinny kernel unpacks.
SKINNY_8_BIT = ("int8", "float8_e4m3fn")


def choose(weight: WeightConfig, activation: ActivationConfig, shape: tuple[int, int], stored: Stored, isa: Collection[str]) -> Matmul:
    """shape: (out_features, in_features). stored: the canonical buffers. isa: the CPU's instruction sets."""
    n, k = shape
    device = stored["weight"].device
    if activation.format == "nvfp4":
        return Emulate()
    if device.type != "cuda":
        return _on_cpu(activation, k, isa) if activation.format == "int8" else Dequantize() if activation.format is None else Emulate()
    fast = _on_gpu(weight, activation, n, stored) if HAS_TRITON else None
    if fast is not None:
        return fast
    return Dequantize() if activation.format is None else Int8Mm() if activation.format == "int8" else ScaledMm()


def _on_gpu(weight: WeightConfig, activation: ActivationConfig, n: int, stored: Stored) -> Matmul | None:
    """What reads packed bytes for few rows; None for formats and widths that have no such kernel."""
    # Triton is not on every platform; nothing else here needs it.
    from kernel_pytorch.precision.matmul import skinny4
    from kernel_pytorch.precision.matmul.skinny import SkinnyQuantized, SkinnyWeightOnly

    if skinny4.fits(weight, activation, stored):
        return skinny4.Skinny4()
    if weight.format not in SKINNY_8_BIT:
        return None
    if activation.mode is ActivationMode.none:
        return SkinnyWeightOnly()
    if activation.format == "int8":
        return SkinnyQuantized("int8_mm") if n % INT8_MULTIPLE == 0 else None
    return SkinnyQuantized("scaled_mm") if n % FP8_MULTIPLE == 0 else None


def _on_cpu(activation: ActivationConfig, k: int, isa: Collection[str]) -> Matmul:
    # Without a dot product of bytes, oneDNN's int8 matmul adds pairs in 16 bits, which saturate: its sums are wrong.
    if not cpu_has(isa, "int8_matmul"):
        return Emulate()
    by_token = activation.mode is ActivationMode.dynamic and activation.granularity is ActivationGranularity.token
    name, _ = int8_linear.choose(isa) if by_token and k <= int8_linear.MAX_K else (None, "")
    return Int8Mm() if name is None else CpuInt8(name)
