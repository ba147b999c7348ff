"""Triton kernels of skinny_w8a16: a weight word is four 8-bit values, one per quarter of its group of 256."""

# Triton evaluates constexpr and tl.extra.cuda while it compiles; their annotations say otherwise.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl

_G, _W = tl.constexpr(256), tl.constexpr(64)


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
def _value(words, J: tl.constexpr, FP8: tl.constexpr):
    """Byte position J of each word as f32, with integer operations every target has."""
    top = words << (24 - 8 * J)
    if FP8:
        # 0x87f00000 keeps s and eeeemmm; 2 ** 120 repairs the exponent.
        return ((top >> 4) & -2014314496).to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        return (top >> 24).to(tl.float32)


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
        return _value(words, J, FP8).to(tl.float16 if HALF else tl.bfloat16)


@triton.jit
def _columns(word, i, Q: tl.constexpr):
    """Column of x that byte position 0 of word + i multiplies, i below Q, word a multiple of Q."""
    if Q < _W and len(i.shape) == 2:
        return tl.max_contiguous(tl.multiple_of(word // _W * _G + word % _W + i, [1, Q]), [1, Q])
    elif Q < _W:
        return tl.max_contiguous(tl.multiple_of(word // _W * _G + word % _W + i, [1, 1, Q]), [1, 1, Q])
    else:
        return word * 4 + (i // _W * _G + i % _W)


@triton.jit
def _load_x(pointers, rows_left, k, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, mask=rows_left, other=0.0, eviction_policy="evict_last")
    else:
        return tl.load(pointers, mask=rows_left & (k < K), other=0.0)


@triton.jit
def _ask_for(w_rows, first, row_words, AHEAD: tl.constexpr):
    """Asks L2 for AHEAD lines of 128 bytes of each row, from word `first` on. Loads must wait for the kernel before, this need not."""
    ahead = tl.minimum(first + tl.arange(0, AHEAD) * 32, row_words - 1)
    lines = (w_rows[:, None] + ahead[None, :]).to(tl.int64)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)


# Their values change with the shape, and a kernel compiled for each gains nothing.
@triton.jit(do_not_specialize=["M", "steps"])
def matrix(
    x_ptr,
    w_ptr,
    scale_ptr,
    row_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    row_words,
    steps,
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    PARTIAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
    LATE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    split = tl.program_id(1)
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    Q: tl.constexpr = BLOCK_K // 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read the last one and are not stored.
    w_rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64) * row_words
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x_ptr + m.to(tl.int64) * K
    first = split * steps
    if EARLY:
        # The kernel before may still run: it can have written x or the weight, so until the wait only L2 is asked.
        _ask_for(w_rows, first * (BLOCK_K * SLICES // 4), row_words, AHEAD)
    if EARLY or LATE:
        tl.extra.cuda.gdc_wait()
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.arange(0, Q)
    if SLICES == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for step in range(first, first + steps):
            word = step * Q
            words = word + i
            w_at = w_rows[:, None] + words[None, :]
            if EVEN:
                w = tl.load(w_at, eviction_policy="evict_first")
            else:
                w = tl.load(w_at, mask=words[None, :] < row_words, other=0, eviction_policy="evict_first")
            at = _columns(word, i[None, :], Q)
            x_at = x_rows[:, None] + at
            valid = m[:, None] < M
            x0 = _load_x(x_at, valid, at, K, EVEN)
            x1 = _load_x(x_at + _W, valid, at + _W, K, EVEN)
            x2 = _load_x(x_at + 2 * _W, valid, at + 2 * _W, K, EVEN)
            x3 = _load_x(x_at + 3 * _W, valid, at + 3 * _W, K, EVEN)
            acc = tl.dot(_bytes(w, 0, FP8, HALF, ASM), tl.trans(x0), acc)
            acc = tl.dot(_bytes(w, 1, FP8, HALF, ASM), tl.trans(x1), acc)
            acc = tl.dot(_bytes(w, 2, FP8, HALF, ASM), tl.trans(x2), acc)
            acc = tl.dot(_bytes(w, 3, FP8, HALF, ASM), tl.trans(x3), acc)
    else:
        # One warp a slice: no tile is shared, the sums meet once at the end.
        s = tl.arange(0, SLICES) * Q
        sums = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
        for step in range(first, first + steps):
            word = (step * (Q * SLICES) + s)[:, None, None]
            words = word + i[None, None, :]
            w_at = w_rows[None, :, None] + words
            if EVEN:
                w = tl.load(w_at, eviction_policy="evict_first")
            else:
                w = tl.load(w_at, mask=words < row_words, other=0, eviction_policy="evict_first")
            at = _columns(word, i[None, None, :], Q)
            x_at = x_rows[None, :, None] + at
            valid = m[None, :, None] < M
            x0 = _load_x(x_at, valid, at, K, EVEN)
            x1 = _load_x(x_at + _W, valid, at + _W, K, EVEN)
            x2 = _load_x(x_at + 2 * _W, valid, at + 2 * _W, K, EVEN)
            x3 = _load_x(x_at + 3 * _W, valid, at + 3 * _W, K, EVEN)
            sums = tl.dot(_bytes(w, 0, FP8, HALF, ASM), tl.permute(x0, (0, 2, 1)), sums)
            sums = tl.dot(_bytes(w, 1, FP8, HALF, ASM), tl.permute(x1, (0, 2, 1)), sums)
            sums = tl.dot(_bytes(w, 2, FP8, HALF, ASM), tl.permute(x2, (0, 2, 1)), sums)
            sums = tl.dot(_bytes(w, 3, FP8, HALF, ASM), tl.permute(x3, (0, 2, 1)), sums)
        acc = tl.sum(sums, 0)
    if LATE:
        tl.extra.cuda.gdc_launch_dependents()
    inside = (n[:, None] < N) & (m[None, :] < M)
    if not PARTIAL:
        acc *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        if HAS_ROW_SCALE:
            acc *= tl.load(row_scale_ptr + m, mask=m < M, other=0.0)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0)[:, None]
    out = out_ptr + (split.to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


# Four e4m3 values of a word as f32, by the conversion that sm_89 and newer have.
_FP8_WORD = tl.constexpr("""{
.reg .b16 l, h, a, b, c, d;
.reg .b32 p, q;
mov.b32 {l, h}, $4;
cvt.rn.f16x2.e4m3x2 p, l;
cvt.rn.f16x2.e4m3x2 q, h;
mov.b32 {a, b}, p;
mov.b32 {c, d}, q;
cvt.f32.f16 $0, a;
cvt.f32.f16 $1, b;
cvt.f32.f16 $2, c;
cvt.f32.f16 $3, d;
}""")
# 2 ** 23 + (byte ^ 0x80), minus 2 ** 23 + 128.
_INT8_WORD = tl.constexpr("""{
.reg .b32 t, c, p;
.reg .f32 f;
mov.b32 c, 0x4b000000;
mov.f32 f, 0f4B000080;
xor.b32 t, $4, 0x80808080;
prmt.b32 p, t, c, 0x7440;
mov.b32 $0, p;
sub.f32 $0, $0, f;
prmt.b32 p, t, c, 0x7441;
mov.b32 $1, p;
sub.f32 $1, $1, f;
prmt.b32 p, t, c, 0x7442;
mov.b32 $2, p;
sub.f32 $2, $2, f;
prmt.b32 p, t, c, 0x7443;
mov.b32 $3, p;
sub.f32 $3, $3, f;
}""")


@triton.jit
def vector(
    x_ptr,
    w_ptr,
    scale_ptr,
    row_scale_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    row_words,
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
    LATE: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row of x, without the matrix unit."""
    Q: tl.constexpr = BLOCK_K // 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64) * row_words
    i = tl.arange(0, Q)
    column = i // _W * _G + i % _W
    if EARLY:
        _ask_for(rows, 0, row_words, AHEAD)
    if EARLY or LATE:
        tl.extra.cuda.gdc_wait()
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_N, Q), tl.float32)
    # Without a dot in the loop Triton prefetches only where the loop itself says so.
    for word in tl.range(0, row_words, Q, num_stages=STAGES):
        at = word * 4 + column
        if EVEN:
            w = tl.load(rows[:, None] + (word + i)[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(rows[:, None] + (word + i)[None, :], mask=(word + i)[None, :] < row_words, other=0, eviction_policy="evict_first")
        x0 = _load_x(x_ptr + at, True, at, K, EVEN).to(tl.float32)
        x1 = _load_x(x_ptr + at + _W, True, at + _W, K, EVEN).to(tl.float32)
        x2 = _load_x(x_ptr + at + 2 * _W, True, at + 2 * _W, K, EVEN).to(tl.float32)
        x3 = _load_x(x_ptr + at + 3 * _W, True, at + 3 * _W, K, EVEN).to(tl.float32)
        if ASM:
            code: tl.constexpr = _FP8_WORD if FP8 else _INT8_WORD
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                code, "=f,=f,=f,=f,r", [w], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1
            )
        else:
            w0, w1, w2, w3 = _value(w, 0, FP8), _value(w, 1, FP8), _value(w, 2, FP8), _value(w, 3, FP8)
        acc += w0 * x0[None, :]
        acc += w1 * x1[None, :]
        acc += w2 * x2[None, :]
        acc += w3 * x3[None, :]
    if LATE:
        tl.extra.cuda.gdc_launch_dependents()
    inside = n < N
    y = tl.sum(acc, 1) * tl.load(scale_ptr + n, mask=inside, other=0.0)
    if HAS_ROW_SCALE:
        y *= tl.load(row_scale_ptr)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=inside)
