"""The portable Triton kernel of skinny_w4a16, for AMD's GPUs and Triton's interpreter; NVIDIA's is skinny_w4a16_fragment.

A word holds four columns of two rows, g and g + 8 of a tile: rows are summed in two accumulators of eight rows a tile."""

# Triton evaluates constexpr and tl.extra.cuda while it compiles; their annotations say otherwise.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _value(w, scale, J: tl.constexpr, HIGH: tl.constexpr, HALF: tl.constexpr):
    """Value J of each word's lower or upper half times its scale times 2 ** -8, as f16 (HALF) or bf16: exact in five bits."""
    sign: tl.constexpr = (15 if J == 0 else 9 if J == 1 else 10 if J == 2 else 14) + HIGH * 16
    magnitude: tl.constexpr = (6 if J == 0 else 0 if J == 1 else 3 if J == 2 else 11) + HIGH * 16
    bits = (((w >> magnitude) & 7) << 22) | ((w >> sign) << 31)
    # 2 ** 126 repairs the exponent, 2 ** -8 is made up for by `channel`.
    return (bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * (scale * 0.00390625)).to(tl.float16 if HALF else tl.bfloat16)


@triton.jit
def _scale(code):
    """int8 codes: the exponent's upper four bits below, its lowest and three mantissa bits above -> f32."""
    whole = ((code.to(tl.int32) & 0xF) << 4) | ((code.to(tl.int32) >> 4) & 0xF)
    return ((whole << 20) + (106 << 23)).to(tl.float32, bitcast=True)


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
    tiles,
    pairs,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS: tiles of 16 rows. A row of the sums is a pair of rows g and g + 8 of a tile; a step is a pair of chunks."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    pair_row = tl.program_id(0) * (8 * ROWS) + tl.arange(0, 8 * ROWS)
    of = pair_row // 8
    g = pair_row % 8
    at = (tl.minimum(of, tiles - 1).to(tl.int64) * pairs)[:, None]
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = tl.arange(0, 32)
    k = tl.arange(0, 128)
    w_at = w_ptr + at * 256 + (q // 16 * 128 + q % 16)[None, :] + (g * 16)[:, None]
    s_at = s_ptr + at * 128 + (q % 16 // 4 * 4 + q // 16 * 2)[None, :] + (g * 16)[:, None]
    x_rows = x_ptr + m.to(tl.int64)[:, None] * K
    low = tl.zeros((8 * ROWS, BLOCK_M), tl.float32)
    high = tl.zeros((8 * ROWS, BLOCK_M), tl.float32)
    for pair in range(pairs):
        column = pair * 128 + k
        x = tl.load(x_rows + column[None, :], mask=(m[:, None] < M) & (column[None, :] < K), other=0.0)
        w = tl.load(w_at + pair * 256)
        s_low = _scale(tl.load(s_at + pair * 128))
        s_high = _scale(tl.load(s_at + pair * 128 + 1))
        even, odd = tl.split(tl.reshape(x, (BLOCK_M, 32, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        x0, x1, x2, x3 = tl.trans(x0), tl.trans(x1), tl.trans(x2), tl.trans(x3)
        low = tl.dot(_value(w, s_low, 0, 0, HALF), x0, low)
        low = tl.dot(_value(w, s_low, 0, 1, HALF), x1, low)
        low = tl.dot(_value(w, s_low, 2, 0, HALF), x2, low)
        low = tl.dot(_value(w, s_low, 2, 1, HALF), x3, low)
        high = tl.dot(_value(w, s_high, 1, 0, HALF), x0, high)
        high = tl.dot(_value(w, s_high, 1, 1, HALF), x1, high)
        high = tl.dot(_value(w, s_high, 3, 0, HALF), x2, high)
        high = tl.dot(_value(w, s_high, 3, 1, HALF), x3, high)
    for half in tl.static_range(2):
        n = of * 16 + half * 8 + g
        y = low if half == 0 else high
        y *= tl.load(channel_ptr + n, mask=n < N, other=0.0)[:, None]
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[:, None]
        out = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(n[:, None] < N) & (m[None, :] < M))
