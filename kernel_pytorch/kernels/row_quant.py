"""Row quantization (int8, float8), alone or with the RMSNorm or SwiGLU before it: one kernel that reads each input byte once.

A row's codes span its largest magnitude or, with a zero point, its range. The arithmetic is torch's, operation by operation,
so that the codes are those of `reference`; a norm or SwiGLU is rounded to the input's dtype before it is quantized, as an
unfused model rounds it. A row with a NaN or an infinity gets a scale that is one.

M rows, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from kernel_pytorch.kernels import row_quant_jit as jit
from kernel_pytorch.kernels.device import Device, device

# (M, K) that tests and the benchmark share: Llama widths from one row up, then odd widths, narrow ones, no rows.
LLAMA = tuple((m, k) for k in (4096, 8192, 14336) for m in (1, 16, 128, 1024, 8192))
SHAPES = (*LLAMA, (3, 28672), (7, 200), (33, 1000), (5, 4099), (130, 1), (9, 384), (0, 64))

FORMATS = {
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A program holds a whole row in registers.
MAX_COLUMNS = 65536
# Keeps limit / span finite in float32; a row whose values are all smaller becomes zeros.
TINY = 1e-30


class Rows(NamedTuple):
    """q [M, K]; scale and zero_point float32 [M], zero_point None where codes are symmetric. x ~ scale * (q - zero_point)."""

    q: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None


class NormRows(NamedTuple):
    """rows: the norm's codes. norm [M, K]: the norm itself, None unless kept. total [M, K]: x + residual, None without one."""

    rows: Rows
    norm: torch.Tensor | None
    total: torch.Tensor | None


def reference(x: torch.Tensor, format: str, *, symmetric: bool = True) -> Rows:
    """x [M, K] -> its codes, in plain torch."""
    values, dtype = x.float(), FORMATS[format]
    if not symmetric:
        low, high = values.amin(1).clamp_max(0), values.amax(1).clamp_min(0)
        span = (high - low).clamp_min(TINY)
        inverse = 255.0 / span
        zero_point = torch.round(-low * inverse) - 128.0
        codes = torch.round(values * inverse[:, None]) + zero_point[:, None]
        return Rows(codes.clamp(-128.0, 127.0).to(dtype), span / 255.0, zero_point)
    limit = 127.0 if format == "int8" else torch.finfo(dtype).max
    span = values.abs().amax(1).clamp_min(TINY)
    scaled = (values * (limit / span)[:, None]).clamp(-limit, limit)
    return Rows((torch.round(scaled) if format == "int8" else scaled).to(dtype), span / limit, None)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension in float32 (float64 for float64), rounded once.    Source: arXiv:1910.07467, eq. 4"""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, each rounded to the input's dtype.    Source: arXiv:2002.05202, eq. 6"""
    return F.silu(gate) * up


@dataclass(frozen=True)
class Config:
    """rows: of one program. block: columns it holds, a power of two. overlap: it may start while the kernel before it ends."""

    rows: int
    block: int
    num_warps: int
    overlap: bool


def choose(k: int, on: Device) -> Config:
    """Narrow rows several a program; wide ones by as many warps as hold them in registers."""
    block = max(16, int(triton.next_power_of_2(k)))
    rows = max(1, 2048 // block)
    return Config(rows, block, max(1, min(32, rows * block // 1024)), on.dependent_launch)


# What each operator allocates: q, scale, zero point (no elements where codes are symmetric).
_Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def empty_codes(x: torch.Tensor, format: str, symmetric: bool) -> _Codes:
    m = x.shape[0]
    q = torch.empty(x.shape, dtype=FORMATS[format], device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    return q, scale, torch.empty(0 if symmetric else m, dtype=torch.float32, device=x.device)


def launch(
    kernel: Any,
    inputs: tuple[torch.Tensor, ...],
    codes: _Codes,
    rest: tuple[Any, ...],
    format: str,
    symmetric: bool,
    *,
    config: Config | None = None,
    on: Device | None = None,
    **flags: bool,
) -> None:
    """Fills `codes` by one of the three kernels, on this device with this configuration where given.

    inputs: what the kernel takes before q. rest: what it takes between K and its flags."""
    q = codes[0]
    m, k = q.shape
    if m == 0:
        return
    # Without a GPU only Triton's interpreter runs this.
    on = on or device(q.device.index)
    config = config or choose(k, on)
    extra = {"launch_pdl": True} if config.overlap else {}
    with torch.cuda.device_of(q):
        kernel[(-(-m // config.rows),)](
            *inputs,
            triton.reinterpret(q, tl.int8),
            *codes[1:],
            m,
            k,
            *rest,
            FORMAT=format,
            SYMMETRIC=symmetric,
            NATIVE=on.convert_fp8,
            ROWS=config.rows,
            BLOCK=config.block,
            EVEN=k == config.block,
            PDL=config.overlap,
            num_warps=config.num_warps,
            # A product and a sum contracted into one rounding would move codes.
            enable_fp_fusion=False,
            **flags,
            **extra,
        )


# Not custom_op: its checks at each call cost an eager caller as much as a launch.
_LIBRARY = torch.library.Library("kernel_pytorch", "FRAGMENT")
_LIBRARY.define("quantize_rows(Tensor x, str format, bool symmetric) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define("swiglu_quantize(Tensor gate, Tensor up, str format, bool symmetric) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "rms_norm_quantize(Tensor x, Tensor? weight, float eps, Tensor? residual, str format, bool symmetric, bool keep_norm)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _quantize_rows(x: torch.Tensor, format: str, symmetric: bool) -> _Codes:
    codes = empty_codes(x, format, symmetric)
    launch(jit.quantize, (x,), codes, (x.stride(0),), format, symmetric)
    return codes


def _swiglu_quantize(gate: torch.Tensor, up: torch.Tensor, format: str, symmetric: bool) -> _Codes:
    codes = empty_codes(gate, format, symmetric)
    launch(jit.swiglu, (gate, up), codes, (gate.stride(0), up.stride(0)), format, symmetric)
    return codes


def _rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None, format: str, symmetric: bool, keep_norm: bool
) -> tuple[torch.Tensor, ...]:
    q, scale, zero, norm, total = _empty_norm(x, weight, eps, residual, format, symmetric, keep_norm)
    # An absent tensor's pointer is never read.
    given = x if residual is None else residual
    launch(
        jit.rms_norm,
        (x, x if weight is None else weight, given),
        (q, scale, zero),
        (x.stride(0), given.stride(0), eps, norm, total),
        format,
        symmetric,
        HAS_WEIGHT=weight is not None,
        HAS_RESIDUAL=residual is not None,
        KEEP_NORM=keep_norm,
    )
    return q, scale, zero, norm, total


def _empty_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None, format: str, symmetric: bool, keep_norm: bool
) -> tuple[torch.Tensor, ...]:
    norm = torch.empty(x.shape if keep_norm else (0,), dtype=x.dtype, device=x.device)
    total = torch.empty((0,) if residual is None else x.shape, dtype=x.dtype, device=x.device)
    return *empty_codes(x, format, symmetric), norm, total


for _name, _run, _fake in (
    ("quantize_rows", _quantize_rows, empty_codes),
    ("swiglu_quantize", _swiglu_quantize, lambda gate, up, format, symmetric: empty_codes(gate, format, symmetric)),
    ("rms_norm_quantize", _rms_norm_quantize, _empty_norm),
):
    for _key in ("CUDA", "CPU"):
        _LIBRARY.impl(_name, _run, _key)
    torch.library.register_fake(f"kernel_pytorch::{_name}", _fake, lib=_LIBRARY)

_OPS = torch.ops.kernel_pytorch


def quantize_rows(x: torch.Tensor, format: str, *, symmetric: bool = True) -> Rows:
    """x [M, K] bfloat16, float16 or float32 with contiguous rows; format a name of FORMATS, a zero point (symmetric=False) for
    int8 only. Raises ValueError."""
    _check(format, symmetric, x=x)
    q, scale, zero = _OPS.quantize_rows.default(x, format, symmetric)
    return Rows(q, scale, None if symmetric else zero)


def swiglu_quantize(gate: torch.Tensor, up: torch.Tensor, format: str, *, symmetric: bool = True) -> Rows:
    """The codes of silu(gate) * up, both [M, K] with contiguous rows: of one [M, 2K] tensor, `*x.chunk(2, dim=1)`. Otherwise as
    `quantize_rows`."""
    _check(format, symmetric, gate=gate, up=up)
    q, scale, zero = _OPS.swiglu_quantize.default(gate, up, format, symmetric)
    return Rows(q, scale, None if symmetric else zero)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    format: str,
    symmetric: bool = True,
    keep_norm: bool = False,
) -> NormRows:
    """The codes of RMSNorm(x + residual) * weight: x and residual [M, K], weight [K] of any floating dtype, eps > 0
    (dimensionless). keep_norm: also return the norm that was quantized. Otherwise as `quantize_rows`."""
    _check(format, symmetric, x=x, **({} if residual is None else {"residual": residual}))
    if weight is not None and (weight.shape != x.shape[1:] or not weight.is_contiguous()):
        raise ValueError(f"row_quant: weight must be contiguous [{x.shape[1]}], got {tuple(weight.shape)}")
    q, scale, zero, norm, total = _OPS.rms_norm_quantize.default(x, weight, eps, residual, format, symmetric, keep_norm)
    rows = Rows(q, scale, None if symmetric else zero)
    return NormRows(rows, norm if keep_norm else None, None if residual is None else total)


def _check(format: str, symmetric: bool, **tensors: torch.Tensor) -> None:
    if format not in FORMATS:
        raise ValueError(f"row_quant: format must be one of {', '.join(FORMATS)}, got {format}")
    if not symmetric and format != "int8":
        raise ValueError(f"row_quant: only int8 has a zero point, not {format}")
    first = next(iter(tensors.values()))
    for name, x in tensors.items():
        if x.dim() != 2 or x.dtype not in DTYPES or x.dtype != first.dtype or x.shape != first.shape:
            raise ValueError(f"row_quant: {name} must be [M, K] bfloat16, float16 or float32, all alike, got {x.dtype} {tuple(x.shape)}")
        if not 1 <= x.shape[1] <= MAX_COLUMNS:
            raise ValueError(f"row_quant: {name} must have 1 to {MAX_COLUMNS} columns, got {x.shape[1]}")
        if x.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(f"row_quant: the rows of {name} must be contiguous, got strides {x.stride()}")
