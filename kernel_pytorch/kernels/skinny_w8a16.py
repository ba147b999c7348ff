"""Linear with 8-bit weights and 16-bit inputs for few rows: y = (x @ w.T) * scale * row_scale + bias, w int8 or float8_e4m3fn.

Bound by the weight's bytes, so weights are the left operand of the matrix instruction and the rows of x its narrow right one.
`pack` stores a weight once in the kernel's order; `reference` says what is computed; `linear` runs the operator.

N out features, K in features, M rows, S slices of K that warps of one program share.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from kernel_pytorch.kernels import skinny_w8a16_jit as jit
from kernel_pytorch.kernels import split_k, tables
from kernel_pytorch.kernels.device import Device, device

# (M, N, K) that tests and the benchmark share: Llama-3-8B's decode linears, then widths that no tile divides, one row, no rows.
LLAMA = tuple((n, k) for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)))
ROWS = TUNED_ROWS = (1, 2, 4, 8, 16, 32, 64)
SHAPES = (*((m, n, k) for n, k in LLAMA for m in ROWS), (7, 130, 200), (33, 257, 1000), (1, 1, 1), (65, 96, 4100), (0, 64, 64))

DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
# In a group of 256 values word i holds values i, 64 + i, 128 + i, 192 + i: each byte position is then a contiguous quarter of x.
GROUP, WORDS = 256, 64
MAX_ROWS = 64

# Triton's launcher takes plain values where the kernel's signature says constexpr.
_matrix: Any = jit.matrix
_vector: Any = jit.vector


@dataclass(frozen=True)
class Config:
    """block_n: rows of the weight a program computes. block_k: values of K a step takes, per slice. slices: warps of a program
    that share K; 0 for the kernel without the matrix unit, one row of x only. split: programs that share K.
    overlap: when the kernel after this one may start, "none", "late" or "early" (programmatic dependent launch).
    ahead: lines of 128 bytes of each weight row that "early" asks L2 for while the kernel before still runs."""

    block_n: int
    block_k: int
    slices: int
    split: int
    num_warps: int
    num_stages: int
    overlap: str = "none"
    ahead: int = 2


def pack(weight: torch.Tensor) -> torch.Tensor:
    """int8 or float8_e4m3fn [N, K] -> int32 [N, 64 * ceil(K / 256)], K padded with zeros. Raises ValueError on a NaN."""
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


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K], weight [N, K] int8 or float8_e4m3fn, scale [N], bias [N], row_scale [M] -> [..., N], all in x's dtype."""
    y = (x @ weight.to(x.dtype).t()) * scale.to(x.dtype)
    if row_scale is not None:
        y = y * row_scale.to(x.dtype).view(*x.shape[:-1], 1)
    return y if bias is None else y + bias.to(x.dtype)


@functools.cache
def tuned(gpu: str) -> dict[tuple[int, int, int], Config]:
    """(N, K, M) -> Config that measurement chose on that GPU, by `torch.cuda.get_device_name`; empty where nobody measured."""
    return {key: Config(**config) for key, config in tables.load("skinny_w8a16", gpu)["configs"].items()}


def crossover(n: int, k: int, on: torch.device, against: str) -> int:
    """The most rows at which this kernel was measured no slower than another road of the same layer on that GPU, 0 if never.

    against: "expand", weights written in 16 bits and a library's product; "scaled_mm", an FP8 product. Where nobody measured, 128 and 64:
    each 64 rows read the weight again."""
    return tables.crossover("skinny_w8a16", n, k, device(on.index).name, against)


def block_m(m: int) -> int:
    """Rows of x that one program computes: the smallest of 8, 16, 32, 64 that holds m, 64 above."""
    return next((b for b in (8, 16, 32) if m <= b), MAX_ROWS)


def choose(m: int, n: int, k: int, on: Device) -> Config:
    """The measured configuration for this layer on this GPU at the next M that was measured, the last one above it, else a rule
    drawn from the H200's."""
    table = tuned(on.name)
    for rows in ROWS:
        if min(m, MAX_ROWS) <= rows and (n, k, rows) in table:
            return table[n, k, rows]
    overlap = "late" if on.dependent_launch else "none"
    if m == 1 and on.convert_fp8:
        return Config(4, 1024, 0, 1, num_warps=2, num_stages=1, overlap=overlap)
    # Enough programs that each processor holds two; a step and the one in flight must fit its shared memory.
    block_k = 256 if on.shared >= 200_000 else 128
    split = next((s for s in (4, 2) if -(-n // 64) * s <= 4 * on.processors and k >= 4 * s * block_k), 1)
    return Config(64, block_k, 1, split, num_warps=4, num_stages=3 if on.shared >= 90_000 else 2, overlap=overlap)


def launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    fp8: bool,
    config: Config,
    out: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operator on x [M, K] contiguous with this configuration, into out [M, N] where given."""
    m, k = x.shape
    n, row_words = packed.shape
    out = x.new_empty((m, n)) if out is None else out
    if m == 0 or n == 0:
        return out
    cuda = x.is_cuda and torch.version.hip is None
    overlap = config.overlap if cuda and device(x.device.index).dependent_launch else "none"
    epilogue = {"HAS_BIAS": bias is not None, "HAS_ROW_SCALE": row_scale is not None}
    common = {"FP8": fp8, "ASM": cuda, "EARLY": overlap == "early", "LATE": overlap == "late", "AHEAD": config.ahead}
    extra = {} if overlap == "none" else {"launch_pdl": True}
    block = {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "num_warps": config.num_warps, "num_stages": config.num_stages}
    # A pointer that the kernel does not read.
    scales = (scale, scale if row_scale is None else row_scale, scale if bias is None else bias)
    if config.slices == 0 and m == 1:
        even = k == row_words * 4 and k % config.block_k == 0
        grid = (-(-n // config.block_n),)
        _vector[grid](x, packed, *scales, out, n, k, row_words, EVEN=even, STAGES=config.num_stages, **common, **epilogue, **block, **extra)
        return out
    step = config.block_k * config.slices
    steps = -(-k // (config.split * step))
    split = -(-k // (steps * step))
    target = x.new_empty((split, m, n), dtype=torch.float32) if split > 1 else out
    # AMD's matrix instructions are 16 wide at least.
    rows = block_m(m) if torch.version.hip is None else max(block_m(m), 16)
    _matrix[(-(-n // config.block_n), split, -(-m // rows))](
        x,
        packed,
        *scales,
        target,
        m,
        n,
        k,
        row_words,
        steps,
        PARTIAL=split > 1,
        EVEN=k == split * steps * step == row_words * 4,
        BLOCK_M=rows,
        SLICES=config.slices,
        **common,
        **epilogue,
        **block,
        **extra,
    )
    if split > 1:
        split_k.add(target, scale, row_scale, bias, out, overlap != "none")
    return out


@torch.library.custom_op("kernel_pytorch::skinny_w8a16", mutates_args=())
def _linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    k = x.shape[-1]
    flat = x.reshape(-1, k).contiguous()
    config = choose(flat.shape[0], packed.shape[0], k, device(x.device.index))
    with torch.cuda.device_of(x):
        y = launch(flat, packed, scale, bias, format == "float8_e4m3fn", config, row_scale=row_scale)
    return y.view(*x.shape[:-1], packed.shape[0])


@_linear.register_fake
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def check(packed: torch.Tensor, in_features: int, format: str, by: str, scale: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Raises ValueError, in the name of `by`, when tensors are not those of a weight [N, in_features] that `pack` made."""
    if format not in DTYPES:
        raise ValueError(f"{by}: format must be one of {', '.join(DTYPES)}, got {format}")
    words = -(-in_features // GROUP) * WORDS
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != words or not packed.is_contiguous():
        raise ValueError(f"{by}: packed must be int32 [N, {words}] from skinny_w8a16.pack, got {packed.dtype} {tuple(packed.shape)}")
    for name, values in (("scale", scale), ("bias", bias)):
        if values is not None and (values.dtype != torch.float32 or values.shape != packed.shape[:1] or not values.is_contiguous()):
            raise ValueError(f"{by}: {name} must be contiguous float32 [{packed.shape[0]}], got {values.dtype} {tuple(values.shape)}")


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    format: str,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] bfloat16 or float16, packed from `pack`, scale and bias float32 [N], format a name of DTYPES -> [..., N] in x.dtype.
    row_scale: float32, one number a row of x, [M] or [..., 1].

    Sums in float32, scales and bias on the sum, one rounding at the end. Right for any number of rows, made for 1 to 64."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"skinny_w8a16: x must be bfloat16 or float16, got {x.dtype}")
    check(packed, x.shape[-1], format, "skinny_w8a16", scale, bias)
    if row_scale is not None:
        m = x.shape[:-1].numel()
        if row_scale.dtype != torch.float32 or row_scale.numel() != m or not row_scale.is_contiguous():
            raise ValueError(
                f"skinny_w8a16: row_scale must be contiguous float32, {m} numbers, got {row_scale.dtype} {tuple(row_scale.shape)}"
            )
    return _linear(x, packed, scale, bias, format, row_scale)
