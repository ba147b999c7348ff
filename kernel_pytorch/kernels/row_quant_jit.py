"""Triton kernels of row_quant: a program holds whole rows in registers, so each is read once, however many passes its codes need."""

# Triton evaluates constexpr and tl.extra.cuda while it compiles; their annotations say otherwise.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

_TINY = tl.constexpr(1e-30)
# 1.5 * 2 ** 23: adding it rounds a small float32 half to even and leaves the integer in the low bits.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _float8_bits(v, MANTISSA: tl.constexpr, BIAS: tl.constexpr, SIGNED_ZERO: tl.constexpr):
    """float32 rounded to nearest even, with integer operations every target has. |v| is at most what rounds to the largest code."""
    bits = v.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    DROPPED: tl.constexpr = 23 - MANTISSA
    # Below the smallest normal number codes count one step, which is the unit in the last place of STEPS plus the number.
    STEPS: tl.constexpr = 2.0 ** (DROPPED + 1 - BIAS)
    STEPS_BITS: tl.constexpr = (128 + DROPPED - BIAS) << 23
    small = (tl.abs(v) + STEPS).to(tl.int32, bitcast=True) - STEPS_BITS
    rounded = magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)
    normal = (rounded >> DROPPED) - ((127 - BIAS) << MANTISSA)
    code = tl.where(magnitude < ((128 - BIAS) << 23), small, normal)
    sign = (bits >> 24) & 0x80
    if not SIGNED_ZERO:
        sign = tl.where(code == 0, 0, sign)
    return (code | sign).to(tl.int8)


@triton.jit
def _float8(v, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    if FORMAT == "float8_e4m3fn":
        if NATIVE:
            return v.to(tl.float8e4nv).to(tl.int8, bitcast=True)
        else:
            return _float8_bits(v, 3, 7, True)
    elif FORMAT == "float8_e5m2":
        if NATIVE:
            return v.to(tl.float8e5).to(tl.int8, bitcast=True)
        else:
            return _float8_bits(v, 2, 15, True)
    else:
        tl.static_assert(FORMAT == "float8_e4m3fnuz")
        return _float8_bits(v, 3, 8, False)


@triton.jit
def _store_codes(
    v, q_ptr, scale_ptr, zero_ptr, row, column, inside, M, K, FORMAT: tl.constexpr, SYMMETRIC: tl.constexpr, NATIVE: tl.constexpr
):
    """v [R, B] float32, zero past a row's end."""
    # As integers, so that a NaN, above infinity there, wins.
    largest = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    low = tl.minimum(tl.min(v, 1), 0.0)
    if SYMMETRIC:
        span = largest
    else:
        high = tl.maximum(tl.max(v, 1), 0.0)
        span = tl.where(largest == largest, high - low, largest)
    span = tl.maximum(span, _TINY, propagate_nan=tl.PropagateNan.ALL)
    if FORMAT == "int8":
        LIMIT: tl.constexpr = 127.0 if SYMMETRIC else 255.0
    else:
        LIMIT: tl.constexpr = 448.0 if FORMAT == "float8_e4m3fn" else 57344.0 if FORMAT == "float8_e5m2" else 240.0
    # Two roundings, as torch's `number / tensor` has; and its `tensor / number` multiplies on a GPU.
    inverse = tl.div_rn(1.0, span) * LIMIT
    scale = span * (1.0 / LIMIT)
    # At most the limit and two roundings, which is the limit in any of the formats: nothing to clamp.
    scaled = v * inverse[:, None]
    if not SYMMETRIC:
        zero = ((-low * inverse + _ROUND) - _ROUND) - 128.0
        tl.store(zero_ptr + row, zero, mask=row < M)
        code = tl.minimum(((scaled + _ROUND) - _ROUND) + zero[:, None], 127.0)
        code = (code + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    elif FORMAT == "int8":
        code = (scaled + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        code = _float8(scaled, FORMAT, NATIVE)
    tl.store(q_ptr + row.to(tl.int64)[:, None] * K + column[None, :], code, mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < M)


@triton.jit
def _tile(M, K, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row[:, None] < M
    if not EVEN:
        inside = inside & (column[None, :] < K)
    return row, column, inside


@triton.jit
def _load(ptr, row, column, stride, inside):
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def quantize(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    M,
    K,
    x_stride,
    FORMAT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    row, column, inside = _tile(M, K, ROWS, BLOCK, EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
    v = _load(x_ptr, row, column, x_stride, inside)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    _store_codes(v, q_ptr, scale_ptr, zero_ptr, row, column, inside, M, K, FORMAT, SYMMETRIC, NATIVE)


@triton.jit(do_not_specialize=["M", "eps"])
def rms_norm(
    x_ptr,
    weight_ptr,
    residual_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    M,
    K,
    x_stride,
    residual_stride,
    eps,
    norm_ptr,
    total_ptr,
    FORMAT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEEP_NORM: tl.constexpr,
):
    row, column, inside = _tile(M, K, ROWS, BLOCK, EVEN)
    out = row.to(tl.int64)[:, None] * K + column[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = _load(x_ptr, row, column, x_stride, inside)
    if HAS_RESIDUAL:
        total = (x + _load(residual_ptr, row, column, residual_stride, inside)).to(dtype)
        tl.store(total_ptr + out, total, mask=inside)
        x = total.to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    mean_square = tl.sum(x * x, 1) / K
    y = x * tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]
    if HAS_WEIGHT:
        if EVEN:
            weight = tl.load(weight_ptr + column, eviction_policy="evict_last")
        else:
            weight = tl.load(weight_ptr + column, mask=column < K, other=0.0, eviction_policy="evict_last")
        y *= weight.to(tl.float32)[None, :]
    norm = y.to(dtype)
    if KEEP_NORM:
        tl.store(norm_ptr + out, norm, mask=inside)
    _store_codes(norm.to(tl.float32), q_ptr, scale_ptr, zero_ptr, row, column, inside, M, K, FORMAT, SYMMETRIC, NATIVE)


@triton.jit(do_not_specialize=["M"])
def swiglu(
    gate_ptr,
    up_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    M,
    K,
    gate_stride,
    up_stride,
    FORMAT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    row, column, inside = _tile(M, K, ROWS, BLOCK, EVEN)
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_wait()
    gate = _load(gate_ptr, row, column, gate_stride, inside)
    up = _load(up_ptr, row, column, up_stride, inside)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # silu is rounded by itself, as where it is a kernel of its own.
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    product = (active * up).to(dtype).to(tl.float32)
    _store_codes(product, q_ptr, scale_ptr, zero_ptr, row, column, inside, M, K, FORMAT, SYMMETRIC, NATIVE)
