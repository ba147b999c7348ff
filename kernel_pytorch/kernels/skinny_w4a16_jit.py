"""Triton kernels of skinny_w4a16: a weight word is eight E2M1 values of neighbouring columns, with a scale byte of its own.

The byte repeats over the words of a block: a tile of scales then has the tile of words' shape, and no layout of registers
has to be converted on the way to the matrix unit."""

# Triton evaluates constexpr and tl.extra.cuda while it compiles; their annotations say otherwise.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl


# $1, $2: neighbouring words; $3: their scales as 16-bit floats. A lane of t holds four values of one word: sign and magnitude
# at bits 15, 8-6; 9, 2-0; 10, 5-3; 14, 13-11. Placed in the wider format's fields, the exponent bias is off by 126 (bf16)
# or 14 (f16).
def _asm(half: str, body: str, mul: str) -> tl.constexpr:
    return tl.constexpr("{\n.reg .b32 t, a, b;\nprmt.b32 t, $1, $2, " + half + ";\n" + body + mul + "\n}")


_BF16 = (
    "and.b32 a, t, 0x81c081c0;\n",
    "shl.b32 a, t, 6;\nand.b32 a, a, 0x81c081c0;\n",
    "shl.b32 a, t, 3;\nshl.b32 b, t, 5;\nand.b32 a, a, 0x01c001c0;\nlop3.b32 a, b, 0x80008000, a, 0xea;\n",
    "shr.u32 a, t, 5;\nshl.b32 b, t, 1;\nand.b32 a, a, 0x01c001c0;\nlop3.b32 a, b, 0x80008000, a, 0xea;\n",
)
_F16 = tuple(
    f"{magnitude} a, t, {by};\nshl.b32 b, t, {sign};\nand.b32 a, a, 0x0e000e00;\nlop3.b32 a, b, 0x80008000, a, 0xea;\n"
    for magnitude, by, sign in (("shl.b32", 3, 0), ("shl.b32", 9, 6), ("shl.b32", 6, 5), ("shr.u32", 2, 1))
)
_HALVES = ("0x5410", "0x7632")
# sm_80 multiplies bf16 pairs only in a sum; adding -0 keeps the sign of a zero.
_MUL_BF16 = "mov.b32 b, 0x80008000;\nfma.rn.bf16x2 $0, a, $3, b;"
_A0, _A1, _A2, _A3, _A4, _A5, _A6, _A7 = (_asm(half, body, _MUL_BF16) for half in _HALVES for body in _BF16)
_B0, _B1, _B2, _B3, _B4, _B5, _B6, _B7 = (_asm(half, body, "mul.rn.f16x2 $0, a, $3;") for half in _HALVES for body in _F16)


@triton.jit
def _scale(code, HALF: tl.constexpr, ASM: tl.constexpr):
    """int8 codes, five exponent and three mantissa bits -> the bits of a 16-bit float, 2 ** 118 (bf16) or 2 ** 6 (f16) times the
    scale; without inline assembly the scale as f32."""
    if ASM and HALF:
        return (code.to(tl.int16) << 7) & 0x7F80
    elif ASM:
        return ((code.to(tl.int16) << 4) & 0xFF0) | 0x7000
    else:
        return (((code.to(tl.int32) & 0xFF) << 20) + (106 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _value(w, s, J: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Value J of each word times its scale times 2 ** -8, as f16 (HALF) or bf16: exact, it has five significant bits."""
    if ASM and HALF:
        low: tl.constexpr = _B0 if J == 0 else _B1 if J == 1 else _B2 if J == 2 else _B3
        high: tl.constexpr = _B4 if J == 4 else _B5 if J == 5 else _B6 if J == 6 else _B7
        return tl.inline_asm_elementwise(low if J < 4 else high, "=r,r,r,r", [w, s], dtype=tl.float16, is_pure=True, pack=2)
    elif ASM:
        low: tl.constexpr = _A0 if J == 0 else _A1 if J == 1 else _A2 if J == 2 else _A3
        high: tl.constexpr = _A4 if J == 4 else _A5 if J == 5 else _A6 if J == 6 else _A7
        return tl.inline_asm_elementwise(low if J < 4 else high, "=r,r,r,r", [w, s], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        part: tl.constexpr = J % 4
        sign: tl.constexpr = (15 if part == 0 else 9 if part == 1 else 10 if part == 2 else 14) + J // 4 * 16
        magnitude: tl.constexpr = (6 if part == 0 else 0 if part == 1 else 3 if part == 2 else 11) + J // 4 * 16
        bits = (((w >> magnitude) & 7) << 22) | ((w >> sign) << 31)
        # 2 ** 126 repairs the exponent, 2 ** -8 is made up for by `channel`.
        return (bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * (s * 0.00390625)).to(tl.float16 if HALF else tl.bfloat16)


@triton.jit
def _load_x(x_rows, column, valid, K, EVEN: tl.constexpr):
    at = tl.max_contiguous(tl.multiple_of(column, [1, 8]), [1, 8])
    if EVEN:
        return tl.load(x_rows + at, mask=valid, other=0.0, eviction_policy="evict_last")
    else:
        return tl.load(x_rows + at, mask=valid & (at < K), other=0.0)


@triton.jit
def _split(x, BLOCK_M: tl.constexpr, Q: tl.constexpr):
    """[BLOCK_M, 8 * Q] -> eight [Q, BLOCK_M]: columns j, 8 + j, 16 + j, ..."""
    even, odd = tl.split(tl.reshape(x, (BLOCK_M, Q, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return tl.trans(x0), tl.trans(x1), tl.trans(x2), tl.trans(x3), tl.trans(x4), tl.trans(x5), tl.trans(x6), tl.trans(x7)


@triton.jit(do_not_specialize=["M"])
def tile(
    x_ptr,
    w_ptr,
    s_ptr,
    channel_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    row_words,
    steps,
    HAS_BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    Q: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
    LATE: tl.constexpr,
):
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    w_rows = w_ptr + rows * row_words
    s_rows = s_ptr + rows * row_words
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * K
    valid = m[:, None] < M
    i = tl.arange(0, Q)
    column = tl.arange(0, 8 * Q)[None, :]
    first = split * steps
    if EARLY:
        # The kernel before may still run: it can have written x, so only L2 is asked for weights until the wait.
        tl.extra.cuda.gdc_launch_dependents()
        ahead = tl.minimum(first * Q + tl.arange(0, 4) * 32, row_words - 1)
        lines = (w_rows[:, None] + ahead[None, :]).to(tl.int64)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)
    if EARLY or LATE:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    x = _load_x(x_rows, first * (8 * Q) + column, valid, K, EVEN)
    for step in range(first, first + steps):
        words = step * Q + i
        if EVEN:
            w = tl.load(w_rows[:, None] + words[None, :], eviction_policy="evict_first")
            code = tl.load(s_rows[:, None] + words[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(w_rows[:, None] + words[None, :], mask=words[None, :] < row_words, other=0, eviction_policy="evict_first")
            code = tl.load(s_rows[:, None] + words[None, :], mask=words[None, :] < row_words, other=0, eviction_policy="evict_first")
        s = _scale(code, HALF, ASM)
        x0, x1, x2, x3, x4, x5, x6, x7 = _split(x, BLOCK_M, Q)
        x = _load_x(x_rows, tl.minimum(step + 1, first + steps - 1) * (8 * Q) + column, valid, K, EVEN)
        acc = tl.dot(_value(w, s, 0, HALF, ASM), x0, acc)
        acc = tl.dot(_value(w, s, 1, HALF, ASM), x1, acc)
        acc = tl.dot(_value(w, s, 2, HALF, ASM), x2, acc)
        acc = tl.dot(_value(w, s, 3, HALF, ASM), x3, acc)
        acc = tl.dot(_value(w, s, 4, HALF, ASM), x4, acc)
        acc = tl.dot(_value(w, s, 5, HALF, ASM), x5, acc)
        acc = tl.dot(_value(w, s, 6, HALF, ASM), x6, acc)
        acc = tl.dot(_value(w, s, 7, HALF, ASM), x7, acc)
    if LATE:
        tl.extra.cuda.gdc_launch_dependents()
    inside = (n[:, None] < N) & (m[None, :] < M)
    if not PARTIAL:
        acc *= tl.load(channel_ptr + n, mask=n < N, other=0.0)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0)[:, None]
    out = out_ptr + (split.to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)
