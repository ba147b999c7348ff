"""What CudaRecorder asks of torch, with a torch.cuda that only writes down what it is asked: streams, pools, order, failures."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from kernel_pytorch.graph import recorder as module
from kernel_pytorch.graph.recorder import CudaRecorder

DEVICE = torch.device("cuda", 0)
NUM_STREAMS = 32


class Stream:
    """One of those that torch gives out in turns, or the default one: number -1."""

    def __init__(self, number: int, log: list[Any]) -> None:
        self.number, self._log = number, log

    @property
    def stream_id(self) -> int:
        return self.number

    def wait_stream(self, other: Stream) -> None:
        self._log.append(("wait", self.number, other.number))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        return hash(self.number)


class Buffer:
    """Stands for a tensor."""

    def __init__(self) -> None:
        self.used_on: list[int] = []

    def record_stream(self, stream: Stream) -> None:
        self.used_on.append(stream.number)


class Cuda:
    """The part of torch.cuda that CudaRecorder calls."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.numbers = itertools.cycle(range(NUM_STREAMS))
        self.current = self.default = Stream(-1, self.log)
        self.fails = False

    def new_stream(self, _: Any = None) -> Stream:
        return Stream(next(self.numbers), self.log)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph(self) -> Any:
        cuda = self

        class Graph:
            def capture_begin(self, pool: Any = None, capture_error_mode: str = "") -> None:
                assert capture_error_mode == "thread_local"
                cuda.log.append(("begin", pool, cuda.current.number))

            def capture_end(self) -> None:
                fails, cuda.fails = cuda.fails, False
                if fails:
                    raise RuntimeError("the capture was lost")

            def replay(self) -> None: ...

        return Graph()

    def named(self, name: str) -> list[Any]:
        return [entry for entry in self.log if entry[0] == name]


@pytest.fixture(params=["as numbers", "as objects"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """Versions of torch that name the current stream by numbers, and those that would not."""
    fake, pools = Cuda(), itertools.count(1)
    monkeypatch.setattr(module, "_POOLS", {})
    module._warm_up_stream.cache_clear()
    stands_for = {
        "Stream": fake.new_stream,
        "stream": fake.on,
        "current_stream": lambda _=None: fake.current,
        "CUDAGraph": fake.graph,
        "graph_pool_handle": lambda: (0, next(pools)),
        "synchronize": lambda _=None: None,
        "memory_allocated": lambda _=None: 0,
        "max_memory_allocated": lambda _=None: 0,
        "reset_peak_memory_stats": lambda _=None: None,
    }
    for name, value in stands_for.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: fake.log.append(("cleared",)), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: fake.log.append(("ended", *args)), raising=False)
    if request.param == "as numbers":
        monkeypatch.setattr(torch._C, "_cuda_getCurrentStream", lambda index: (fake.current.number, index, 1), raising=False)
    else:
        monkeypatch.delattr(torch._C, "_cuda_getCurrentStream", raising=False)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **_: zeros(*args))
    yield fake
    module._warm_up_stream.cache_clear()


def nothing() -> None: ...


def test_pools_that_follow_each_other_have_streams_of_their_own(cuda: Cuda) -> None:
    """What cuBLAS keeps for a stream lies in the pool of the first graphs there, and ends with that pool."""
    recorder = CudaRecorder(DEVICE)
    recorder.warm_up(nothing, 1)
    for _ in range(8):
        # The recording is dropped, and the pool with it.
        recorder.record(nothing)
    streams = [stream for _, _, stream in cuda.named("begin")]
    assert len({pool for _, pool, _ in cuda.named("begin")}) == 8
    assert len(set(streams)) == 8
    # The first that was given out.
    assert 0 not in streams
    assert not cuda.named("cleared")


def test_the_stream_that_records_is_not_the_next_that_torch_gives_out(cuda: Cuda) -> None:
    recorder = CudaRecorder(DEVICE)
    kept = [recorder.record(nothing), recorder.record(nothing)]
    (_, pool, stream), (_, same_pool, same_stream) = cuda.named("begin")
    assert (pool, stream) == (same_pool, same_stream)
    assert stream not in [cuda.new_stream().number for _ in range(NUM_STREAMS - 2)]
    assert len(kept) == 2


def test_nothing_is_recorded_on_the_stream_of_the_caller(cuda: Cuda) -> None:
    recorder = CudaRecorder(DEVICE)
    recorder.warm_up(nothing, 1)
    with cuda.on(Stream(1, cuda.log)):
        recorder.record(nothing)
    assert cuda.named("begin")[0][2] not in (0, 1)


def test_where_no_stream_is_left_the_workspace_is_given_back_before_another_pool_uses_it(cuda: Cuda) -> None:
    recorders = [CudaRecorder(DEVICE) for _ in range(NUM_STREAMS + 4)]
    kept = [recorder.record(nothing) for recorder in recorders]
    # One stream is for warming up.
    assert len(cuda.named("cleared")) == len(recorders) - (NUM_STREAMS - 1)
    by_stream: dict[int, list[int]] = {}
    for index, (_, _, stream) in enumerate(cuda.named("begin")):
        by_stream.setdefault(stream, []).append(index)
    first, second = next(users for users in by_stream.values() if len(users) > 1)
    num_cleared = len(cuda.named("cleared"))
    for index, more in ((second, 0), (first, 1), (first, 1), (second, 2)):
        kept.append(recorders[index].record(nothing))
        assert len(cuda.named("cleared")) == num_cleared + more


def test_the_caller_waits_for_a_warm_up_that_raised(cuda: Cuda) -> None:
    """What the call wrote is put back next: not before it was written."""

    def raises() -> None:
        raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        CudaRecorder(DEVICE).warm_up(raises, 3)
    assert cuda.log[-1] == ("wait", -1, 0)
    assert cuda.current is cuda.default


def test_the_allocator_is_told_of_the_end_of_a_capture_that_failed(cuda: Cuda) -> None:
    recorder = CudaRecorder(DEVICE)
    kept = recorder.record(nothing)
    cuda.fails = True
    with pytest.raises(RuntimeError, match="the capture was lost"):
        # Ends twice: as it was meant to, and to be sure that it did.
        recorder.record(nothing)
    pool = cuda.named("begin")[0][1]
    assert cuda.named("ended") == [("ended", 0, pool)]
    recorder.record(kept.replay)
    assert cuda.named("begin")[-1][1] != pool


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_while_a_call_is_recorded(cuda: Cuda, fails: bool) -> None:
    """A graph of a model that nobody has any more would be destroyed inside the capture."""
    seen: list[bool] = []

    def call() -> None:
        seen.append(gc.isenabled())
        if fails:
            raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model") if fails else nullcontext():
        CudaRecorder(DEVICE).record(call)
    assert (seen, gc.isenabled()) == ([False], True)


def test_buffers_are_used_on_every_stream_that_replays(cuda: Cuda) -> None:
    """Memory that is let go of while a replay reads it on another stream is nobody's before that is done."""
    recorder = CudaRecorder(DEVICE)
    early, dropped, late = Buffer(), Buffer(), Buffer()
    recorder.hold([early, dropped])  # pyright: ignore[reportArgumentType]
    del dropped
    for number in (-1, 5, 5, 6, 5):
        with cuda.on(Stream(number, cuda.log)):
            recorder.enter_replay()
    recorder.hold([late])  # pyright: ignore[reportArgumentType]
    assert early.used_on == [-1, 5, 6]
    assert sorted(late.used_on) == [-1, 5, 6]
    assert cuda.named("wait") == [("wait", 5, -1), ("wait", 6, 5), ("wait", 5, 6)]


def test_times_are_of_the_recorders_device(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Stream | None = None) -> None:
            cuda.log.append(("event", None if stream is None else stream.number))

        def elapsed_time(self, _: Event) -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert CudaRecorder(DEVICE).milliseconds(nothing, 2) == 1.5
    assert cuda.named("event") == [("event", -1)] * 2


def test_other_devices_of_the_type_are_foreign() -> None:
    recorder = CudaRecorder(DEVICE)
    assert recorder.is_foreign(torch.device("cuda", 1))
    assert not recorder.is_foreign(DEVICE)
    assert not recorder.is_foreign(torch.device("cpu"))


def test_the_number_of_the_last_stream_is_on_the_host_wherever_tensors_are_made(cuda: Cuda) -> None:
    with torch.device("meta"):
        recorder = CudaRecorder(DEVICE)
    recorder.enter_replay()
    assert recorder.last_stream is not None
    assert recorder.last_stream.is_cpu
    assert recorder.last_stream.tolist() == [cuda.current.number]
