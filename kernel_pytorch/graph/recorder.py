"""How a call is recorded, replayed and timed: the part of capture that needs the device."""

from __future__ import annotations

import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

_NUM_SAMPLES, _NUM_SAMPLES_SLOW = 20, 5
_SLOW_MS = 250.0


@dataclass(frozen=True)
class Recording:
    """output: what the recorded call returned, in memory that `replay` writes again. pool_bytes: the most that the recorded call
    had allocated at once, which its graph keeps."""

    output: Any
    replay: Callable[[], None]
    pool_bytes: int = 0


@dataclass(frozen=True)
class Comparison:
    """Medians over num_samples interleaved calls."""

    plain_ms: float
    replay_ms: float
    num_samples: int


class Recorder(ABC):
    """What GraphedCall needs of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

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
    def compare(self, plain: Callable[[], Any], replay: Callable[[], Any], undo: Callable[[], None]) -> Comparison:
        """Times both, taking turns; `undo` runs between the calls and is not timed."""

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


class CudaRecorder(Recorder):
    """CUDA graphs on one device. All graphs share one memory pool: outputs are copied out before the next replay."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool: Any = None
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    def busy(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def warm_up(self, call: Callable[[], Any], num_calls: int) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(num_calls):
                call()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def record(self, call: Callable[[], Any]) -> Recording:
        torch.cuda.synchronize(self.device)
        # Casts that autocast remembers would be read by later calls, but capture does not compute them.
        torch.clear_autocast_cache()
        # A pool ends with its last graph; its handle cannot be used again.
        if self._pool is None or not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph() leaves its stream current when a capture fails; this does not.
        with torch.cuda.stream(self._stream):
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                output = call()
                graph.capture_end()
            except RuntimeError:
                self._abandon(graph)
                raise
            finally:
                torch.clear_autocast_cache()
        self._graphs.add(graph)
        return Recording(output, graph.replay, torch.cuda.max_memory_allocated(self.device) - before)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture that failed: the end fails too, for the reason that is being raised, and leaves the random
        generator believing that it is being captured. A small capture that succeeds sets it free."""
        self._pool = None
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        del graph
        healing = torch.cuda.CUDAGraph()
        healing.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=self.device)
        healing.capture_end()

    def compare(self, plain: Callable[[], Any], replay: Callable[[], Any], undo: Callable[[], None]) -> Comparison:
        for call in (plain, replay):
            call()
            undo()
        first = self._milliseconds(plain)
        undo()
        num_samples = _NUM_SAMPLES if first < _SLOW_MS else _NUM_SAMPLES_SLOW
        samples: tuple[list[float], list[float]] = ([], [])
        for _ in range(num_samples):
            for call, into in zip((plain, replay), samples, strict=True):
                into.append(self._milliseconds(call))
                undo()
        return Comparison(median(samples[0]), median(samples[1]), num_samples)

    def _milliseconds(self, call: Callable[[], Any]) -> float:
        """Device time from an idle device on, so that the time of launching counts."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end)

    def rng_state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self.device)

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)

    def enter_replay(self) -> None:
        current = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last[0] != current:
            current.wait_event(self._last[1])

    def leave_replay(self) -> None:
        current = torch.cuda.current_stream(self.device)
        event = self._last[1] if self._last is not None else torch.cuda.Event()
        event.record(current)
        self._last = (current, event)
