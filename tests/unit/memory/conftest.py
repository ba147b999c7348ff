"""Host memory that stands for a device and for pinned memory, and lanes that do everything at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import pytest
import torch

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.cpu import CpuBackend, CpuMemory
from kernel_pytorch.backends.memory import MemoryManager
from kernel_pytorch.memory.lanes import Lanes
from kernel_pytorch.schema import OnMismatch


class EagerLanes(Lanes):
    """The calling thread does everything at once: for what does not depend on the order."""

    def __init__(self) -> None:
        self.copies: list[int] = []

    def lane(self) -> Hashable:
        return 0

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Iterable[object]) -> None:
        self.copies.append(source.data_ptr())
        target.copy_(source)

    def wait(self, mark: object) -> None: ...

    def mark(self) -> None: ...

    def finish(self) -> None: ...

    def claim(self, memory: torch.Tensor) -> None: ...


class Pinnable(CpuMemory):
    """Host memory that stands for page-locked memory. capacity: bytes that the device says it has for a model; None is the host's."""

    can_pin = True
    capacity: int | None = None

    def free_bytes(self) -> int | None:
        return super().free_bytes() if self.capacity is None else self.capacity

    def _new_memory(self, shape, dtype, num_bytes: int, *, pinned: bool) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)


class PinningBackend(CpuBackend):
    def make_memory(self) -> MemoryManager:
        return Pinnable(self)


@pytest.fixture
def lanes() -> EagerLanes:
    return EagerLanes()


@pytest.fixture
def backend() -> Backend:
    return PinningBackend(hardware="any", on_mismatch=OnMismatch.emulate)
