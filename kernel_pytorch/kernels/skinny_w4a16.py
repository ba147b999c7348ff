"""Linear with 4-bit weights and 16-bit inputs for few rows: y = (x @ w.T) * channel + bias, w E2M1 with a scale a block.

Formats: nvfp4 (blocks of 16, E4M3 scales, `channel` the tensor's scale) and mxfp4 (blocks of 32, powers of two). `pack` stores a
weight once in the order in which lanes of an NVIDIA GPU feed the matrix unit, 4.5 bits a value; `reference` says what is computed;
`linear` runs the operator. NVIDIA's GPUs from sm_80 on run skinny_w4a16_fragment, Hopper's for more rows skinny_w4a16_wgmma_jit, others
and the interpreter skinny_w4a16_jit.

N out features, K in features, M rows. A tile is 16 rows of the weight, a chunk 64 columns, a pair two chunks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from kernel_pytorch.kernels import skinny_w4a16_jit as jit
from kernel_pytorch.kernels import skinny_w4a16_wgmma as wgmma
from kernel_pytorch.kernels import split_k, tables
from kernel_pytorch.kernels.device import Device, device
from kernel_pytorch.kernels.skinny_w4a16_wgmma import WarpgroupConfig

try:
    from kernel_pytorch.kernels import skinny_w4a16_fragment as fragment
except ImportError:
    # Gluon is part of Triton from 3.5 on.
    fragment = None

# (M, N, K) that tests and the benchmark share: Llama-3-8B's decode linears, then widths that no tile divides, one row, no rows.
LLAMA = tuple((n, k) for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)))
ROWS = (1, 2, 4, 8, 16, 32, 64)
TUNED_ROWS = (*ROWS, 128)
SHAPES = (*((m, n, k) for n, k in LLAMA for m in ROWS), (7, 130, 200), (33, 257, 1000), (1, 1, 1), (65, 96, 4100), (0, 64, 64))

KERNEL = "skinny_w4a16"
BLOCK = {"nvfp4": 16, "mxfp4": 32}
# Rows of x that one program computes at most: 64 in one took 103 us on 28672 x 4096 (H100), 32 took 39.
MAX_ROWS = 32
TILE, CHUNK, PAIR, SCALE_BLOCK = 16, 64, 128, 16
WORDS_A_PAIR, SCALES_A_PAIR = TILE * PAIR // 8, TILE * PAIR // SCALE_BLOCK
# Bits of a half word that hold the sign and the lowest magnitude bit of its four values.
SIGNS, MAGNITUDES = (15, 9, 10, 14), (6, 0, 3, 11)
# A scale code is an exponent over -21 and three mantissa bits: E4M3's range with its subnormals made normal.
_EXPONENT_BIAS, _TOP_EXPONENT = 21, 29
# The kernel's values are this much too small, so that f16 holds them.
_VALUE_SCALE = 2.0**-8
# Below it such a value loses bits in f16.
_LEAST_EXPONENT = 7
_PORTABLE_TILES = 8

# Triton's launcher takes plain values where the kernel's signature says constexpr.
_portable: Any = jit.tile


@dataclass(frozen=True)
class Config:
    """Of the NVIDIA kernel. tiles: of 16 rows, a warp. num_warps: of them warps_n have rows of their own, the others share K. depth,
    depth_x: steps whose weights and x are asked for ahead. split: programs that share K. registers: a lane may use, 0 for the
    compiler's choice. overlap: the next kernel may start and ask for its weights before this one ends (programmatic dependent launch).
    cluster: the programs that share K, 2, 4 or 8, sum in one another's shared memory; otherwise a second kernel sums.
    loop: the steps are a loop; otherwise written out one after another."""

    tiles: int
    num_warps: int
    warps_n: int
    depth: int
    depth_x: int = 0
    split: int = 1
    registers: int = 0
    overlap: bool = True
    cluster: bool = False
    loop: bool = False

    def steps(self, k: int) -> tuple[int, int, bool]:
        """Steps a warp takes over K, programs that share it, and whether all take as many."""
        pairs, warps = -(-k // PAIR), self.num_warps // self.warps_n
        steps = -(-pairs // (self.split * warps))
        split = self.split if self.cluster else -(-pairs // (steps * warps))
        return steps, split, pairs == split * steps * warps

    def ahead(self, k: int) -> tuple[int, int]:
        """Steps whose weights and x are asked for ahead, no more than there are; a loop asks for no more x than weights."""
        steps = self.steps(k)[0]
        depth = min(self.depth, steps)
        return depth, min(self.depth_x, steps - 1, depth if self.loop else steps)


class Packed(NamedTuple):
    """words: int32 [tiles, pairs * 256]. scales: int8 [tiles, pairs * 128]. channel: float32 [N], what the kernel's sums are
    multiplied by: the tensor's or row's scale times 2 ** 8, since the kernel computes with values times 2 ** -8.

    A word holds rows g and g + 8 of a tile and columns 4 j to 4 j + 3 of the 16 that lane 4 g + t of a warp has of a chunk."""

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
    rows, columns = -n % TILE, -codes.shape[1] * 2 % PAIR
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    # [tile, half, g, chunk, t, j, 2, even or odd] -> [tile, chunk, g, t, j, even or odd, 2, half]
    parts = F.pad(nibbles, (0, columns, 0, rows)).view((n + rows) // TILE, 2, 8, -1, 4, 4, 2, 2).permute(0, 3, 2, 4, 5, 7, 6, 1)
    words = torch.zeros(parts.shape[:5], dtype=torch.int32, device=codes.device)
    for odd in range(2):
        for part in range(4):
            nibble = parts[..., odd, part // 2, part % 2].to(torch.int32)
            # Shifted into the sign bit the number wraps, which is what is wanted.
            words |= ((nibble >> 3) << (SIGNS[part] + 16 * odd)) | ((nibble & 7) << (MAGNITUDES[part] + 16 * odd))
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
    found = found.repeat_interleave(BLOCK[format] // SCALE_BLOCK, dim=1)
    found = F.pad(found, (0, columns // SCALE_BLOCK, 0, rows), value=_EXPONENT_BIAS << 3)
    found = ((found >> 4) | (found << 4)).to(torch.uint8).view(torch.int8)
    # [tile, half, g, pair, chunk, t] -> [tile, pair, g, t, chunk, half]
    scales = found.view(-1, 2, 8, found.shape[1] // 8, 2, 4).permute(0, 3, 2, 5, 4, 1)
    return Packed(words.flatten(1), scales.flatten(1).contiguous(), channel)


def fits(scale: torch.Tensor, format: str) -> bool:
    """Whether a weight with these scales can be packed exactly: mxfp4's may span 22 powers of two in a row, nvfp4's always fit."""
    if format != "mxfp4":
        return bool((scale.float() > 0).all())
    exponents = scale.to(torch.int32)
    # Products end below float32's largest number, and channel above its smallest normal one.
    inside = int(exponents.amax()) <= 240 and int(exponents.amin()) >= 40
    return inside and bool((exponents.amax(dim=1) - exponents.amin(dim=1) <= _TOP_EXPONENT - _LEAST_EXPONENT).all())


def _nibbles(packed: Packed) -> torch.Tensor:
    """uint8 [tiles * 16, pairs * 128]."""
    words = packed.words.view(packed.words.shape[0], -1, 8, 4, 4)
    values = [
        ((words >> (SIGNS[part] + 16 * odd)) & 1) << 3 | ((words >> (MAGNITUDES[part] + 16 * odd)) & 7)
        for odd in range(2)
        for part in range(4)
    ]
    parts = torch.stack(values, -1).to(torch.uint8).unflatten(-1, (2, 2, 2))
    # [tile, chunk, g, t, j, even or odd, 2, half] -> [tile, half, g, chunk, t, j, 2, even or odd]
    return parts.permute(0, 7, 2, 1, 3, 4, 6, 5).reshape(words.shape[0] * TILE, -1)


def _codes(packed: Packed) -> torch.Tensor:
    """Scale codes, exponent above mantissa: int32 [tiles * 16, pairs * 8]."""
    byte = packed.scales.view(torch.uint8).to(torch.int32).view(packed.scales.shape[0], -1, 8, 4, 2, 2)
    rows = byte.permute(0, 5, 2, 1, 4, 3).reshape(packed.scales.shape[0] * TILE, -1)
    return ((rows & 15) << 4) | (rows >> 4)


def unpack(packed: Packed, format: str, in_features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The codes, scales and global scale that `pack` was given."""
    n, width = packed.channel.shape[0], -(-in_features // BLOCK[format]) * BLOCK[format]
    nibbles = _nibbles(packed)[:n, :width].reshape(n, -1, 2)
    code = _codes(packed)[:n, : width // SCALE_BLOCK : BLOCK[format] // SCALE_BLOCK]
    if format == "nvfp4":
        scale = torch.ldexp((8 + (code & 7)).float(), (code >> 3) - _EXPONENT_BIAS - 3).to(torch.float8_e4m3fn)
    else:
        base = torch.frexp(packed.channel * _VALUE_SCALE)[1] - 1 + 127 + _TOP_EXPONENT - _EXPONENT_BIAS
        scale = ((code >> 3) - _TOP_EXPONENT + base[:, None]).to(torch.uint8)
    global_scale = packed.channel[0] * _VALUE_SCALE if format == "nvfp4" else None
    return nibbles[..., 0] | (nibbles[..., 1] << 4), scale, global_scale


def _values(nibbles: torch.Tensor) -> torch.Tensor:
    """E2M1 codes as float32. Computed: a table would come from host memory in every call, which waits for the device and which no CUDA
    graph records."""
    low, exponent = (nibbles & 1).float(), ((nibbles >> 1) & 3).to(torch.int32)
    magnitude = torch.where(exponent == 0, low * 0.5, torch.ldexp(2 + low, exponent - 2))
    return torch.where(nibbles >= 8, -magnitude, magnitude)


def dequantize(packed: Packed, in_features: int) -> torch.Tensor:
    """The packed weight as float32 [N, in_features], the scale of its tensor or row included."""
    code = _codes(packed)
    scale = torch.ldexp((8 + (code & 7)).float(), (code >> 3) - _EXPONENT_BIAS - 3)
    values = _values(_nibbles(packed)).view(*scale.shape, SCALE_BLOCK) * scale[..., None]
    n = packed.channel.shape[0]
    return values.flatten(1)[:n, :in_features] * (packed.channel * _VALUE_SCALE)[:, None]


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K] as `dequantize` gives it, bias [N] -> [..., N], all in x's dtype."""
    y = x @ weight.to(x.dtype).t()
    return y if bias is None else y + bias.to(x.dtype)


@functools.cache
def tuned(gpu: str) -> dict[tuple[int, int, int], Config | WarpgroupConfig]:
    """(N, K, M) -> what measurement chose on that GPU, by `torch.cuda.get_device_name`; empty where nobody measured."""
    configs = tables.load(KERNEL, gpu)["configs"].items()
    return {key: WarpgroupConfig(**config) if "block_m" in config else Config(**config) for key, config in configs}


def crossover(n: int, k: int, on: torch.device) -> int:
    """The most rows at which this kernel was measured no slower than expanding the weight on that GPU; 128 where nobody measured, and at
    most 128 where it was measured with configurations of warpgroups and they do not run."""
    here = device(on.index)
    measured, table = tables.crossover(KERNEL, n, k, here.name, "expand"), tuned(here.name)
    without = not wgmma.runs(here) and any(isinstance(table.get((n, k, rows)), WarpgroupConfig) for rows in TUNED_ROWS)
    return min(measured, tables.UNKNOWN_AGAINST_EXPAND) if without else measured


def groups(m: int) -> int:
    """Groups of eight rows of x that one program computes: the smallest of 1, 2, 4 that holds m, 4 above."""
    return next((c for c in (1, 2) if m <= 8 * c), MAX_ROWS // 8)


def _measured(m: int, n: int, k: int, on: Device) -> Config | WarpgroupConfig | None:
    table, found, most = tuned(on.name), None, 0
    for rows in TUNED_ROWS:
        config = table.get((n, k, rows))
        if config is not None and (not isinstance(config, WarpgroupConfig) or wgmma.runs(on)):
            found, most = config, rows
            if m <= rows:
                return config
    return found if groups(m) == groups(most) else None


def choose(m: int, n: int, k: int, on: Device) -> Config | WarpgroupConfig:
    """The measured configuration for this layer on this GPU at the next M that was measured, the last one above it where it computes
    as many rows of x in a program, else a rule drawn from measured ones."""
    measured = _measured(m, n, k, on)
    if measured is not None:
        return measured
    if wgmma.suits(m, n, on):
        return wgmma.choose(m, n, k, on)
    # Four warps side by side share what they read of x; K is split until each processor holds about six programs.
    wide = groups(m)
    tiles = 1 if wide < 4 else 2
    programs = -(-n // (4 * tiles * TILE))
    split = next((s for s in (8, 4, 2) if programs * s <= 6 * on.processors and k >= s * PAIR), 1)
    depth, ahead, registers = {1: (2, 1, 64), 2: (1, 0, 112)}.get(wide, (1, 0, 0))
    return Config(tiles, 4, 4, depth, ahead, split, registers, on.dependent_launch)


def runnable(config: Config, on: Device) -> Config:
    """The configuration less what the GPU or this Triton lacks: clusters and dependent launches both came with sm_90."""
    clusters = on.dependent_launch and fragment is not None and fragment.CLUSTERS
    return replace(config, overlap=config.overlap and on.dependent_launch, cluster=config.cluster and clusters and config.split > 1)


def launch(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, config: Config | WarpgroupConfig, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The operator on x [M, K] contiguous with this configuration, into out [M, N] where given."""
    m, k = x.shape
    n, tiles, pairs = packed.channel.shape[0], packed.words.shape[0], packed.words.shape[1] // WORDS_A_PAIR
    out = x.new_empty((m, n)) if out is None else out
    if m == 0 or n == 0:
        return out
    bias_or_any = packed.channel if bias is None else bias
    if fragment is None or not (x.is_cuda and device(x.device.index).mma):
        # AMD's matrix instructions are 16 wide at least.
        block_m = max(8 * groups(m), 16)
        grid = (-(-tiles // _PORTABLE_TILES), -(-m // block_m))
        flags = {"HAS_BIAS": bias is not None, "BLOCK_M": block_m, "ROWS": _PORTABLE_TILES, "num_warps": 4, "num_stages": 1}
        _portable[grid](x, *packed, bias_or_any, out, m, n, k, tiles, pairs, **flags)
        return out
    if k % PAIR:
        x = F.pad(x, (0, -k % PAIR))
    elif x.data_ptr() % 16:
        x = x.clone()
    if packed.scales.data_ptr() % 4:
        # Part of another tensor: programs read four bytes at a time.
        packed = packed._replace(scales=packed.scales.clone())
    if isinstance(config, WarpgroupConfig):
        return wgmma.launch(x, *packed, bias, config, out)
    config = runnable(config, device(x.device.index))
    (steps, split, even), (depth, depth_x) = config.steps(k), config.ahead(k)
    programs = split if config.cluster else 1
    partial = split > programs
    target = x.new_empty((split, m, n), dtype=torch.float32) if partial else out
    columns = groups(m)
    extra = {"launch_pdl": True} if config.overlap else {}
    registers = {"maxnreg": config.registers} if config.registers else {}
    kernel: Any = fragment.tile
    kernel[(-(-tiles // (config.tiles * config.warps_n)), split // programs, -(-m // (8 * columns)))](
        x.view(torch.int32),
        *packed,
        bias_or_any,
        target,
        m,
        n,
        pairs * PAIR // 2,
        tiles,
        pairs,
        HAS_BIAS=bias is not None,
        PARTIAL=partial,
        EVEN=even,
        HALF=x.dtype == torch.float16,
        STEPS=steps,
        ROWS=config.tiles,
        COLUMNS=columns,
        WARPS=config.num_warps,
        WARPS_N=config.warps_n,
        DEPTH=depth,
        DEPTH_X=depth_x,
        OVERLAP=config.overlap,
        CLUSTER=programs,
        LOOP=config.loop,
        num_warps=config.num_warps,
        num_ctas=programs,
        **registers,
        **extra,
    )
    if partial:
        split_k.add(target, packed.channel, None, bias, out, config.overlap)
    return out


@torch.library.custom_op("kernel_pytorch::skinny_w4a16", mutates_args=())
def _linear(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, channel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    k = x.shape[-1]
    flat = x.reshape(-1, k).contiguous()
    config = choose(flat.shape[0], channel.shape[0], k, device(x.device.index))
    with torch.cuda.device_of(x):
        y = launch(flat, Packed(words, scales, channel), bias, config)
    return y.view(*x.shape[:-1], channel.shape[0])


@_linear.register_fake
def _(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, channel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], channel.shape[0]))


def check(packed: Packed, in_features: int, by: str, bias: torch.Tensor | None = None) -> None:
    """Raises ValueError, in the name of `by`, when tensors are not what `pack` makes of a weight [N, in_features]."""
    n = packed.channel.shape[0]
    tiles, pairs = -(-n // TILE), -(-in_features // PAIR)
    expected = (("words", torch.int32, (tiles, pairs * WORDS_A_PAIR)), ("scales", torch.int8, (tiles, pairs * SCALES_A_PAIR)))
    for name, dtype, shape in (*expected, ("channel", torch.float32, (n,)), ("bias", torch.float32, (n,))):
        values = bias if name == "bias" else getattr(packed, name)
        if values is not None and (values.dtype != dtype or values.shape != shape or not values.is_contiguous()):
            made = f", from skinny_w4a16.pack of a weight [{n}, {in_features}]" if name in ("words", "scales") else ""
            shown = f"{values.dtype} {tuple(values.shape)}"
            raise ValueError(f"{by}: {name} must be contiguous {dtype} {shape}{made}, got {shown}")


def linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] bfloat16 or float16, packed from `pack`, bias float32 [N] -> [..., N] in x.dtype.

    Values times block scales are exact; sums in float32, channel and bias on the sum, one rounding at the end. Right for any
    number of rows, made for 1 to 64, on Hopper to 128. Raises ValueError when tensors do not fit."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"skinny_w4a16: x must be bfloat16 or float16, got {x.dtype}")
    check(packed, x.shape[-1], "skinny_w4a16", bias)
    return _linear(x, packed.words, packed.scales, packed.channel, bias)
