"""Linear with 8-bit weights and 16-bit inputs for few rows: y = (x @ w.T) * scale + bias, w int8 or float8_e4m3fn.

Bound by the weight's bytes, so weights are the left operand of the matrix instruction and the rows of x its narrow right one.
`pack` stores a weight once in the kernel's order; `reference` says what is computed; `linear` runs the operator.

N out features, K in features, M rows, S slices of K that warps of one program share.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

# (M, N, K) that tests and the benchmark share: Llama-3-8B's decode linears, then widths that no tile divides, one row, no rows.
LLAMA = tuple((n, k) for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)))
ROWS = (1, 2, 4, 8, 16, 32, 64)
SHAPES = (*((m, n, k) for n, k in LLAMA for m in ROWS), (7, 130, 200), (33, 257, 1000), (1, 1, 1), (65, 96, 4100), (0, 64, 64))

DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
# In a group of 128 values word i holds values i, 32 + i, 64 + i, 96 + i: each byte position is then one contiguous quarter of x.
GROUP, WORDS = 128, 32
MAX_ROWS = 64


@dataclass(frozen=True)
class Config:
    """block_k: values of K a step takes (per slice); split: programs that share a row of tiles; prefetch: bytes of a weight row
    asked of L2 before the kernel waits for the one before it (programmatic dependent launch), -1 to launch without."""

    block_n: int
    block_k: int
    slices: int
    split: int
    num_warps: int
    num_stages: int
    prefetch: int = -1


def pack(weight: torch.Tensor) -> torch.Tensor:
    """int8 or float8_e4m3fn [N, K] -> int32 [N, 32 * ceil(K / 128)], K padded with zeros. Raises ValueError on a NaN."""
    if weight.dtype not in DTYPES.values() or weight.dim() != 2:
        raise ValueError(f"skinny_w8a16.pack: weight must be int8 or float8_e4m3fn [N, K], got {weight.dtype} {tuple(weight.shape)}")
    # The kernel reads the NaN code 0x7f as 480.
    if weight.dtype == torch.float8_e4m3fn and bool(((weight.view(torch.int8) & 0x7F) == 0x7F).any()):
        raise ValueError("skinny_w8a16.pack: the weight holds NaN")
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.view(torch.int8), (0, -k % GROUP))
    return padded.view(n, -1, 4, WORDS).transpose(2, 3).contiguous().view(n, -1).view(torch.int32)


def unpack(packed: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The [N, in_features] weight of that dtype that `pack` was given."""
    n = packed.shape[0]
    values = packed.view(torch.int8).view(n, -1, WORDS, 4).transpose(2, 3).reshape(n, -1)
    return values[:, :in_features].contiguous().view(dtype)


def permute_columns(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] with its columns in the order of `pack`'s bytes, K padded: x @ w.T with both permuted is the same sum, so another
    matrix product can read a packed weight as it is, through `packed.view(dtype)`."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP))
    return padded.unflatten(-1, (-1, 4, WORDS)).transpose(-1, -2).flatten(-3)


def reference(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K] int8 or float8_e4m3fn, scale [N], bias [N] -> [..., N], all in x's dtype."""
    y = (x @ weight.to(x.dtype).t()) * scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def _asm(body: str, selector: str) -> tl.constexpr:
    # $1 and $2 are words of neighbouring i; the selector puts one byte position of both, sign-extended, into 16-bit lanes.
    return tl.constexpr("{\n.reg .b32 t, a, b, c;\nprmt.b32 t, $1, $2, " + selector + ";\n" + body + "}")


_SELECTORS = ("0xc480", "0xd591", "0xe6a2", "0xf7b3")
# s eeee mmm is placed in the wider format's fields; the exponent bias is then off by 120 (bf16) or 8 (f16), which one
# multiplication repairs, subnormals included.
_FP8_BF16 = """shl.b32 t, t, 4;
and.b32 t, t, 0x87f087f0;
mov.b32 a, 0x7b807b80;
mov.b32 b, 0x80008000;
fma.rn.bf16x2 $0, t, a, b;
"""
_FP8_F16 = """shl.b32 t, t, 7;
and.b32 t, t, 0xbf80bf80;
mov.b32 a, 0x5c005c00;
mul.rn.f16x2 $0, t, a;
"""
# low 7 bits over 128.0, minus 128.0 or, where the sign bit moves the exponent up, 256.0.
_INT8_BF16 = """lop3.b32 a, t, 0x007f007f, 0x43004300, 0xea;
lop3.b32 b, t, 0x00800080, 0x43004300, 0xea;
mov.b32 c, 0xbf80bf80;
fma.rn.bf16x2 $0, b, c, a;
"""
# 1024 + (byte ^ 0x80), minus 1152.
_INT8_F16 = """lop3.b32 a, t, 0x00ff00ff, 0x64806480, 0x6a;
mov.b32 b, 0x64806480;
sub.rn.f16x2 $0, a, b;
"""
_A0, _A1, _A2, _A3 = (_asm(_FP8_BF16, s) for s in _SELECTORS)
_B0, _B1, _B2, _B3 = (_asm(_FP8_F16, s) for s in _SELECTORS)
_C0, _C1, _C2, _C3 = (_asm(_INT8_BF16, s) for s in _SELECTORS)
_D0, _D1, _D2, _D3 = (_asm(_INT8_F16, s) for s in _SELECTORS)


@triton.jit
def _bytes(words, J: tl.constexpr, FP8: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Byte position J of each word as f16 (HALF) or bf16."""
    if ASM and HALF:
        if FP8:
            code: tl.constexpr = _B0 if J == 0 else _B1 if J == 1 else _B2 if J == 2 else _B3
        else:
            code: tl.constexpr = _D0 if J == 0 else _D1 if J == 1 else _D2 if J == 2 else _D3
        return tl.inline_asm_elementwise(code, "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    elif ASM:
        if FP8:
            code: tl.constexpr = _A0 if J == 0 else _A1 if J == 1 else _A2 if J == 2 else _A3
        else:
            code: tl.constexpr = _C0 if J == 0 else _C1 if J == 1 else _C2 if J == 2 else _C3
        return tl.inline_asm_elementwise(code, "=r,r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        top = words << (24 - 8 * J)
        if FP8:
            # 2 ** 120
            value = ((top >> 4) & -2014314496).to(tl.float32, bitcast=True) * 1.329227995784916e36
        else:
            value = (top >> 24).to(tl.float32)
        return value.to(tl.float16 if HALF else tl.bfloat16)


@triton.jit
def _load_x(pointers, rows_left, k, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, mask=rows_left, other=0.0, eviction_policy="evict_last")
    else:
        return tl.load(pointers, mask=rows_left & (k < K), other=0.0)


@triton.jit(do_not_specialize=["M"])
def _kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    row_words,
    chunk,
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    split = tl.program_id(1)
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    Q: tl.constexpr = BLOCK_K // 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read the last one and are not stored.
    w_rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64) * row_words
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x_ptr + m.to(tl.int64) * K
    first = split * chunk
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            ahead = tl.minimum(first // 4 + tl.arange(0, PREFETCH // 128) * 32, row_words - 1)
            lines = (w_rows[:, None] + ahead[None, :]).to(tl.int64)
            tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)
        tl.extra.cuda.gdc_wait()
    i = tl.arange(0, Q)
    column = i // 32 * 128 + i % 32
    if SLICES == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in range(first, first + chunk, BLOCK_K):
            words = k // 4 + i
            w_at = w_rows[:, None] + words[None, :]
            if EVEN:
                w = tl.load(w_at, eviction_policy="evict_first")
            else:
                w = tl.load(w_at, mask=words[None, :] < row_words, other=0, eviction_policy="evict_first")
            at = k + column[None, :]
            x_at = x_rows[:, None] + at
            valid = m[:, None] < M
            x0 = _load_x(x_at, valid, at, K, EVEN)
            x1 = _load_x(x_at + 32, valid, at + 32, K, EVEN)
            x2 = _load_x(x_at + 64, valid, at + 64, K, EVEN)
            x3 = _load_x(x_at + 96, valid, at + 96, K, EVEN)
            acc = tl.dot(_bytes(w, 0, FP8, HALF, ASM), tl.trans(x0), acc)
            acc = tl.dot(_bytes(w, 1, FP8, HALF, ASM), tl.trans(x1), acc)
            acc = tl.dot(_bytes(w, 2, FP8, HALF, ASM), tl.trans(x2), acc)
            acc = tl.dot(_bytes(w, 3, FP8, HALF, ASM), tl.trans(x3), acc)
    else:
        # One warp a slice: no tile is shared, the sums meet once at the end.
        s = tl.arange(0, SLICES) * BLOCK_K
        sums = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
        for k in range(first, first + chunk, BLOCK_K * SLICES):
            words = (k + s)[:, None, None] // 4 + i[None, None, :]
            w_at = w_rows[None, :, None] + words
            if EVEN:
                w = tl.load(w_at, eviction_policy="evict_first")
            else:
                w = tl.load(w_at, mask=words < row_words, other=0, eviction_policy="evict_first")
            at = (k + s)[:, None, None] + column[None, None, :]
            x_at = x_rows[None, :, None] + at
            valid = m[None, :, None] < M
            x0 = _load_x(x_at, valid, at, K, EVEN)
            x1 = _load_x(x_at + 32, valid, at + 32, K, EVEN)
            x2 = _load_x(x_at + 64, valid, at + 64, K, EVEN)
            x3 = _load_x(x_at + 96, valid, at + 96, K, EVEN)
            sums = tl.dot(_bytes(w, 0, FP8, HALF, ASM), tl.permute(x0, (0, 2, 1)), sums)
            sums = tl.dot(_bytes(w, 1, FP8, HALF, ASM), tl.permute(x1, (0, 2, 1)), sums)
            sums = tl.dot(_bytes(w, 2, FP8, HALF, ASM), tl.permute(x2, (0, 2, 1)), sums)
            sums = tl.dot(_bytes(w, 3, FP8, HALF, ASM), tl.permute(x3, (0, 2, 1)), sums)
        acc = tl.sum(sums, 0)
    inside = (n[:, None] < N) & (m[None, :] < M)
    if not PARTIAL:
        acc *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0)[:, None]
    out = out_ptr + (split.to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _sum_splits(
    partial_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    inside = n < N
    scale = tl.load(scale_ptr + n, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLIT):
        acc += tl.load(partial_ptr + (s * M + m) * N + n, mask=inside, other=0.0)
    acc *= scale
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=inside, other=0.0)
    tl.store(out_ptr + m * N + n, acc.to(out_ptr.dtype.element_ty), mask=inside)
