"""Packed weights to 16 bits: what a library's matrix product reads where there are more rows than the kernels for few rows win at.

Bound by memory: each byte of the weight is read once and each 16-bit value written once, by whole lines. A scale is multiplied in
float32 and the value rounded once, so that nothing is left to do on the product.

N out features, K in features.
"""

from __future__ import annotations

from typing import Any

import torch

from kernel_pytorch.kernels import expand_jit as jit
from kernel_pytorch.kernels import skinny_w4a16, skinny_w8a16
from kernel_pytorch.kernels.skinny_w4a16 import PAIR, TILE, Packed
from kernel_pytorch.kernels.skinny_w8a16 import DTYPES

# Rows and words of a program of 8-bit weights; pairs of chunks of one of 4-bit weights. Four warps have eight words a thread.
BLOCK_ROWS, BLOCK_WORDS, BLOCK_PAIRS = 4, 256, 4
HALF = (torch.bfloat16, torch.float16)

# Triton's launcher takes plain values where the kernel's signature says constexpr.
_eight_bits: Any = jit.eight_bits
_four_bits: Any = jit.four_bits


def eight_bits_reference(packed: torch.Tensor, scale: torch.Tensor, in_features: int, format: str, dtype: torch.dtype) -> torch.Tensor:
    """What `eight_bits` computes, in plain torch."""
    return (skinny_w8a16.unpack(packed, in_features, DTYPES[format]).float() * scale[:, None]).to(dtype)


def four_bits_reference(packed: Packed, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """What `four_bits` computes, in plain torch."""
    return skinny_w4a16.dequantize(packed, in_features).to(dtype)


def launch_eight_bits(packed: torch.Tensor, scale: torch.Tensor, fp8: bool, out: torch.Tensor) -> torch.Tensor:
    (n, k), row_words = out.shape, packed.shape[1]
    if n == 0 or k == 0:
        return out
    grid = (-(-n // BLOCK_ROWS), -(-row_words // BLOCK_WORDS))
    assembly = out.is_cuda and torch.version.hip is None
    _eight_bits[grid](packed, scale, out, n, k, row_words, FP8=fp8, ASM=assembly, ROWS=BLOCK_ROWS, WORDS=BLOCK_WORDS, num_warps=4)
    return out


def launch_four_bits(packed: Packed, out: torch.Tensor) -> torch.Tensor:
    n, k = out.shape
    if n == 0 or k == 0:
        return out
    tiles, pairs = -(-n // TILE), -(-k // PAIR)
    _four_bits[(tiles, -(-pairs // BLOCK_PAIRS))](*packed, out, n, k, pairs, PAIRS=BLOCK_PAIRS, num_warps=4)
    return out


@torch.library.custom_op("kernel_pytorch::expand_w8", mutates_args=())
def _expand_w8(packed: torch.Tensor, scale: torch.Tensor, in_features: int, format: str, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(packed.shape[0], in_features, dtype=dtype, device=packed.device)
    with torch.cuda.device_of(packed):
        return launch_eight_bits(packed, scale, format == "float8_e4m3fn", out)


@_expand_w8.register_fake
def _(packed: torch.Tensor, scale: torch.Tensor, in_features: int, format: str, dtype: torch.dtype) -> torch.Tensor:
    return packed.new_empty((packed.shape[0], in_features), dtype=dtype)


@torch.library.custom_op("kernel_pytorch::expand_w4", mutates_args=())
def _expand_w4(words: torch.Tensor, scales: torch.Tensor, channel: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(channel.shape[0], in_features, dtype=dtype, device=words.device)
    with torch.cuda.device_of(words):
        return launch_four_bits(Packed(words, scales, channel), out)


@_expand_w4.register_fake
def _(words: torch.Tensor, scales: torch.Tensor, channel: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    return words.new_empty((channel.shape[0], in_features), dtype=dtype)


def eight_bits(packed: torch.Tensor, scale: torch.Tensor, in_features: int, format: str, dtype: torch.dtype) -> torch.Tensor:
    """packed from `skinny_w8a16.pack`, scale float32 [N], format a name of its DTYPES -> [N, in_features] in bfloat16 or float16.

    The weight times its scale in float32, rounded once. Tensors of a CPU and other dtypes take plain torch. Raises ValueError
    when tensors do not fit."""
    skinny_w8a16.check(packed, in_features, format, "expand", scale)
    if packed.is_cuda and dtype in HALF:
        return _expand_w8(packed, scale, in_features, format, dtype)
    return eight_bits_reference(packed, scale, in_features, format, dtype)


def four_bits(packed: Packed, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """packed from `skinny_w4a16.pack` -> [N, in_features] in bfloat16 or float16.

    Values times block scales are exact in float32, times the row's or tensor's scale rounded there, then once to dtype. Tensors of a
    CPU and other dtypes take plain torch. Raises ValueError when tensors do not fit."""
    skinny_w4a16.check(packed, in_features, "expand")
    if packed.words.is_cuda and dtype in HALF:
        return _expand_w4(*packed, in_features, dtype)
    return four_bits_reference(packed, in_features, dtype)
