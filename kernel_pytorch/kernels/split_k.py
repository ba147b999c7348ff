"""K shared by programs: a second kernel (split_k_jit) adds what each of them summed, scales once and rounds once.

N out features, M rows, S programs that share K.
"""

from __future__ import annotations

from typing import Any

import torch

from kernel_pytorch.kernels import split_k_jit

BLOCK = 512
# The kernel has a program a row in the grid's second dimension, which CUDA and HIP end here.
MOST_ROWS = 65535

# Triton's launcher takes plain values where the kernel's signature says constexpr.
_sum_splits: Any = split_k_jit.sum_splits


def add(
    partial: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    overlap: bool,
) -> None:
    """out [M, N] = sum of partial [S, M, N] * scale [N] * row_scale, M numbers, + bias [N]; all but out float32 and contiguous.
    overlap: the kernel starts before the one that sums has ended, and waits for it (programmatic dependent launch)."""
    split, m, n = partial.shape
    flags = {"HAS_BIAS": bias is not None, "HAS_ROW_SCALE": row_scale is not None, "PDL": overlap}
    extra = {"launch_pdl": True} if overlap else {}
    rows_scale = None if row_scale is None else row_scale.view(-1)
    for first in range(0, m, MOST_ROWS):
        parts, scales, rows = (partial, rows_scale, out) if first == 0 else (partial[:, first:], _from(rows_scale, first), out[first:])
        # Where there is no factor or bias, a pointer that the kernel does not read.
        read = (scale, scale if scales is None else scales, scale if bias is None else bias)
        grid = (-(-n // BLOCK), min(MOST_ROWS, m - first))
        _sum_splits[grid](parts, *read, rows, m, n, SPLIT=split, BLOCK=BLOCK, **flags, **extra)


def _from(row_scale: torch.Tensor | None, first: int) -> torch.Tensor | None:
    return None if row_scale is None else row_scale[first:]
