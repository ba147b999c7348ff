"""Measured rates of a device: bytes read a second, and multiply-adds a second by element type."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

_SAMPLES = 7
# Side of the square matrices multiplied: large enough to be bound by arithmetic, small enough for seconds in all.
_CPU_SIDE, _CUDA_SIDE = 1024, 8192
_LONGEST_S = 3.0


@dataclass(frozen=True)
class Bandwidth:
    bytes_per_s: float
    buffer_bytes: int
    note: str


@dataclass(frozen=True)
class MatmulRate:
    """ops_per_s: two operations a multiply-add; None when this device or this torch has no such matmul."""

    dtype: str
    ops_per_s: float | None
    note: str

    @property
    def shown(self) -> str:
        return "unsupported" if self.ops_per_s is None else f"{self.ops_per_s / 1e9:,.1f} Gop/s"


def read_bandwidth(device: torch.device, cache_bytes: int | None, available_bytes: int | None) -> Bandwidth:
    """Median rate of summing a buffer of four times the last-level cache, at least 1 GiB and at most a quarter of the free
    memory; the note says when that leaves the buffer smaller than the cache."""
    wanted = max(2**30, 4 * (cache_bytes or 0))
    size = min(wanted, (available_bytes or 4 * wanted) // 4) // 4096 * 4096
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    seconds = _median_seconds(lambda: buffer.sum(), device, _SAMPLES)
    note = f"median of {_SAMPLES} sums over {size / 2**30:.2f} GiB"
    if cache_bytes is not None and size < 2 * cache_bytes:
        note += f"; the cache of {cache_bytes / 2**30:.2f} GiB holds part of it"
    return Bandwidth(size / seconds, size, note)


def matmul_rates(device: torch.device, side: int | None = None) -> list[MatmulRate]:
    """One rate for each element type that a recipe can compute in."""
    side = side or (_CUDA_SIDE if device.type == "cuda" else _CPU_SIDE)
    return [_rate(dtype, side, device) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)]


def _rate(dtype: torch.dtype, side: int, device: torch.device) -> MatmulRate:
    name = str(dtype).removeprefix("torch.")
    # A type without an instruction runs in a loop a thousand times slower: an eighth of the side says so in time.
    small = max(side // 8, 16)
    try:
        seconds = min(_seconds(_matmul(dtype, small, device), device, 5))
    except (RuntimeError, ValueError) as error:
        return MatmulRate(name, None, str(error).splitlines()[0][:120])
    if seconds * (side / small) ** 3 > _LONGEST_S:
        return MatmulRate(name, 2 * small**3 / seconds, f"best of 5, {small} x {small} x {small}: no fast path")
    seconds = _median_seconds(_matmul(dtype, side, device), device, _SAMPLES)
    return MatmulRate(name, 2 * side**3 / seconds, f"median of {_SAMPLES}, {side} x {side} x {side}")


def _matmul(dtype: torch.dtype, side: int, device: torch.device) -> Callable[[], torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, device=device, generator=generator)
    b = torch.randn(side, side, device=device, generator=generator)
    if dtype is torch.int8:
        a8, b8 = a.mul(20).to(dtype), b.mul(20).to(dtype)
        return lambda: torch.ops.aten._int_mm(a8, b8.t())
    if dtype is torch.float8_e4m3fn:
        af, bf, one = a.to(dtype), b.to(dtype), torch.ones((), device=device)
        return lambda: torch.ops.aten._scaled_mm(af, bf.t(), one, one, out_dtype=torch.bfloat16)
    ac, bc = a.to(dtype), b.to(dtype)
    return lambda: ac @ bc.t()


def _median_seconds(call: Callable[[], torch.Tensor], device: torch.device, num_samples: int) -> float:
    return median(_seconds(call, device, num_samples))


def _seconds(call: Callable[[], torch.Tensor], device: torch.device, num_samples: int) -> list[float]:
    samples = []
    with torch.inference_mode():
        call()
        for _ in range(num_samples):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            samples.append(time.perf_counter() - start)
    return samples


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
