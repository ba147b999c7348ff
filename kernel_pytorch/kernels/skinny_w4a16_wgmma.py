"""Configuration and launch of Hopper's kernel of skinny_w4a16, for more rows of x than one pass of the other NVIDIA kernel holds.

N out features, K in features, M rows. A step is 128 columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from kernel_pytorch.kernels import split_k
from kernel_pytorch.kernels.device import Device

try:
    from kernel_pytorch.kernels import skinny_w4a16_wgmma_jit as jit
except (ImportError, AttributeError):
    # Gluon is part of Triton from 3.5 on.
    jit = None

# Triton 3.5 compiles the kernel too, but what it makes never ran on a GPU.
LEAST_TRITON = (3, 6)

STEP, TILE = 128, 16
BLOCK_M = (16, 32, 64, 128)


@dataclass(frozen=True)
class WarpgroupConfig:
    """tiles: of 16 rows, a warp, 1 or 2. num_warps: 4 or 8, each with rows of its own. block_m: rows of x that a program computes.
    depth: steps whose weights are asked for ahead. parts: products of a step and tile, 1, 2 or 4. left: products under way while the
    next operand is unpacked. split: programs that share K. overlap: the next kernel may start and ask for its weights before this one
    ends (programmatic dependent launch). Raises ValueError when products could read what is written meanwhile."""

    tiles: int
    num_warps: int
    block_m: int
    depth: int = 1
    parts: int = 4
    left: int = 3
    split: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        # The next step's x is stored after the last part, of four after the third.
        begun = self.tiles * (3 if self.parts == 4 else self.parts)
        if self.left > begun:
            raise ValueError(f"left must be at most {begun} with {self.tiles} tiles and {self.parts} parts, got {self.left}")

    def steps(self, k: int) -> tuple[int, int, bool]:
        """Steps of a program, an even number; the programs that share K; whether all their steps are K's."""
        total = -(-k // STEP)
        steps = 2 * -(-total // (2 * self.split))
        split = -(-total // steps)
        return steps, split, total == steps * split

    def ahead(self, k: int) -> int:
        """Steps whose weights are asked for ahead, no more than there are."""
        return min(self.depth, self.steps(k)[0])


def runs(on: Device) -> bool:
    """Whether the GPU has the instruction, which is sm_90's alone, and this Triton is one that the kernel was measured with or newer."""
    return on.warpgroups and jit is not None and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= LEAST_TRITON


def block_m(m: int) -> int:
    """Rows of x that one program computes: the smallest of BLOCK_M that holds m, the last above."""
    return next((rows for rows in BLOCK_M if m <= rows), BLOCK_M[-1])


def _fills(m: int, n: int, on: Device) -> bool:
    """Whether the widest programs, 256 rows of the weight each, are enough for three quarters of the processors."""
    return 4 * -(-n // (2 * 8 * TILE)) * -(-m // block_m(m)) >= 3 * on.processors


def suits(m: int, n: int, on: Device) -> bool:
    """A rule drawn from what was measured on an H200: whether this kernel is the faster one. Wide weights from 9 rows of x on, others
    above what the other kernel computes in one pass."""
    return runs(on) and (m > 32 or (m > 8 and _fills(m, n, on)))


def choose(m: int, n: int, k: int, on: Device) -> WarpgroupConfig:
    """A rule drawn from the same measurements: one wide program a processor, or narrow ones that share K, two a processor."""
    rows = block_m(m)
    if _fills(m, n, on):
        parts, left = (4, 3) if rows > 64 else (1, 1)
        return WarpgroupConfig(2, 8, rows, parts=parts, left=left, overlap=on.dependent_launch)
    rows = min(rows, 64)
    programs = -(-n // (2 * 4 * TILE)) * -(-m // rows)
    split = next((s for s in (1, 2, 4) if 2 * programs * s >= 3 * on.processors or k < 4 * s * STEP), 8)
    return WarpgroupConfig(2, 4, rows, parts=2, left=1, split=split, overlap=on.dependent_launch)


def launch(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    channel: torch.Tensor,
    bias: torch.Tensor | None,
    config: WarpgroupConfig,
    out: torch.Tensor,
) -> torch.Tensor:
    """x [M, K] contiguous, K whole pairs of chunks, beginning at a multiple of 16 bytes; the weight as `skinny_w4a16.pack` gives it;
    into out [M, N]."""
    (m, k), n, tiles = x.shape, channel.shape[0], words.shape[0]
    steps, split, even = config.steps(k)
    target = x.new_empty((split, m, n), dtype=torch.float32) if split > 1 else out
    extra = {"launch_pdl": True} if config.overlap else {}
    assert jit is not None, "`choose` of skinny_w4a16 asks `runs`"
    kernel: Any = jit.multiply
    kernel[(-(-tiles // (config.tiles * config.num_warps)), split, -(-m // config.block_m))](
        x,
        words,
        scales.view(torch.int32),
        channel,
        # A pointer that the kernel does not read without a bias.
        channel if bias is None else bias,
        target,
        m,
        n,
        k,
        tiles,
        k // STEP,
        HAS_BIAS=bias is not None,
        PARTIAL=split > 1,
        EVEN=even,
        HALF=x.dtype == torch.float16,
        STEPS=steps,
        ROWS=config.tiles,
        BLOCK_M=config.block_m,
        WARPS=config.num_warps,
        DEPTH=config.ahead(k),
        PARTS=config.parts,
        LEFT=config.left,
        OVERLAP=config.overlap,
        num_warps=config.num_warps,
        **extra,
    )
    if split > 1:
        split_k.add(target, channel, None, bias, out, config.overlap)
    return out
