"""How a call is recorded, replayed and timed: the part of capture that needs the device."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernel_pytorch.graph.outputs import LetGo, held, in_pool
from kernel_pytorch.graph.timing import Comparison, compare


@dataclass(frozen=True)
class Recording:
    """output: what the recorded call returned, in memory that `replay` writes again. pool_bytes: the most that the recorded call
    had allocated at once. held_bytes: what of it is still allocated, its outputs; the rest is free for the next recording in the
    same pool. let_go: of outputs that are read between a replay and the next one only, what is to be held in their place."""

    output: Any
    replay: Callable[[], None]
    pool_bytes: int = 0
    held_bytes: int = 0
    let_go: Callable[[Sequence[torch.Tensor]], LetGo] = held


class Recorder(ABC):
    """What GraphedCall needs of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # int64 [1]: the number of the stream that the last replay was in the order of; None where there are no streams.
        self.last_stream: torch.Tensor | None = None

    @abstractmethod
    def busy(self) -> bool:
        """Whether the current stream is already being captured by someone else."""

    @abstractmethod
    def warm_up(self, call: Callable[[], Any], num_calls: int) -> None:
        """Runs the call as it will be recorded, so that libraries allocate their workspaces."""

    @abstractmethod
    def record(self, call: Callable[[], Any]) -> Recording:
        """Raises RuntimeError when the call does something that cannot be recorded."""

    @abstractmethod
    def compare(self, plain: Callable[[], Any], replay: Callable[[], Any], undo: Callable[[], None], margin: float = 1.0) -> Comparison:
        """Times both, taking turns, until it is sure whether `replay` is `margin` times as fast; `undo` puts back what they wrote."""

    def milliseconds(self, call: Callable[[], Any], num_calls: int = 1) -> float:
        """A call's time, of num_calls made in a row from an idle device on."""
        start = time.perf_counter()
        for _ in range(num_calls):
            call()
        return (time.perf_counter() - start) * 1e3 / num_calls

    def is_elsewhere(self, tensor: torch.Tensor) -> bool:
        """Whether a graph of this device cannot hold on to the tensor's memory."""
        return tensor.device.type != self.device.type

    def is_foreign(self, device: torch.device) -> bool:
        """Whether it is another device of the same type: work on it is done while a call is recorded, and not in its replays."""
        return device.type == self.device.type and device.index not in (None, self.device.index)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device."""
        return tensor.to(self.device, copy=True)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Host memory, uint8, that the device copies from without the host waiting."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def marks(self, number: int) -> list[torch.Event]:
        """Events that tell when the device is done with what it was given before each; none where nothing runs ahead."""
        return []

    def put(self, mark: torch.Event) -> None:
        """After what the current stream was given until now."""
        mark.record()

    def free_bytes(self) -> int | None:
        """Device memory that may still be taken; None when unknown."""
        return None

    @abstractmethod
    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Says that replays use these tensors, on whichever stream: their memory is not another's before those are done."""

    @abstractmethod
    def rng_state(self) -> torch.Tensor: ...

    @abstractmethod
    def set_rng_state(self, state: torch.Tensor) -> None: ...

    @abstractmethod
    def enter_replay(self) -> None:
        """Makes the current stream wait for the previous replay, whose memory the next one writes again."""

    @abstractmethod
    def leave_replay(self) -> None:
        """Marks the end of a replay and of the copies out of its memory."""


# torch's pool of streams of one priority (c10/cuda/CUDAStream.h).
_STREAMS_OF_TORCH = 32
# Streams that graphs were recorded on, each with the pool that cuBLAS's workspace of that stream lies in.
_POOLS: dict[torch.cuda.Stream, Any] = {}
_POOLS_LOCK = threading.Lock()


@functools.cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """A model and its graphs are a cycle. Collected during a capture, the graphs would be destroyed then, which is a call that the
    capture does not survive, but for versions of torch that exempt it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class CudaRecorder(Recorder):
    """CUDA graphs on one device. All graphs share one memory pool: outputs are copied out before the next replay."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device if device.index is not None else torch.device("cuda", torch.cuda.current_device()))
        self._stream: torch.cuda.Stream | None = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool: Any = None
        self._last: torch.cuda.Stream | None = None
        # A tuple, made in a tenth of the time of a Stream.
        get_current = getattr(torch._C, "_cuda_getCurrentStream", None)
        self._get_current: Callable[[], Any] = functools.partial(
            *((torch.cuda.current_stream, self.device) if get_current is None else (get_current, self.device.index))
        )
        self._current: Any = None
        self._streams: set[torch.cuda.Stream] = set()
        self._held: list[weakref.ref[torch.Tensor]] = []
        # Made outside of inference mode, so that it can be written outside.
        with torch.inference_mode(False):
            self.last_stream = torch.full((1,), -1, dtype=torch.int64, device="cpu")

    # What torch.cuda's own calls, without a frame of Python: it is asked in every call.
    busy = staticmethod(getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing))  # pyright: ignore[reportAssignmentType]

    def warm_up(self, call: Callable[[], Any], num_calls: int) -> None:
        # Not on the stream that records: torch keeps cuBLAS a workspace for each stream. One that is made while recording lies in
        # the graphs' pool; one from a warm-up there would lie outside, where torch's own graphs give all workspaces back.
        stream = _warm_up_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(stream):
                for _ in range(num_calls):
                    call()
        finally:
            # Whatever was raised: what a call wrote is put back after it was written.
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def record(self, call: Callable[[], Any]) -> Recording:
        torch.cuda.synchronize(self.device)
        # Casts that autocast remembers would be read by later calls, but capture does not compute them.
        torch.clear_autocast_cache()
        # A pool ends with its last graph; its handle cannot be used again, nor the stream whose workspace lies in it.
        if self._pool is None or not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = self._new_stream()
        assert self._stream is not None
        with _POOLS_LOCK:
            if _POOLS.setdefault(self._stream, self._pool) != self._pool:
                # No stream was left that nothing was recorded on. What this one has ends with a pool that other graphs are in.
                torch._C._cuda_clearCublasWorkspaces()  # pyright: ignore[reportAttributeAccessIssue]
                _POOLS[self._stream] = self._pool
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph() leaves its stream current when a capture fails; this does not.
        with torch.cuda.stream(self._stream), _without_collecting():
            recorded = False
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                output = call()
                graph.capture_end()
                recorded = True
            finally:
                # Whatever was raised: a stream that goes on recording would swallow everyone's work.
                if not recorded:
                    self._abandon(graph)
                torch.clear_autocast_cache()
        self._graphs.add(graph)
        most, still = torch.cuda.max_memory_allocated(self.device), torch.cuda.memory_allocated(self.device)
        return Recording(output, graph.replay, most - before, max(0, still - before), functools.partial(in_pool, self._pool))

    def _new_stream(self) -> torch.cuda.Stream:
        """One that nothing was recorded on, while there is one. torch gives out the same few in turns, so those that are taken are
        passed over, and no more are drawn than that: the next one that anyone draws is to be another."""
        avoided = (_warm_up_stream(self.device), torch.cuda.current_stream(self.device))
        stream = torch.cuda.Stream(self.device)
        for _ in range(_STREAMS_OF_TORCH):
            if stream not in avoided and stream not in _POOLS:
                return stream
            stream = torch.cuda.Stream(self.device)
        while stream in avoided:
            stream = torch.cuda.Stream(self.device)
        return stream

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture that failed: the end fails too, for the reason that is being raised, and leaves the random
        generator believing that it is being captured. A small capture that succeeds sets it free."""
        pool, self._pool = self._pool, None
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        # Before torch 2.12 the allocator is not told then. It would go on asking the dead graph which allocations are its own, and
        # send those of later graphs to its pool.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
        del graph
        healing = torch.cuda.CUDAGraph()
        healing.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=self.device)
        healing.capture_end()

    def compare(self, plain: Callable[[], Any], replay: Callable[[], Any], undo: Callable[[], None], margin: float = 1.0) -> Comparison:
        return compare(self.milliseconds, plain, replay, undo, margin)

    def milliseconds(self, call: Callable[[], Any], num_calls: int = 1) -> float:
        """Device time from an idle device on, so that the time of launching counts."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        # Of this device, whichever is current.
        stream = torch.cuda.current_stream(self.device)
        start.record(stream)
        for _ in range(num_calls):
            call()
        end.record(stream)
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / num_calls

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def marks(self, number: int) -> list[torch.Event]:
        return [torch.Event(self.device) for _ in range(number)]

    def put(self, mark: torch.Event) -> None:
        mark.record(torch.cuda.current_stream(self.device))

    def free_bytes(self) -> int | None:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def rng_state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self.device)

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)

    def enter_replay(self) -> None:
        now = self._get_current()
        if now == self._current:
            return
        # Nothing is recorded after each replay: the stream of the last one is waited for only when the next one is elsewhere.
        current = torch.cuda.current_stream(self.device)
        if self._last is not None:
            current.wait_stream(self._last)
        self._last, self._current = current, now
        assert self.last_stream is not None
        self.last_stream.fill_(current.stream_id)
        if current not in self._streams:
            self._streams.add(current)
            self._say_used([tensor for held in self._held if (tensor := held()) is not None], [current])

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        new = list(tensors)
        self._held = [*(held for held in self._held if held() is not None), *map(weakref.ref, new)]
        self._say_used(new, self._streams)

    def _say_used(self, tensors: Iterable[torch.Tensor], streams: Iterable[torch.cuda.Stream]) -> None:
        # It counts as a write, which tensors of inference mode allow nowhere else.
        with torch.inference_mode():
            for tensor in tensors:
                for stream in streams:
                    tensor.record_stream(stream)

    def leave_replay(self) -> None:
        """The stream is remembered when a replay is entered."""
