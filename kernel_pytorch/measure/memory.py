"""Peak memory of one call, in a pass of its own.

The figure is the bytes of the arm's own parameters and buffers on the device plus the most that the call had allocated at once, its
output included. What else is resident (other arms' models, the inputs, a KV cache that the workload holds) is left out,
so arms can be compared. On CUDA it comes from the caching allocator: bytes of tensors, not of reserved segments, and a
replayed CUDA graph allocates nothing, so its pool must be added by the caller. On a CPU it comes from the events that
torch's allocator records: exact for tensors, Inductor's buffers included; scratch memory that a library (oneDNN, a
generated C++ kernel) takes for itself is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from kernel_pytorch.optimizer import tensor_bytes

_LOG_LEVEL = "KINETO_LOG_LEVEL"


def peak_memory_bytes(
    model: nn.Module,
    call: Callable[[], Any],
    *,
    context: Callable[[], AbstractContextManager[Any]] | None = None,
    synchronize: Callable[[], None],
    cuda: bool,
) -> int:
    """Bytes of `model`'s tensors plus the peak of what one `call` allocates. The call must be warm: compiled, tuned."""
    measure = _cuda_peak if cuda else _cpu_peak
    with context() if context is not None else nullcontext():
        return tensor_bytes(model, "cuda" if cuda else None) + measure(call, synchronize)


def _cuda_peak(call: Callable[[], Any], synchronize: Callable[[], None]) -> int:
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = call()
    synchronize()
    peak = torch.cuda.max_memory_allocated()
    del output
    return peak - before


def _cpu_peak(call: Callable[[], Any], synchronize: Callable[[], None]) -> int:
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as events:
        output = call()
        synchronize()
    del output
    return max_running_sum(_allocations(events))


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler's library prints its start and stop on stderr unless its log level is above every message's."""
    if _LOG_LEVEL in os.environ:
        yield
        return
    os.environ[_LOG_LEVEL] = "6"
    try:
        yield
    finally:
        del os.environ[_LOG_LEVEL]


def _allocations(profiled: profile) -> list[int]:
    """Bytes allocated (positive) and freed (negative) on the CPU, in order of time."""
    profiler: Any = profiled.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    on_cpu = [event for event in events if event.device_type().name == "CPU"]
    return [event.nbytes() for event in sorted(on_cpu, key=lambda event: event.start_ns())]


def max_running_sum(deltas: list[int]) -> int:
    """Largest prefix sum, 0 for none: the peak above where the call started."""
    peak = running = 0
    for delta in deltas:
        running += delta
        peak = max(peak, running)
    return peak
