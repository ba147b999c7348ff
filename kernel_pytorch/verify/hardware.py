"""HardwareValidator: what a backend claims of its device is tried on it. A claim that does not hold is named, with the figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.errors import KernelPyTorchError, UnsupportedOperationError
from kernel_pytorch.verify.rows import relative_l2

# [M, K] times [K, N]: every size is a multiple of what the narrow matmuls ask for.
_M, _K, _N = 64, 256, 96
_BLOCK_BYTES = 2**20
# Relative L2 error that the format of the result explains, in units of its spacing at 1: one rounding of the result for
# 16 bits, which are summed in 32; the sums themselves for 32 and 64.
_SPACINGS = {torch.float64: 16, torch.float32: 16, torch.float16: 1, torch.bfloat16: 1}
# What torch raises where it has no such operation, or the device refuses it.
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, KernelPyTorchError)


@dataclass(frozen=True)
class HardwareCheck:
    """claim: what the backend says its device can do. passed: None where this library has no way to try it. message: the
    figures, or what was wrong."""

    claim: str
    passed: bool | None
    message: str


@dataclass(frozen=True)
class Trial:
    """A product of two matrices of one format, and the same in float64 from the same stored values. allowed: relative L2 error."""

    product: torch.Tensor
    exact: torch.Tensor
    allowed: float

    def judge(self) -> tuple[bool, str]:
        error = relative_l2(self.product.cpu(), self.exact)
        return error <= self.allowed, f"relative L2 error {error:.1e} against float64, {self.allowed:.1e} allowed"


class HardwareValidator:
    """Tries what one backend claims: an allocation, a matmul of each claimed format, pinned memory and a graph capture."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def validate(self) -> list[HardwareCheck]:
        """One HardwareCheck a claim. Takes a megabyte and milliseconds on a warm device.

        Raises UnsupportedOperationError for a device that is only planned for."""
        if not self.backend.facts.present:
            raise UnsupportedOperationError(f"{self.backend.facts.name} is planned for and not here: nothing can be tried on it")
        claims = self.backend.claims()
        checks = [self._check("allocation", self._allocation)]
        checks += [self._matmul(format) for format in claims.formats]
        if claims.pinned:
            checks.append(self._check("pinned memory", self._pinned))
        if claims.graphs:
            checks.append(self._check("graph capture", self._capture))
        return checks

    def _check(self, claim: str, attempt: Callable[[], tuple[bool, str]]) -> HardwareCheck:
        try:
            passed, message = attempt()
        except _REFUSALS as error:
            lines = str(error).strip().splitlines()
            passed, message = False, f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
        return HardwareCheck(claim, passed, message if passed else f"{self.backend.vendor} {claim}: {message}")

    def _matmul(self, format: str) -> HardwareCheck:
        claim = f"matmul {format}"
        if format not in TRIALS:
            return HardwareCheck(claim, None, "no trial of this format here")
        return self._check(claim, lambda: TRIALS[format](self.backend.device).judge())

    def _allocation(self) -> tuple[bool, str]:
        memory, device = self.backend.memory, self.backend.device
        free, total = self.backend.available_memory_bytes(), self.backend.facts.memory_bytes
        if free is not None and total is not None and free > total:
            return False, f"{free:,} bytes are said to be free of {total:,} in all"
        before = memory.get_memory_stats().device.in_use_bytes
        tensor = memory.allocate_tensor((_BLOCK_BYTES // 4,), torch.int32)
        if tensor.device.type != device.type or tensor.dtype != torch.int32 or tensor.numel() != _BLOCK_BYTES // 4:
            return False, f"found {tensor.numel()} values of {tensor.dtype} on {tensor.device}; asked for {_BLOCK_BYTES // 4} on {device}"
        held = memory.get_memory_stats().device.in_use_bytes - before
        expected = torch.arange(tensor.numel(), dtype=torch.int32)
        tensor.copy_(expected)
        if not torch.equal(tensor.cpu(), expected):
            return False, "what was written is not what is read"
        memory.return_tensor(tensor)
        left = memory.get_memory_stats().device.in_use_bytes - before
        if held < _BLOCK_BYTES or left != 0:
            return False, f"{held:,} bytes counted while {_BLOCK_BYTES:,} were in use, {left:,} after they were returned"
        return True, f"{_BLOCK_BYTES:,} bytes written and read back"

    def _pinned(self) -> tuple[bool, str]:
        memory = self.backend.memory
        source = memory.allocate_tensor((_BLOCK_BYTES,), torch.uint8, pinned=True).fill_(7)
        if not source.is_pinned():
            return False, "the tensor is not page-locked"
        arrived = source.to(self.backend.device, non_blocking=True)
        self.backend.synchronize()
        same = bool((arrived == 7).all())
        memory.return_tensor(source)
        return same, f"{_BLOCK_BYTES:,} bytes copied to the device" if same else "what arrived is not what was written"

    def _capture(self) -> tuple[bool, str]:
        x = torch.zeros(_M, _K, device=self.backend.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _ = x.mul(2).add(1)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x.mul(2).add(1)
        x.fill_(3)
        graph.replay()
        self.backend.synchronize()
        same = bool((y == 7).all())
        return same, "captured and replayed on other inputs" if same else f"a replay gave {y.flatten()[0].item()}, not 7"


def _operands(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a [M, K] and b [N, K] as stored, on the device, and the exact product of the stored values, float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, _K, generator=generator, dtype=torch.float64) for rows in (_M, _N))
    if dtype is torch.int8:
        a, b = (value.mul(40).round().clamp(-127, 127) for value in (a, b))
    a, b = a.to(dtype), b.to(dtype)
    exact = a.double() @ b.double().t()
    return a.to(device), b.to(device), exact


def _float_trial(dtype: torch.dtype) -> Callable[[torch.device], Trial]:
    def run(device: torch.device) -> Trial:
        a, b, exact = _operands(device, dtype)
        return Trial(a @ b.t(), exact, _SPACINGS[dtype] * torch.finfo(dtype).eps)

    return run


def _int8_trial(device: torch.device) -> Trial:
    a, b, exact = _operands(device, torch.int8)
    return Trial(torch.ops.aten._int_mm(a, b.t()), exact, 0.0)


def _float8_trial(dtype: torch.dtype) -> Callable[[torch.device], Trial]:
    def run(device: torch.device) -> Trial:
        a, b, exact = _operands(device, dtype)
        one = torch.ones((), device=device)
        product = torch.ops.aten._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
        return Trial(product, exact, torch.finfo(torch.bfloat16).eps)

    return run


# Formats with scales of blocks are missing: their layouts are the kernels' own, and none here multiplies them yet.
TRIALS: dict[str, Callable[[torch.device], Trial]] = {
    **{str(dtype).removeprefix("torch."): _float_trial(dtype) for dtype in _SPACINGS},
    "int8": _int8_trial,
    "float8_e4m3fn": _float8_trial(torch.float8_e4m3fn),
    "float8_e4m3fnuz": _float8_trial(torch.float8_e4m3fnuz),
}
