"""What `tune` searches for skinny_w4a16: configurations, how they are launched, and the road that wins at many rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from kernel_pytorch.kernels import skinny_w4a16 as op
from kernel_pytorch.kernels.skinny_w4a16 import Config
from kernel_pytorch.kernels.tune import Space

Stored = tuple[torch.Tensor, ...]
TILES = ((64, 4), (64, 2), (128, 4), (128, 8), (32, 2))


def candidates(m: int, n: int, k: int, device: torch.device) -> list[Config]:
    on = op.device(device.index)
    found = [
        Config(block_n, words, split, warps, 2, overlap)
        for overlap in (("early", "late") if on.dependent_launch else ("none",))
        for words in (32, 64)
        for split in (1, 2, 4, 8)
        for block_n, warps in TILES
        if split == 1 or (k >= 2 * split * words * op.VALUES_A_WORD and -(-n // block_n) * split <= 16 * on.processors)
    ]
    return list(dict.fromkeys([op.choose(m, n, k, on), *found]))


def neighbours(config: Config, m: int, n: int, k: int, device: torch.device) -> list[Config]:
    found = [replace(config, num_stages=stages) for stages in (config.num_stages - 1, config.num_stages + 1) if stages >= 2]
    found += [replace(config, split=split) for split in (config.split // 2, config.split * 2) if split]
    found += [replace(config, words=words) for words in (config.words // 2, config.words * 2) if 16 <= words <= 128]
    found += [replace(config, num_warps=warps) for warps in (config.num_warps // 2, config.num_warps * 2) if 1 <= warps <= 8]
    return found


def variant(config: Config, m: int, n: int, k: int) -> Hashable:
    whole = k % (config.split * config.words * op.VALUES_A_WORD) == 0
    return op.block_m(m), replace(config, split=min(config.split, 2)), whole


def store(weight: torch.Tensor) -> Stored:
    """Random codes and scales of the weight's shape: times do not depend on values, and finding them is not this kernel's work."""
    n, k = weight.shape
    rng = torch.Generator(weight.device).manual_seed(n + k)
    codes = torch.randint(0, 256, (n, -(-k // 16) * 8), dtype=torch.uint8, device=weight.device, generator=rng)
    codes[:, k // 2 :] = 0
    scale = torch.rand(n, codes.shape[1] // 8, device=weight.device, generator=rng).add_(0.1).to(torch.float8_e4m3fn)
    return op.pack(codes, scale, "nvfp4", torch.tensor(0.01, device=weight.device))


def launch(x: torch.Tensor, stored: Stored, config: Config) -> torch.Tensor:
    return op.launch(x, op.Packed(*stored), None, config)


def reference(x: torch.Tensor, stored: Stored) -> torch.Tensor:
    return op.reference(x, op.dequantize(op.Packed(*stored), x.shape[-1]))


def _expanded(stored: Stored) -> Callable[[torch.Tensor], torch.Tensor]:
    """The weight expanded to x's dtype at each call, a library's product; compiled, as in a compiled model."""
    road = torch.compile(lambda x, *parts: op.reference(x, op.dequantize(op.Packed(*parts), x.shape[-1])), dynamic=False)
    return lambda x: road(x, *stored)


SPACE = Space(candidates, neighbours, variant, store, launch, reference, {"dequantize": _expanded})
