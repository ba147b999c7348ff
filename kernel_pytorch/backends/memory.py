"""MemoryManager: tensors from pools of size classes, on a device and in pinned host memory. All figures are bytes.

A vendor says what only it knows: free bytes, how its allocator's cache is emptied, in which order the device works.
"""

from __future__ import annotations

import math
import threading
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from kernel_pytorch.errors import MemoryReturnError, OutOfMemoryError, UnsupportedOperationError

if TYPE_CHECKING:
    from kernel_pytorch.backends.base import Backend

# Blocks start at the granule of torch's CUDA allocator; above it, eight sizes lie between a power of two and the next.
_SMALLEST_BYTES = 512
_CLASSES_BITS = 3
# What torch's allocators say when a request fails and no exception class of its own tells.
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


def size_class_bytes(num_bytes: int) -> int:
    """The size of the block that a request gets: at least `num_bytes`, and less than an eighth more above 512 bytes."""
    if num_bytes <= _SMALLEST_BYTES:
        return _SMALLEST_BYTES
    step = 1 << ((num_bytes - 1).bit_length() - 1 - _CLASSES_BITS)
    return -(-num_bytes // step) * step


@dataclass(frozen=True)
class PoolStats:
    """in_use_bytes: blocks handed out. requested_bytes: what was asked for of these. pooled_bytes: blocks kept for reuse.
    peak_in_use_bytes: most in use at once. num_reused: allocations that a pooled block served. num_dropped: tensors that
    their owner let go of without returning them, so that torch freed them."""

    in_use_bytes: int = 0
    requested_bytes: int = 0
    pooled_bytes: int = 0
    peak_in_use_bytes: int = 0
    num_allocations: int = 0
    num_reused: int = 0
    num_returned: int = 0
    num_dropped: int = 0

    @property
    def fragmentation(self) -> float:
        """Share of the blocks in use that size classes add to what was asked for; 0 when nothing is in use."""
        return 1 - self.requested_bytes / self.in_use_bytes if self.in_use_bytes else 0.0


@dataclass(frozen=True)
class MemoryStats:
    """One snapshot of any backend. total_bytes: of the device. free_bytes: that a new allocation may get. cached_bytes: what
    the framework's allocator keeps beyond live tensors. None is unknown. num_clears: times the pools were emptied.
    num_out_of_memory: allocations that failed after the retry."""

    total_bytes: int | None
    free_bytes: int | None
    cached_bytes: int | None
    device: PoolStats
    pinned: PoolStats
    num_clears: int
    num_out_of_memory: int


@dataclass
class _Block:
    """memory: bytes [num_bytes], or a tensor of the request's own shape where a device has no bytes to share."""

    memory: torch.Tensor
    num_bytes: int
    ready: Callable[[], Any] | None = None


@dataclass
class _Pool:
    free: defaultdict[Hashable, list[_Block]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PoolStats.__dataclass_fields__, 0))

    def take(self, key: Hashable) -> _Block | None:
        """The block of that key that was returned first: its last work is the likeliest to be over."""
        blocks = self.free.get(key)
        if not blocks:
            return None
        block = blocks.pop(0)
        self.counts["pooled_bytes"] -= block.num_bytes
        self.counts["num_reused"] += 1
        return block

    def hand_out(self, num_bytes: int, requested: int) -> None:
        counts = self.counts
        counts["num_allocations"] += 1
        counts["in_use_bytes"] += num_bytes
        counts["requested_bytes"] += requested
        counts["peak_in_use_bytes"] = max(counts["peak_in_use_bytes"], counts["in_use_bytes"])

    def let_go(self, num_bytes: int, requested: int, how: str) -> None:
        self.counts["in_use_bytes"] -= num_bytes
        self.counts["requested_bytes"] -= requested
        self.counts[how] += 1

    def put(self, key: Hashable, block: _Block) -> None:
        self.free[key].append(block)
        self.counts["pooled_bytes"] += block.num_bytes

    def clear(self) -> int:
        """Drops every pooled block; returns their bytes."""
        self.free.clear()
        dropped, self.counts["pooled_bytes"] = self.counts["pooled_bytes"], 0
        return dropped

    def stats(self) -> PoolStats:
        return PoolStats(**self.counts)


@dataclass
class _Lease:
    """A tensor that was handed out. block: None once it came back, or once its owner let go of it. returned: it came back."""

    pool: _Pool
    key: Hashable
    block: _Block | None
    num_bytes: int
    requested: int
    returned: bool = False
    tensor: weakref.ref[torch.Tensor] | None = None


class MemoryManager(ABC):
    """Hands out tensors of one device and takes them back, from any thread.

    A returned block serves the next request of its size class on the same stream. A tensor that another stream used must
    be synchronized with before it is returned. Constructors do no work.
    """

    # Whether tensors of the device can share one block of bytes; where not, pools keep tensors of equal shape and type.
    shares_bytes: ClassVar[bool] = True
    can_pin: ClassVar[bool] = False

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.RLock()
        self._device_pool, self._pinned_pool = _Pool(), _Pool()
        self._leases: dict[int, _Lease] = {}
        # Tensors die in any thread, also while that thread is in here: their ends are noted, and counted in the next call.
        self._dropped: deque[tuple[int, _Lease]] = deque()
        self._num_clears = self._num_out_of_memory = 0

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes that a new allocation may still get; None when unknown."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Gives what the framework's allocator keeps beyond live tensors back to the device."""

    def cached_bytes(self) -> int | None:
        """Bytes that `empty_cache` would give back; None when unknown."""
        return None

    def stream(self) -> Hashable:
        """The queue that the calling thread's work goes to: blocks are reused within one."""
        return None

    def fence(self) -> Callable[[], Any] | None:
        """A function that waits for the work queued so far; None where calls have finished when they return."""
        return None

    def host_free_bytes(self) -> int | None:
        """Bytes that a pinned allocation may still get; None when unknown."""
        return None

    def allocate_tensor(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, pinned: bool = False) -> torch.Tensor:
        """An uninitialized contiguous tensor on the device, or in page-locked host memory when `pinned`.

        Raises ValueError for a negative size, UnsupportedOperationError where memory cannot be pinned, and
        OutOfMemoryError, with required and available bytes, when it does not fit after the pools were cleared once.
        """
        if any(size < 0 for size in shape):
            raise ValueError(f"shape: found {tuple(shape)}; allowed sizes of 0 or more")
        if pinned and not self.can_pin:
            raise UnsupportedOperationError(f"pinned host memory feeds a CUDA device; this backend is {self._backend.vendor}")
        requested = math.prod(shape) * dtype.itemsize
        with self._lock:
            self._settle()
            pool = self._pinned_pool if pinned else self._device_pool
            num_bytes, key = self._class_of(tuple(shape), dtype, requested, pinned=pinned)
            block = pool.take(key)
            if block is None:
                block = _Block(self._new_memory(shape, dtype, num_bytes, pinned=pinned), num_bytes)
            elif block.ready is not None:
                block.ready()
                block.ready = None
            tensor = self._tensor_in(block.memory, shape, dtype)
            self._lease(tensor, _Lease(pool, key, block, num_bytes, requested))
            pool.hand_out(num_bytes, requested)
            return tensor

    def return_tensor(self, tensor: torch.Tensor) -> None:
        """Gives back the very tensor that `allocate_tensor` returned; neither it nor a view of it may be used any more.

        Raises MemoryReturnError for a tensor that was returned before, for a view, and for one from elsewhere."""
        with self._lock:
            self._settle()
            lease = self._leases.get(id(tensor))
            shown = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} tensor on {tensor.device}"
            if lease is None or lease.tensor is None or lease.tensor() is not tensor:
                raise MemoryReturnError(f"this {shown} was not handed out by {type(self).__name__}; a view cannot be returned either")
            if lease.returned or lease.block is None:
                raise MemoryReturnError(f"this {shown} was returned before; its memory may be another tensor's by now")
            block, lease.block, lease.returned = lease.block, None, True
            lease.pool.let_go(lease.num_bytes, lease.requested, "num_returned")
            if lease.pool is self._pinned_pool:
                block.ready = self.fence()
            lease.pool.put(lease.key, block)

    def optimize_memory_usage(self) -> int:
        """Empties the pools and the framework's cache; returns the bytes that were kept and are free now."""
        with self._lock:
            self._settle()
            before = self.cached_bytes()
            pooled = self._clear()
            after = self.cached_bytes()
            return pooled if before is None or after is None else pooled + before - after

    def get_memory_stats(self) -> MemoryStats:
        """Bytes and counts as of now."""
        with self._lock:
            self._settle()
            return MemoryStats(
                total_bytes=self._backend.facts.memory_bytes,
                free_bytes=self.free_bytes(),
                cached_bytes=self.cached_bytes(),
                device=self._device_pool.stats(),
                pinned=self._pinned_pool.stats(),
                num_clears=self._num_clears,
                num_out_of_memory=self._num_out_of_memory,
            )

    def _lease(self, tensor: torch.Tensor, lease: _Lease) -> None:
        number, dropped = id(tensor), self._dropped

        def ended(_: weakref.ref[torch.Tensor]) -> None:
            # What was not returned is free at once, whether or not the manager is called again.
            lease.block = None
            dropped.append((number, lease))

        lease.tensor = weakref.ref(tensor, ended)
        self._leases[number] = lease

    def _settle(self) -> None:
        """Forgets tensors that have ended, and counts those that were not returned."""
        while self._dropped:
            number, lease = self._dropped.popleft()
            if self._leases.get(number) is lease:
                del self._leases[number]
            if not lease.returned:
                lease.pool.let_go(lease.num_bytes, lease.requested, "num_dropped")

    def _class_of(self, shape: tuple[int, ...], dtype: torch.dtype, requested: int, *, pinned: bool) -> tuple[int, Hashable]:
        """Bytes of the block for a request, and what blocks that can serve it have in common."""
        if pinned:
            return size_class_bytes(requested), size_class_bytes(requested)
        if self.shares_bytes:
            return size_class_bytes(requested), (size_class_bytes(requested), self.stream())
        return requested, (shape, dtype, self.stream())

    def _new_memory(self, shape: Sequence[int], dtype: torch.dtype, num_bytes: int, *, pinned: bool) -> torch.Tensor:
        cause: RuntimeError | None = None
        for attempt in range(2):
            if attempt:
                self._clear()
            available = self.host_free_bytes() if pinned else self.free_bytes()
            if available is not None and num_bytes > available:
                continue
            try:
                if pinned:
                    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
                if self.shares_bytes:
                    return torch.empty(num_bytes, dtype=torch.uint8, device=self._backend.device)
                return torch.empty(tuple(shape), dtype=dtype, device=self._backend.device)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error).lower() for text in _NO_MEMORY):
                    raise
                cause = error
        self._num_out_of_memory += 1
        where = "pinned host memory" if pinned else self._backend.facts.name
        raise self._out_of_memory(where, num_bytes, available if available is not None else 0) from cause

    def _out_of_memory(self, where: str, required: int, available: int) -> OutOfMemoryError:
        message = f"{where} has no room for a tensor, also after clearing the pools"
        return self._backend.out_of_memory(message, required_bytes=required, available_bytes=available)

    def _tensor_in(self, memory: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if not self.shares_bytes:
            return memory.detach()
        tensor = torch.empty(0, dtype=dtype, device=memory.device)
        return tensor.set_(memory.untyped_storage(), 0, tuple(shape), _contiguous_strides(shape))

    def _clear(self) -> int:
        self._num_clears += 1
        dropped = self._device_pool.clear() + self._pinned_pool.clear()
        self.empty_cache()
        return dropped


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
