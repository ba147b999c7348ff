"""What `tune` searches for skinny_w4a16: configurations, how they are launched, and the road that wins at many rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from kernel_pytorch.kernels import expand
from kernel_pytorch.kernels import skinny_w4a16 as op
from kernel_pytorch.kernels import skinny_w4a16_wgmma as wgmma
from kernel_pytorch.kernels.skinny_w4a16 import Config
from kernel_pytorch.kernels.skinny_w4a16_wgmma import WarpgroupConfig
from kernel_pytorch.kernels.tune import Space

Stored = tuple[torch.Tensor, ...]


# Rows of x from which products of warpgroups were faster on some layer.
LEAST_WARPGROUP_ROWS = 16


def _warpgroups(m: int, n: int, k: int, on: op.Device) -> list[WarpgroupConfig]:
    rows = wgmma.block_m(m)
    return [
        WarpgroupConfig(tiles, warps, block_m, 1, parts, left, split, on.dependent_launch)
        for parts, left in ((1, 1), (4, 3), (2, 1), (4, 1))
        for block_m in (rows, 64)[: 1 + (rows > 64)]
        for tiles, warps in ((2, 8), (1, 8), (2, 4), (1, 4))
        for split in (1, 2, 4, 8)
        # A warp's sums take registers of its own.
        if tiles * block_m <= 32 * warps
        and on.processors <= 2 * (-(-n // (op.TILE * tiles * warps)) * split * -(-m // block_m)) <= 16 * on.processors
        and k >= 2 * split * wgmma.STEP
    ]


def candidates(m: int, n: int, k: int, device: torch.device) -> list[Config | WarpgroupConfig]:
    on = op.device(device.index)
    wider = _warpgroups(m, n, k, on) if m >= LEAST_WARPGROUP_ROWS and wgmma.runs(on) else []
    # In turn: where time ends early, either kernel has its first ones.
    both = itertools.chain.from_iterable(itertools.zip_longest(wider, _fragments(m, n, k, on)))
    return list(dict.fromkeys([op.choose(m, n, k, on), *filter(None, both)]))


def _fragments(m: int, n: int, k: int, on: op.Device) -> list[Config]:
    pairs, tiles, wide = -(-k // op.PAIR), -(-n // op.TILE), op.groups(m)
    # Programs that share K meet in a cluster where there are any, or a second kernel sums: either was measured faster somewhere.
    clusters = op.runnable(Config(1, 4, 4, 1, split=2, cluster=True), on).cluster
    return [
        Config(rows, warps, warps_n, depth, 1 if wide == 1 else 0, split, registers, on.dependent_launch, cluster)
        for rows, warps, warps_n in (
            (1, 4, 1),
            (1, 4, 2),
            (2, 4, 1),
            (2, 4, 2),
            (1, 4, 4),
            (2, 4, 4),
            (1, 8, 1),
            (1, 8, 4),
            (1, 8, 8),
            (1, 8, 2),
            (1, 16, 1),
        )
        for split in (1, 2, 4, 8)
        for cluster in ((False, True) if clusters and split > 1 else (False,))
        for depth in ((2, 4) if wide == 1 else (1, 2))
        for registers in (64, 96, 128, 168)[wide > 1 :: 2]
        if pairs >= 2 * split * (warps // warps_n)
        and pairs <= 32 * split * (warps // warps_n)
        and rows * wide <= 8
        and depth <= pairs // (warps // warps_n * split)
        and registers * warps * 32 <= 65536
        and 12 + 9 * rows * depth + 6 * rows * wide + 16 * wide <= registers + 8
        and registers <= 64 + 32 * rows * wide
        and (warps_n == 1) <= (wide <= 2)
        and on.processors <= tiles // (rows * warps_n) * split <= (8 if split > 1 else 16) * on.processors
    ]


def neighbours(config: Config | WarpgroupConfig, m: int, n: int, k: int, device: torch.device) -> list[Config | WarpgroupConfig]:
    if isinstance(config, WarpgroupConfig):
        return [replace(config, depth=depth) for depth in (config.depth - 1, config.depth + 1) if 1 <= depth <= config.steps(k)[0]]
    steps = config.steps(k)[0]
    found = [replace(config, depth=depth) for depth in (config.depth - 1, config.depth + 1) if 1 <= depth <= steps]
    found += [replace(config, depth_x=depth) for depth in (config.depth_x - 1, config.depth_x + 1) if 0 <= depth < steps]
    found += [replace(config, registers=registers) for registers in (48, 80, 112, 0) if registers * config.num_warps * 32 <= 65536]
    return [*found, replace(config, loop=not config.loop)]


def variant(config: Config | WarpgroupConfig, m: int, n: int, k: int) -> Hashable:
    steps, split, even = config.steps(k)
    if isinstance(config, WarpgroupConfig):
        return replace(config, split=min(split, 2)), steps, even
    return op.groups(m), replace(config, split=split if config.cluster else min(split, 2)), steps, even


def store(weight: torch.Tensor) -> Stored:
    """Random codes and scales of the weight's shape: times do not depend on values, and finding them is not this kernel's work."""
    n, k = weight.shape
    rng = torch.Generator(weight.device).manual_seed(n + k)
    codes = torch.randint(0, 256, (n, -(-k // 16) * 8), dtype=torch.uint8, device=weight.device, generator=rng)
    scale = torch.rand(n, codes.shape[1] // 8, device=weight.device, generator=rng).add_(0.1).to(torch.float8_e4m3fn)
    return op.pack(codes, scale, "nvfp4", torch.tensor(0.01, device=weight.device))


def launch(x: torch.Tensor, stored: Stored, config: Config | WarpgroupConfig) -> torch.Tensor:
    return op.launch(x, op.Packed(*stored), None, config)


def reference(x: torch.Tensor, stored: Stored) -> torch.Tensor:
    return op.reference(x, op.dequantize(op.Packed(*stored), x.shape[-1]))


def _expanded(stored: Stored) -> Callable[[torch.Tensor], torch.Tensor]:
    """The weight expanded to x's dtype at each call, a library's product."""
    return lambda x: torch.nn.functional.linear(x, expand.four_bits(op.Packed(*stored), x.shape[-1], x.dtype))


SPACE = Space(candidates, neighbours, variant, store, launch, reference, {"expand": _expanded})
