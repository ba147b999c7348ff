"""MemoryManager on a CPU: size classes, returns that are mistakes, exhaustion with its one retry, threads; on a GPU what only it has."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernel_pytorch.backends.amd import AmdBackend
from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.cpu import CpuBackend, CpuMemory
from kernel_pytorch.backends.memory import MemoryManager, MemoryStats, PoolStats, size_class_bytes
from kernel_pytorch.backends.nvidia import NvidiaBackend
from kernel_pytorch.errors import (
    AmdError,
    AmdOutOfMemoryError,
    MemoryReturnError,
    NvidiaError,
    NvidiaOutOfMemoryError,
    OutOfMemoryError,
    UnsupportedOperationError,
)
from kernel_pytorch.schema import OnMismatch

KiB = 1024


class Card(CpuMemory):
    """A device of `capacity` bytes in host memory, which counts what it holds as the device would."""

    capacity = 64 * KiB

    def free_bytes(self) -> int:
        self.num_looks = getattr(self, "num_looks", 0) + 1
        stats = self._device_pool.stats()
        return self.capacity - stats.in_use_bytes - stats.pooled_bytes


class CardBackend(CpuBackend):
    def make_memory(self) -> MemoryManager:
        return Card(self)


class Shapes(CpuMemory):
    """A device whose tensors share no bytes, as XLA's."""

    shares_bytes = False


def backend(kind: type[Backend] = CpuBackend) -> Backend:
    return kind(hardware="any", on_mismatch=OnMismatch.error)


@given(st.integers(0, 2**50))
def test_a_size_class_holds_the_request_and_wastes_less_than_an_eighth(num_bytes: int) -> None:
    size = size_class_bytes(num_bytes)
    assert size >= num_bytes
    assert size % 64 == 0
    assert size == 512 or size < num_bytes * 9 / 8
    assert size_class_bytes(size) == size


@pytest.mark.parametrize(("num_bytes", "size"), [(0, 512), (512, 512), (513, 576), (1024, 1024), (1025, 1152), (2**30 + 1, 2**30 + 2**27)])
def test_size_classes(num_bytes: int, size: int) -> None:
    assert size_class_bytes(num_bytes) == size


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 5), torch.float32), ((), torch.float64), ((0, 4), torch.bfloat16), ((7,), torch.int8), ((2, 3, 4), torch.bool)],
)
def test_a_tensor_is_what_was_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = backend().memory.allocate_tensor(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.device.type, tensor.is_contiguous()) == (shape, dtype, "cpu", True)
    assert not tensor.requires_grad
    assert torch.equal(tensor.fill_(1).sum().double(), torch.tensor(float(tensor.numel())).double())


def test_two_tensors_never_share_memory() -> None:
    memory = backend().memory
    tensors = [memory.allocate_tensor((1000,)) for _ in range(8)]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [tensor.unique().tolist() for tensor in tensors] == [[float(value)] for value in range(8)]


def test_bytes_are_counted_exactly_and_a_returned_block_is_reused_by_its_class() -> None:
    memory = backend().memory
    first = memory.allocate_tensor((1000,))
    address = first.data_ptr()
    # 4000 bytes lie in the class of 4096.
    assert memory.get_memory_stats().device == PoolStats(4096, 4000, 0, 4096, num_allocations=1)
    memory.return_tensor(first)
    assert memory.get_memory_stats().device == PoolStats(0, 0, 4096, 4096, num_allocations=1, num_returned=1)
    other = memory.allocate_tensor((100,))
    assert other.data_ptr() != address
    again = memory.allocate_tensor((31, 33), torch.int32)
    assert again.data_ptr() == address
    stats = memory.get_memory_stats().device
    assert stats == PoolStats(4096 + 512, 4092 + 400, 0, 4608, num_allocations=3, num_reused=1, num_returned=1)
    assert stats.fragmentation == pytest.approx(1 - 4492 / 4608)
    assert PoolStats().fragmentation == 0


def test_one_stats_class_for_all_backends_says_none_where_it_does_not_know() -> None:
    stats = backend().memory.get_memory_stats()
    assert type(stats) is MemoryStats
    assert stats.total_bytes == backend().facts.memory_bytes
    assert stats.cached_bytes is None
    with pytest.raises(AttributeError):
        stats.num_clears = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_second_return_is_an_error_and_leaves_the_pool_as_it_was() -> None:
    memory = backend().memory
    tensor = memory.allocate_tensor((256,))
    memory.return_tensor(tensor)
    before = memory.get_memory_stats().device
    with pytest.raises(MemoryReturnError, match=r"this \(256,\) float32 tensor on cpu was returned before"):
        memory.return_tensor(tensor)
    assert memory.get_memory_stats().device == before


def test_a_stale_handle_cannot_return_the_block_that_another_has_now() -> None:
    memory = backend().memory
    stale = memory.allocate_tensor((256,))
    memory.return_tensor(stale)
    fresh = memory.allocate_tensor((256,))
    assert fresh.data_ptr() == stale.data_ptr()
    with pytest.raises(MemoryReturnError, match="returned before"):
        memory.return_tensor(stale)
    assert memory.get_memory_stats().device.in_use_bytes == 1024
    memory.return_tensor(fresh)
    assert memory.get_memory_stats().device.in_use_bytes == 0


def test_foreign_tensors_and_views_are_refused() -> None:
    memory, other = backend().memory, backend().memory
    mine = memory.allocate_tensor((8, 8))
    for tensor in (torch.zeros(8, 8), other.allocate_tensor((8, 8)), mine[1:], mine.view(64)):
        with pytest.raises(MemoryReturnError, match="was not handed out by CpuMemory"):
            memory.return_tensor(tensor)
    memory.return_tensor(mine)


def test_a_dropped_tensor_is_counted_and_its_number_is_free_for_another() -> None:
    memory = backend().memory
    for _ in range(20):
        memory.allocate_tensor((1000,))
    gc.collect()
    stats = memory.get_memory_stats().device
    assert (stats.num_dropped, stats.in_use_bytes, stats.requested_bytes, stats.pooled_bytes) == (20, 0, 0, 0)
    kept = memory.allocate_tensor((1000,))
    memory.return_tensor(kept)
    del kept
    stats = memory.get_memory_stats().device
    assert (stats.num_dropped, stats.num_returned, stats.pooled_bytes) == (20, 1, 4096)


def test_exhaustion_names_both_figures_after_one_clearing() -> None:
    memory = backend(CardBackend).memory
    kept = memory.allocate_tensor((48 * KiB,), torch.uint8)
    assert isinstance(memory, Card)
    memory.num_looks = 0
    with pytest.raises(OutOfMemoryError, match="20,480 bytes required, 16,384 available") as caught:
        memory.allocate_tensor((20 * KiB,), torch.uint8)
    assert (caught.value.required_bytes, caught.value.available_bytes) == (20 * KiB, 16 * KiB)
    assert caught.value.exit_code == 3
    assert memory.num_looks == 2
    stats = memory.get_memory_stats()
    assert (stats.num_clears, stats.num_out_of_memory, stats.device.in_use_bytes) == (1, 1, 48 * KiB)
    memory.return_tensor(kept)


def test_clearing_the_pools_makes_room_for_another_class() -> None:
    memory = backend(CardBackend).memory
    for _ in range(2):
        memory.return_tensor(memory.allocate_tensor((48 * KiB,), torch.uint8))
    assert memory.get_memory_stats().device.pooled_bytes == 48 * KiB
    assert memory.allocate_tensor((20 * KiB,), torch.uint8).numel() == 20 * KiB
    stats = memory.get_memory_stats()
    assert (stats.num_clears, stats.num_out_of_memory, stats.device.pooled_bytes) == (1, 0, 0)


def test_the_allocators_own_refusal_is_ours_too() -> None:
    class Blind(CpuMemory):
        def free_bytes(self) -> None:
            return None

    memory = Blind(backend())
    with pytest.raises(OutOfMemoryError, match="no room for a tensor") as caught:
        memory.allocate_tensor((2**52,), torch.uint8)
    assert caught.value.required_bytes == 2**52
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert memory.get_memory_stats().num_clears == 1


def test_optimizing_gives_back_what_the_pools_keep_and_nothing_in_use() -> None:
    memory = backend().memory
    kept = memory.allocate_tensor((1000,)).fill_(7)
    returned = [memory.allocate_tensor((1000,)) for _ in range(3)]
    for tensor in returned:
        memory.return_tensor(tensor)
    assert memory.optimize_memory_usage() == 3 * 4096
    assert memory.optimize_memory_usage() == 0
    assert kept.unique().tolist() == [7.0]
    assert memory.get_memory_stats().device.in_use_bytes == 4096


def test_a_negative_size_is_a_mistake_and_pinning_needs_a_gpu() -> None:
    memory = backend().memory
    with pytest.raises(ValueError, match=r"shape: found \(2, -1\)"):
        memory.allocate_tensor((2, -1))
    with pytest.raises(UnsupportedOperationError, match="this backend is cpu"):
        memory.allocate_tensor((2,), pinned=True)


def test_a_device_that_shares_no_bytes_pools_by_shape_and_type() -> None:
    memory = Shapes(backend())
    first = memory.allocate_tensor((4, 4))
    address = first.data_ptr()
    memory.return_tensor(first)
    assert memory.get_memory_stats().device.pooled_bytes == 64
    assert memory.allocate_tensor((2, 8)).data_ptr() != address
    assert memory.allocate_tensor((4, 4), torch.int32).data_ptr() != address
    second = memory.allocate_tensor((4, 4))
    assert second.data_ptr() == address
    with pytest.raises(MemoryReturnError, match="returned before"):
        memory.return_tensor(first)
    memory.return_tensor(second)


def test_tensors_work_in_and_out_of_inference_mode() -> None:
    memory = backend().memory
    with torch.inference_mode():
        inside = memory.allocate_tensor((16,)).fill_(1)
        memory.return_tensor(inside)
    outside = memory.allocate_tensor((16,))
    assert outside.data_ptr() == inside.data_ptr()
    outside.fill_(2).requires_grad_()
    (outside * 3).sum().backward()
    assert outside.grad is not None
    assert outside.grad.tolist() == [3.0] * 16


def test_threads_never_share_a_block_and_every_byte_comes_back() -> None:
    memory = backend().memory
    num_threads, num_rounds = 8, 150
    wrong: list[int] = []
    barrier = threading.Barrier(num_threads)

    def work(seed: int) -> None:
        barrier.wait()
        for step in range(num_rounds):
            tensors = [memory.allocate_tensor((64 * (1 + (seed + step + part) % 5),), torch.int64) for part in range(3)]
            for part, tensor in enumerate(tensors):
                tensor.fill_(seed * 10 + part)
            for part, tensor in enumerate(tensors):
                if not bool((tensor == seed * 10 + part).all()):
                    wrong.append(seed)
                memory.return_tensor(tensor)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = memory.get_memory_stats().device
    assert wrong == []
    assert (stats.in_use_bytes, stats.requested_bytes) == (0, 0)
    assert stats.num_allocations == stats.num_returned == num_threads * num_rounds * 3
    assert stats.num_reused == stats.num_allocations - sum(len(blocks) for blocks in memory._device_pool.free.values())
    assert stats.peak_in_use_bytes <= num_threads * 3 * 2560


@pytest.mark.parametrize(
    ("kind", "vendor", "leaf"), [(NvidiaBackend, NvidiaError, NvidiaOutOfMemoryError), (AmdBackend, AmdError, AmdOutOfMemoryError)]
)
def test_a_vendors_error_is_the_vendors_and_of_its_kind(kind: type[Backend], vendor: type, leaf: type) -> None:
    error = backend(kind).out_of_memory("no room", required_bytes=2, available_bytes=1)
    assert type(error) is leaf
    assert isinstance(error, vendor)
    assert isinstance(error, OutOfMemoryError)
    assert (error.exit_code, error.verdict, error.required_bytes, error.available_bytes) == (3, "unsupported", 2, 1)
    assert type(backend(kind).failure("illegal address")) is vendor
    assert backend(kind).failure("illegal address").exit_code == 1


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def gpu_memory() -> MemoryManager:
    return backend(NvidiaBackend if torch.version.hip is None else AmdBackend).memory


@gpu
@pytest.mark.gpu
def test_the_device_pool_is_a_streams_own() -> None:
    memory = gpu_memory()
    tensor = memory.allocate_tensor((1000, 1000))
    address = tensor.data_ptr()
    memory.return_tensor(tensor)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert memory.allocate_tensor((1000, 1000)).data_ptr() != address
    assert memory.allocate_tensor((1000, 1000)).data_ptr() == address


@gpu
@pytest.mark.gpu
def test_a_pinned_block_is_not_reused_while_a_copy_reads_it() -> None:
    memory = gpu_memory()
    side = torch.cuda.Stream()
    target = torch.zeros(2**26, device="cuda")
    for value in range(1, 6):
        source = memory.allocate_tensor((2**26,), pinned=True)
        assert source.is_pinned()
        source.fill_(value)
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)
            memory.return_tensor(source)
        # The same block: writing to it before the copy is over would change what arrives.
        again = memory.allocate_tensor((2**26,), pinned=True)
        again.fill_(-1)
        side.synchronize()
        assert target.unique().tolist() == [float(value)]
        memory.return_tensor(again)
    assert memory.get_memory_stats().pinned.num_reused == 9


@gpu
@pytest.mark.gpu
def test_a_tensor_larger_than_the_card_is_refused_with_both_figures() -> None:
    memory = gpu_memory()
    memory.return_tensor(memory.allocate_tensor((2**28,), torch.uint8))
    total = memory.get_memory_stats().total_bytes
    assert total is not None
    with pytest.raises(OutOfMemoryError) as caught:
        memory.allocate_tensor((total + 1,), torch.uint8)
    assert caught.value.required_bytes > total > caught.value.available_bytes > 0
    assert memory.get_memory_stats().device.pooled_bytes == 0


@gpu
@pytest.mark.gpu
def test_optimizing_gives_torchs_cache_back_to_the_card() -> None:
    memory = gpu_memory()
    memory.optimize_memory_usage()
    del_me = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    pooled = memory.allocate_tensor((2**27,), torch.uint8)
    memory.return_tensor(pooled)
    del del_me, pooled
    before = torch.cuda.memory_reserved()
    released = memory.optimize_memory_usage()
    assert released == before - torch.cuda.memory_reserved() >= 2**28 + 2**27
