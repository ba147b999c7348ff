"""What hardware can do, as data: by NVIDIA compute capability, by AMD architecture, by CPU flag, with who says so.

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
        Capability("flash_sdpa", 80, "PyTorch sdp_utils.cpp, check_sm_version of flash attention"),
        Capability("efficient_sdpa", 50, "PyTorch sdp_utils.cpp, check_sm_version of memory-efficient attention"),
        Capability("cudnn_sdpa", 80, "PyTorch sdp_utils.cpp, check_cudnn_hardware_support"),
        Capability("triton", 70, "PyTorch torch.utils._triton: compute capability 7.0 or newer"),
    )
}


@dataclass(frozen=True)
class AmdArch:
    """features: names of NVIDIA's table that this architecture has under torch 2.9 and newer. source: who says so."""

    features: frozenset[str]
    source: str


_ATTENTION = "torch.testing._internal.common_cuda of 2.13: evaluate_platform_supports_flash_attention"
_MATMUL = frozenset({"fp16_matmul", "bf16_matmul", "triton"})
_SDPA = _MATMUL | {"flash_sdpa", "efficient_sdpa"}
# An architecture that is not here is unknown: AMD's numbers are no order of features.
AMD: dict[str, AmdArch] = {
    "gfx90a": AmdArch(_SDPA, f"CDNA2 instruction set, MFMA; {_ATTENTION}"),
    "gfx942": AmdArch(_SDPA, f"CDNA3 instruction set, MFMA; {_ATTENTION}"),
    "gfx950": AmdArch(_SDPA, f"CDNA4 instruction set, MFMA; {_ATTENTION}"),
    "gfx1100": AmdArch(_SDPA, f"RDNA3 instruction set, WMMA; {_ATTENTION}"),
    "gfx1201": AmdArch(_SDPA, f"RDNA4 instruction set, WMMA; {_ATTENTION}"),
    # Attention kernels are experimental on these, and off without an environment variable; gfx1103 has none.
    "gfx1101": AmdArch(_MATMUL, f"RDNA3 instruction set, WMMA; {_ATTENTION}"),
    "gfx1102": AmdArch(_MATMUL, f"RDNA3 instruction set, WMMA; {_ATTENTION}"),
    "gfx1103": AmdArch(_MATMUL, f"RDNA3 instruction set, WMMA; {_ATTENTION}"),
    "gfx1150": AmdArch(_MATMUL, f"RDNA3.5 instruction set, WMMA; {_ATTENTION}"),
    "gfx1151": AmdArch(_MATMUL, f"RDNA3.5 instruction set, WMMA; {_ATTENTION}"),
    "gfx1200": AmdArch(_MATMUL, f"RDNA4 instruction set, WMMA; {_ATTENTION}"),
}


@dataclass(frozen=True)
class MatmulFormat:
    """A number format of which torch multiplies two matrices on the matrix unit. min_sm: least compute capability, None
    where no NVIDIA GPU does. amd: architectures. source: who says so."""

    format: str
    min_sm: int | None
    amd: tuple[str, ...]
    source: str


_SCALED_MM = "PyTorch ScaledBlas.cpp"
# torch multiplies int8 through hipBLASLt, which is built for these of the architectures above.
_HIPBLASLT = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1101", "gfx1103", "gfx1150", "gfx1151", "gfx1200", "gfx1201")
# float8_e5m2 is missing: cuBLASLt multiplies it with e4m3 only, and torch on ROCm takes scales of rows for e4m3 only.
# So are the MX formats of 6 bits, which torch multiplies nowhere. mxfp4 on NVIDIA needs a build with MSLK, which releases are not.
MATMUL_FORMATS: dict[str, MatmulFormat] = {
    m.format: m
    for m in (
        MatmulFormat("int8", 80, _HIPBLASLT, "torch._int_mm: cuBLASLt from sm_80; PyTorch CUDAHooks.cpp, getHipblasltSupportedArchs"),
        MatmulFormat("float8_e4m3fn", 89, ("gfx950", "gfx1200", "gfx1201"), f"{_SCALED_MM}, _scaled_mm_allowed_device and its row scales"),
        MatmulFormat("float8_e4m3fnuz", None, ("gfx942",), f"{_SCALED_MM}, _scaled_mm_is_fnuz"),
        MatmulFormat("mxfp8_e4m3fn", 100, ("gfx950",), "torch.testing._internal.common_cuda of 2.13: evaluate_platform_supports_mx_gemm"),
        MatmulFormat("mxfp4", None, ("gfx950",), f"{_SCALED_MM}, blocks of 32 with ROCm 7.0 or newer"),
        MatmulFormat("nvfp4", 100, (), f"{_SCALED_MM}, blocks of 16 with float8_e4m3fn scales"),
    )
}


@dataclass(frozen=True)
class MatrixRows:
    """rows: of the output of one 16-bit matrix instruction: fewer rows of work cost as many. source: who says so."""

    rows: int
    source: str


_PTX, _ISA = "PTX ISA", "instruction set"
# The number of sm_NN, or AMD's architecture; an architecture that is not here is unknown.
MATRIX_ROWS: dict[int | str, MatrixRows] = {
    **{sm: MatrixRows(16, f"{_PTX}, wmma.mma .m16n16k16") for sm in (70, 72, 75)},
    **{sm: MatrixRows(16, f"{_PTX}, mma.sync .m16n8k16") for sm in (80, 86, 87, 89, 120, 121)},
    90: MatrixRows(64, f"{_PTX}, wgmma.mma_async .m64nNk16"),
    **{sm: MatrixRows(128, f"{_PTX}, tcgen05.mma kind::f16, M of one CTA at most 128") for sm in (100, 101, 103)},
    **{arch: MatrixRows(32, f"CDNA {_ISA}, V_MFMA_F32_32X32X8") for arch in ("gfx90a", "gfx942", "gfx950")},
    **{arch: MatrixRows(16, f"RDNA {_ISA}, V_WMMA_F32_16X16X16") for arch in AMD if arch.startswith(("gfx11", "gfx12"))},
}


def matrix_rows(arch: str | None) -> int | None:
    """Output rows of one 16-bit matrix instruction of a GPU; None when the architecture is unknown."""
    row = MATRIX_ROWS.get(sm_number(arch) or arch or "")
    return None if row is None else row.rows


# NVIDIA architectures whose FP8 matmul can add up in less than float32: cuBLAS documentation, CUBLASLT_MATMUL_DESC_FAST_ACCUM ("has an
# effect on the following GPUs: Ada, Hopper"); PyTorch RowwiseScaledMM.cu, whose kernels for sm_100 and sm_120 do not read it either.
FAST_ACCUMULATION = (89, 90)


def adds_fast(arch: str | None) -> bool:
    """Whether fast accumulation is anything on a GPU; False when the architecture is unknown."""
    return sm_number(arch) in FAST_ACCUMULATION


@dataclass(frozen=True)
class CpuFeature:
    """flags: any one of them gives the CPU an instruction for the feature. source: who says so."""

    flags: tuple[str, ...]
    source: str


_X86, _ARM = "Intel Instruction Set Extensions Programming Reference", "Arm Architecture Reference Manual, A-profile"
CPU: dict[str, CpuFeature] = {
    "int8_matmul": CpuFeature(
        ("amx_int8", "avx512_vnni", "avx_vnni", "dotprod", "i8mm"), f"{_X86}: TDPBSSD, VPDPBUSD; {_ARM}: SDOT, SMMLA"
    ),
    "bf16_matmul": CpuFeature(("amx_bf16", "avx512_bf16", "bf16"), f"{_X86}: TDPBF16PS, VDPBF16PS; {_ARM}: BFMMLA"),
    # avx512_bf16 multiplies bf16 at about the rate of fp32 and pays for conversions.
    "bf16_speedup": CpuFeature(("amx_bf16",), "measured on a Xeon with both: bf16 through avx512_bf16 alone is slower than fp32"),
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


def has(arch: str | None, feature: str) -> bool | None:
    """Whether a GPU's architecture, of either vendor, has `feature`; None when it is unknown. KeyError for an unknown feature."""
    if arch in AMD and feature in NVIDIA:
        return feature in AMD[arch].features
    return nvidia_has(arch, feature)


def matmul_formats(arch: str | None) -> tuple[str, ...] | None:
    """Number formats of which torch multiplies two matrices on a GPU's matrix unit; None when the architecture is unknown."""
    number = sm_number(arch)
    if number is None and arch not in AMD:
        return None
    return tuple(
        name for name, row in MATMUL_FORMATS.items() if arch in row.amd or (number is not None and number >= (row.min_sm or number + 1))
    )


def matmul_dtypes(arch: str | None) -> tuple[str, ...]:
    """torch's 16-bit types that a GPU's matrix unit multiplies; none when the architecture is unknown."""
    return tuple(dtype for dtype, feature in (("float16", "fp16_matmul"), ("bfloat16", "bf16_matmul")) if has(arch, feature))


def matmul_needs(format: str) -> str:
    """`sm_89 or newer, or gfx950, gfx1200, gfx1201`: where torch multiplies two matrices of a format; empty when nowhere."""
    row = MATMUL_FORMATS.get(format)
    if row is None:
        return ""
    return ", or ".join(filter(None, ("" if row.min_sm is None else f"sm_{row.min_sm} or newer", ", ".join(row.amd))))


def cpu_has(isa: Collection[str], feature: str) -> bool:
    """Whether one of the flags in `isa` gives `feature`. KeyError for an unknown feature."""
    return any(flag in isa for flag in CPU[feature].flags)


def needs(feature: str, arch: str | None = None) -> str:
    """`sm_80 or newer`: what a message says that a feature needs; for an AMD architecture, AMD's that have it."""
    amd = [name for name, row in AMD.items() if feature in row.features] if arch is not None and arch.startswith("gfx") else []
    return ", ".join(amd) or f"sm_{NVIDIA[feature].min_sm} or newer"
