"""Triton kernels of expand: packed words to 16-bit weights. A program reads and writes whole lines of memory, each once."""

# Triton evaluates constexpr while it compiles; its annotations say otherwise.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from kernel_pytorch.kernels.skinny_w4a16_jit import _scale
from kernel_pytorch.kernels.skinny_w8a16_jit import _bytes


@triton.jit
def eight_bits(w_ptr, scale_ptr, out_ptr, N, K, row_words, FP8: tl.constexpr, ASM: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Byte j of word i of a group of 64 words is column i + 64 j of the group's 256: each byte position is a run of columns."""
    HALF: tl.constexpr = out_ptr.dtype.element_ty == tl.float16
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    column = tl.max_contiguous(tl.multiple_of(word // 64 * 256 + word % 64, 64), 64)
    row = n.to(tl.int64)[:, None]
    inside = (n < N)[:, None]
    w = tl.load(w_ptr + row * row_words + word[None, :], mask=inside & (word < row_words)[None, :], other=0)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    for j in tl.static_range(4):
        at = column + 64 * j
        value = _bytes(w, j, FP8, HALF, ASM).to(tl.float32) * scale
        tl.store(out_ptr + row * K + at[None, :], value.to(out_ptr.dtype.element_ty), mask=inside & (at < K)[None, :])


@triton.jit
def _elements(w, PART: tl.constexpr):
    """Two E2M1 codes of a word, even and odd column, as f32 times 2 ** -14: their fields are those of such float16 numbers, zero and
    subnormals included."""
    # Where sign and magnitude lie in either half of the word, by what they are shifted to bit 15 and bits 9 to 11.
    sign = (w << (0 if PART == 0 else 6 if PART == 1 else 5 if PART == 2 else 1)) & -2147450880
    magnitude = (w >> 2) if PART == 3 else (w << (3 if PART == 0 else 9 if PART == 1 else 6))
    both = sign | (magnitude & 0x0E000E00)
    even = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    odd = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def four_bits(w_ptr, s_ptr, channel_ptr, out_ptr, N, K, pairs, PAIRS: tl.constexpr):
    """One tile of 16 rows, PAIRS pairs of chunks. A word holds four neighbouring columns of two rows, g and g + 8 of the tile; four
    words are a block of 16 columns, whose scales for both rows are two bytes."""
    tile = tl.program_id(0)
    first = tl.program_id(1) * PAIRS
    g = tl.arange(0, 8)
    block = tl.arange(0, 8 * PAIRS)
    pair = tile.to(tl.int64) * pairs + first + block // 8
    inside = (first + block // 8 < pairs)[None, :]
    chunk = block // 4 % 2
    t = block % 4
    w_at = (pair * 256 + chunk * 128 + t * 4)[None, :, None] + (g * 16)[:, None, None] + tl.arange(0, 4)[None, None, :]
    w = tl.load(w_ptr + w_at, mask=inside[:, :, None], other=0)
    s_at = (pair * 64 + t * 2 + chunk)[None, :] + (g * 8)[:, None]
    scales = tl.load(s_ptr.to(tl.pointer_type(tl.int16)) + s_at, mask=inside, other=0)
    column = first * 128 + tl.arange(0, 128 * PAIRS)
    for half in tl.static_range(2):
        n = tile * 16 + half * 8 + g
        scale = (_scale(scales >> (8 * half)) * 16384.0)[:, :, None]
        # `channel` makes up for values that are 2 ** -8 too small in the kernels of products; here they are not.
        channel = (tl.load(channel_ptr + n, mask=n < N, other=0.0) * 0.00390625)[:, None, None]
        # Columns 4 i + 2 p + e: values of part 2 p + half, even or odd.
        even0, odd0 = _elements(w, half)
        even1, odd1 = _elements(w, 2 + half)
        even = tl.join(even0 * scale * channel, even1 * scale * channel)
        odd = tl.join(odd0 * scale * channel, odd1 * scale * channel)
        values = tl.reshape(tl.join(even, odd).to(out_ptr.dtype.element_ty), (8, 128 * PAIRS))
        out = out_ptr + n.to(tl.int64)[:, None] * K + column[None, :]
        tl.store(out, values, mask=(n < N)[:, None] & (column < K)[None, :])
