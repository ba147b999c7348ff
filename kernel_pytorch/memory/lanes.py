"""Two queues of one device: the caller's own, where blocks compute, and one beside it that copies from the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from typing import Any

import torch

# A place in a queue that another queue can wait for.
Mark = Any


class Lanes(ABC):
    """What a Ring needs of a device. A lane does what it is given in order; two lanes know of each other by marks only."""

    @abstractmethod
    def lane(self) -> Hashable:
        """The caller's lane: where the calling thread's kernels go."""

    @abstractmethod
    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Iterable[Mark]) -> Mark:
        """Queues a copy of pinned host bytes to the device on the copying lane, which first waits for the marks `after`.
        Returns the mark behind it, and does not wait."""

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """What the caller's lane is given from now on runs after `mark`."""

    @abstractmethod
    def mark(self) -> Mark:
        """The mark behind everything that the caller's lane was given so far."""

    @abstractmethod
    def finish(self) -> None:
        """Waits, on the host, until all copies that were queued have ended."""

    @abstractmethod
    def claim(self, memory: torch.Tensor) -> None:
        """Says that the copying lane uses `memory`: its allocator must not give it away before those copies have ended."""


class CudaLanes(Lanes):
    """Streams and events of `torch.cuda`, also those of a ROCm build."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device)

    def lane(self) -> Hashable:
        return torch.cuda.current_stream(self._device).cuda_stream

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Iterable[Mark]) -> Mark:
        for event in after:
            self._copying.wait_event(event)
        with torch.cuda.stream(self._copying):
            target.copy_(source, non_blocking=True)
            return self._copying.record_event()

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def finish(self) -> None:
        self._copying.synchronize()

    def claim(self, memory: torch.Tensor) -> None:
        memory.record_stream(self._copying)
