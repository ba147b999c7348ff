"""What hardware can do, as data: the least NVIDIA compute capability, or the CPU flags, that each feature needs.

Answers are None when the architecture is unknown: never a guess.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Capability:
    """min_sm: least compute capability, major * 10 + minor. source: who says so."""

    feature: str
    min_sm: int
    source: str


NVIDIA: dict[str, Capability] = {
    c.feature: c
    for c in (
        Capability("fp16_matmul", 70, "CUDA C++ Programming Guide, tensor cores by compute capability"),
        Capability("bf16_matmul", 80, "CUDA C++ Programming Guide, tensor cores by compute capability"),
        Capability("tf32_matmul", 80, "CUDA C++ Programming Guide, tensor cores by compute capability"),
        Capability("int8_matmul", 75, "NVIDIA Turing whitepaper: INT8 tensor cores"),
        Capability("fp8_matmul", 89, "torch._scaled_mm: compute capability 8.9 or 9.0 and newer"),
        Capability("flash_sdpa", 80, "PyTorch sdp_utils.cpp, check_sm_version of flash attention"),
        Capability("efficient_sdpa", 50, "PyTorch sdp_utils.cpp, check_sm_version of memory-efficient attention"),
        Capability("cudnn_sdpa", 80, "PyTorch sdp_utils.cpp, check_cudnn_hardware_support"),
        Capability("triton", 70, "PyTorch torch.utils._triton: compute capability 7.0 or newer"),
    )
}

# Any one of these flags gives the CPU an instruction for the feature.
CPU: dict[str, tuple[str, ...]] = {
    "int8_matmul": ("amx_int8", "avx512_vnni", "avx_vnni", "dotprod", "i8mm"),
    "bf16_matmul": ("amx_bf16", "avx512_bf16", "bf16"),
    # avx512_bf16 multiplies bf16 at about the rate of fp32 and pays for conversions: measured slower than fp32.
    "bf16_speedup": ("amx_bf16",),
}


def sm_number(arch: str | None) -> int | None:
    """90 for `sm_90`, 100 for `sm_100` and `sm_100a`; None for anything else."""
    if arch is None or not arch.startswith("sm_"):
        return None
    digits = arch[3:].rstrip("af")
    return int(digits) if digits.isdigit() else None


def nvidia_has(arch: str | None, feature: str) -> bool | None:
    """Whether an NVIDIA architecture has `feature`; None when the architecture is unknown. KeyError for an unknown feature."""
    number = sm_number(arch)
    needed = NVIDIA[feature].min_sm
    return None if number is None else number >= needed


def cpu_has(isa: Collection[str], feature: str) -> bool:
    """Whether one of the flags in `isa` gives `feature`. KeyError for an unknown feature."""
    return any(flag in isa for flag in CPU[feature])


def needs(feature: str) -> str:
    """`sm_89 or newer`: what a message says that a feature needs on NVIDIA hardware."""
    return f"sm_{NVIDIA[feature].min_sm} or newer"
