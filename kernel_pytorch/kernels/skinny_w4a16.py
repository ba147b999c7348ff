"""Linear with 4-bit weights and 16-bit inputs for few rows: y = (x @ w.T) * channel + bias, w E2M1 with a scale a block.

Formats: nvfp4 (blocks of 16, E4M3 scales, `channel` the tensor's scale) and mxfp4 (blocks of 32, powers of two). Weights are the
left operand of the matrix instruction and the rows of x its narrow right one. `pack` stores a weight once in the kernel's
order, 5 bits a value: a scale byte for each word of eight values; `reference` says what is computed; `linear` runs the operator.

N out features, K in features, M rows, W words of a row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kernel_pytorch.kernels import skinny_w4a16_jit as jit
from kernel_pytorch.kernels import split_k_jit, tables
from kernel_pytorch.kernels.device import Device, device

# (M, N, K) that tests and the benchmark share: Llama-3-8B's decode linears, then widths that no tile divides, one row, no rows.
LLAMA = tuple((n, k) for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)))
ROWS = (1, 2, 4, 8, 16, 32, 64)
SHAPES = (*((m, n, k) for n, k in LLAMA for m in ROWS), (7, 130, 200), (33, 257, 1000), (1, 1, 1), (65, 96, 4100), (0, 64, 64))

KERNEL = "skinny_w4a16"
BLOCK = {"nvfp4": 16, "mxfp4": 32}
VALUES_A_WORD, MAX_ROWS = 8, 64
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Bits of a half word that hold the sign and the lowest magnitude bit of its four values.
SIGNS, MAGNITUDES = (15, 9, 10, 14), (6, 0, 3, 11)
# A scale code is an exponent over -21 and three mantissa bits: E4M3's range with its subnormals made normal.
_EXPONENT_BIAS, _TOP_EXPONENT = 21, 29
# The kernel's values are this much too small, so that f16 holds them.
_VALUE_SCALE = 2.0**-8
# Below it such a value loses bits in f16.
_LEAST_EXPONENT = 7

# Triton's launcher takes plain values where the kernel's signature says constexpr.
_tile: Any = jit.tile
_sum_splits: Any = split_k_jit.sum_splits


@dataclass(frozen=True)
class Config:
    """block_n: rows of the weight a program computes. words: words of a row that a step takes. split: programs that share K.
    overlap: when the kernel after this one may start, "none", "late" or "early" (programmatic dependent launch)."""

    block_n: int
    words: int
    split: int
    num_warps: int
    num_stages: int
    overlap: str = "none"


class Packed(NamedTuple):
    """words: int32 [N, W]. scales: int8 [N, W], a code a word. channel: float32 [N], what the kernel's sums are multiplied by:
    the tensor's or row's scale times 2 ** 8, since the kernel computes with values times 2 ** -8."""

    words: torch.Tensor
    scales: torch.Tensor
    channel: torch.Tensor


def pack(codes: torch.Tensor, scale: torch.Tensor, format: str, global_scale: torch.Tensor | None = None) -> Packed:
    """codes uint8 [N, Kp / 2], the even column in the low half; scale float8_e4m3fn [N, Kp / 16] (nvfp4) or uint8 E8M0 [N, Kp / 32]
    (mxfp4); global_scale float32 [] (nvfp4). Raises ValueError where `fits` says no."""
    if format not in BLOCK:
        raise ValueError(f"skinny_w4a16.pack: format must be one of {', '.join(BLOCK)}, got {format}")
    if not fits(scale, format):
        raise ValueError("skinny_w4a16.pack: scales of one row span more powers of two than a byte's exponent holds")
    n = codes.shape[0]
    nibbles = torch.stack((codes & 15, codes >> 4), -1).view(n, -1, VALUES_A_WORD).to(torch.int32)
    words = torch.zeros(nibbles.shape[:-1], dtype=torch.int32, device=codes.device)
    for j in range(VALUES_A_WORD):
        high = 16 * (j // 4)
        # Shifted into the sign bit the number wraps, which is what is wanted.
        words |= ((nibbles[..., j] >> 3) << (SIGNS[j % 4] + high)) | ((nibbles[..., j] & 7) << (MAGNITUDES[j % 4] + high))
    if format == "nvfp4":
        assert global_scale is not None, "nvfp4 has a scale of the tensor"
        mantissa, exponent = torch.frexp(scale.float())
        found = ((exponent + (_EXPONENT_BIAS - 1)) << 3) + (mantissa * 16 - 8).to(torch.int32)
        channel = (global_scale.float() / _VALUE_SCALE).reshape(1).expand(n).contiguous()
    else:
        exponents = scale.to(torch.int32)
        largest = exponents.amax(dim=1, keepdim=True)
        found = (exponents - largest + _TOP_EXPONENT) << 3
        channel = torch.ldexp(torch.ones_like(largest[:, 0], dtype=torch.float64), largest[:, 0] - 127 - _TOP_EXPONENT + _EXPONENT_BIAS)
        channel = (channel / _VALUE_SCALE).float()
    scales = found.to(torch.uint8).view(torch.int8).repeat_interleave(BLOCK[format] // VALUES_A_WORD, dim=1)
    return Packed(words.contiguous(), scales.contiguous(), channel)


def fits(scale: torch.Tensor, format: str) -> bool:
    """Whether a weight with these scales can be packed exactly: mxfp4's may span 22 powers of two in a row, nvfp4's always fit."""
    if format != "mxfp4":
        return bool((scale.float() > 0).all())
    exponents = scale.to(torch.int32)
    # Products end below float32's largest number, and channel above its smallest normal one.
    inside = int(exponents.amax()) <= 240 and int(exponents.amin()) >= 40
    return inside and bool((exponents.amax(dim=1) - exponents.amin(dim=1) <= _TOP_EXPONENT - _LEAST_EXPONENT).all())


def unpack(packed: Packed, format: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The codes, scales and global scale that `pack` was given."""
    n = packed.words.shape[0]
    values = []
    for j in range(VALUES_A_WORD):
        high = 16 * (j // 4)
        values.append(((packed.words >> (SIGNS[j % 4] + high)) & 1) << 3 | ((packed.words >> (MAGNITUDES[j % 4] + high)) & 7))
    nibbles = torch.stack(values, -1).to(torch.uint8).view(n, -1, 2)
    code = packed.scales[:, :: BLOCK[format] // VALUES_A_WORD].contiguous().view(torch.uint8).to(torch.int32)
    if format == "nvfp4":
        value = torch.ldexp((8 + (code & 7)).float(), (code >> 3) - _EXPONENT_BIAS - 3)
        scale = value.to(torch.float8_e4m3fn)
    else:
        base = torch.frexp(packed.channel * _VALUE_SCALE)[1] - 1 + 127 + _TOP_EXPONENT - _EXPONENT_BIAS
        scale = ((code >> 3) - _TOP_EXPONENT + base[:, None]).to(torch.uint8)
    global_scale = packed.channel[0] * _VALUE_SCALE if format == "nvfp4" else None
    return nibbles[..., 0] | (nibbles[..., 1] << 4), scale, global_scale


def dequantize(packed: Packed, in_features: int) -> torch.Tensor:
    """The packed weight as float32 [N, in_features], the scale of its tensor or row included."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.words.device)
    columns = []
    for j in range(VALUES_A_WORD):
        high = 16 * (j // 4)
        columns.append(table[((packed.words >> (SIGNS[j % 4] + high)) & 1) * 8 + ((packed.words >> (MAGNITUDES[j % 4] + high)) & 7)])
    code = packed.scales.view(torch.uint8).to(torch.int32)
    scale = torch.ldexp((8 + (code & 7)).float(), (code >> 3) - _EXPONENT_BIAS - 3)
    return (torch.stack(columns, -1) * scale[..., None]).flatten(1)[:, :in_features] * (packed.channel * _VALUE_SCALE)[:, None]


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K] as `dequantize` gives it, bias [N] -> [..., N], all in x's dtype."""
    y = x @ weight.to(x.dtype).t()
    return y if bias is None else y + bias.to(x.dtype)


@functools.cache
def tuned(gpu: str) -> dict[tuple[int, int, int], Config]:
    """(N, K, M) -> Config that measurement chose on that GPU, by `torch.cuda.get_device_name`; empty where nobody measured."""
    return {key: Config(**config) for key, config in tables.load(KERNEL, gpu)["configs"].items()}


def crossover(n: int, k: int, on: torch.device) -> int:
    """The most rows at which this kernel was measured no slower than expanding the weight on that GPU; 64 where nobody measured."""
    return tables.crossover(KERNEL, n, k, device(on.index).name, "dequantize")


def block_m(m: int) -> int:
    """Rows of x that one program computes: the smallest of 8, 16, 32, 64 that holds m, 64 above."""
    return next((b for b in (8, 16, 32) if m <= b), MAX_ROWS)


def choose(m: int, n: int, k: int, on: Device) -> Config:
    """The measured configuration for this layer on this GPU at the next M that was measured, else a rule drawn from the H200's."""
    table = tuned(on.name)
    for rows in ROWS:
        if (m <= rows or rows == MAX_ROWS) and (n, k, rows) in table:
            return table[n, k, rows]
    overlap = "late" if on.dependent_launch else "none"
    words = 32
    # Enough programs that each processor holds two, and at least two steps for each.
    split = next((s for s in (8, 4, 2) if -(-n // 64) * s <= 4 * on.processors and k >= 2 * s * words * VALUES_A_WORD), 1)
    return Config(64, words, split, num_warps=4, num_stages=3 if on.shared >= 90_000 else 2, overlap=overlap)


def launch(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, config: Config, out: torch.Tensor | None = None) -> torch.Tensor:
    """The operator on x [M, K] contiguous with this configuration, into out [M, N] where given."""
    m, k = x.shape
    n, row_words = packed.words.shape
    out = x.new_empty((m, n)) if out is None else out
    if m == 0 or n == 0:
        return out
    cuda = x.is_cuda and torch.version.hip is None
    overlap = config.overlap if cuda and device(x.device.index).dependent_launch else "none"
    extra = {} if overlap == "none" else {"launch_pdl": True}
    step = config.words * VALUES_A_WORD
    steps = -(-k // (config.split * step))
    split = -(-k // (steps * step))
    target = x.new_empty((split, m, n), dtype=torch.float32) if split > 1 else out
    # AMD's matrix instructions are 16 wide at least.
    rows = block_m(m) if torch.version.hip is None else max(block_m(m), 16)
    bias_or_any = packed.channel if bias is None else bias
    _tile[(-(-n // config.block_n), split, -(-m // rows))](
        x,
        packed.words,
        packed.scales,
        packed.channel,
        bias_or_any,
        target,
        m,
        n,
        k,
        row_words,
        steps,
        HAS_BIAS=bias is not None,
        PARTIAL=split > 1,
        EVEN=k == split * steps * step == row_words * VALUES_A_WORD,
        BLOCK_M=rows,
        BLOCK_N=config.block_n,
        Q=config.words,
        ASM=cuda,
        EARLY=overlap == "early",
        LATE=overlap == "late",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **extra,
    )
    if split > 1:
        scales = (packed.channel, packed.channel, bias_or_any)
        flags = {"HAS_BIAS": bias is not None, "HAS_ROW_SCALE": False, "PDL": overlap != "none"}
        _sum_splits[(-(-n // 512), m)](target, *scales, out, m, n, SPLIT=split, BLOCK=512, **flags, **extra)
    return out


@torch.library.custom_op("kernel_pytorch::skinny_w4a16", mutates_args=())
def _linear(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, channel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    k = x.shape[-1]
    flat = x.reshape(-1, k).contiguous()
    config = choose(flat.shape[0], words.shape[0], k, device(x.device.index))
    with torch.cuda.device_of(x):
        y = launch(flat, Packed(words, scales, channel), bias, config)
    return y.view(*x.shape[:-1], words.shape[0])


@_linear.register_fake
def _(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, channel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[0]))


def linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] bfloat16 or float16, packed from `pack`, bias float32 [N] -> [..., N] in x.dtype.

    Values times block scales are exact; sums in float32, channel and bias on the sum, one rounding at the end. Right for any
    number of rows, made for 1 to 64. Raises ValueError when tensors do not fit."""
    words = packed.words
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"skinny_w4a16: x must be bfloat16 or float16, got {x.dtype}")
    extra = words.shape[-1] * VALUES_A_WORD - x.shape[-1]
    if words.dtype != torch.int32 or words.dim() != 2 or not words.is_contiguous() or not 0 <= extra < max(BLOCK.values()):
        shown = f"{words.dtype} {tuple(words.shape)}"
        raise ValueError(f"skinny_w4a16: words must be int32 [N, W] from skinny_w4a16.pack of a weight [N, {x.shape[-1]}], got {shown}")
    if packed.scales.dtype != torch.int8 or packed.scales.shape != words.shape or not packed.scales.is_contiguous():
        raise ValueError(f"skinny_w4a16: scales must be int8 {tuple(words.shape)}, got {packed.scales.dtype} {tuple(packed.scales.shape)}")
    for name, values in (("channel", packed.channel), ("bias", bias)):
        if values is not None and (values.dtype != torch.float32 or values.shape != words.shape[:1] or not values.is_contiguous()):
            raise ValueError(
                f"skinny_w4a16: {name} must be contiguous float32 [{words.shape[0]}], got {values.dtype} {tuple(values.shape)}"
            )
    return _linear(x, words, packed.scales, packed.channel, bias)
