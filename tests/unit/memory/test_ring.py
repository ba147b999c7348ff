"""The ring's order of copies and computations, on a device that runs them in every order that nobody forbade."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.memory.lanes import Lanes
from kernel_pytorch.memory.ring import Ring

BYTES = 64
# Between the start of a copy and its end the slot holds these: what reads it then is wrong, and visibly.
POISON = 255


class Mark:
    def __init__(self) -> None:
        self.passed = False


class Work:
    """One entry of a lane: runs once the marks are passed. `do` may take several turns (a copy does)."""

    def __init__(self, steps: list[Callable[[], None]], after: Iterable[Mark] = ()) -> None:
        self.steps, self.after = deque(steps), tuple(after)


class LazyLanes(Lanes):
    """copies: the order in which blocks were asked for, by the first byte of the host's memory address."""

    def __init__(self) -> None:
        self.copying: deque[Work] = deque()
        self.computing: dict[Hashable, deque[Work]] = {"main": deque()}
        self.current: Hashable = "main"
        self.copies: list[int] = []
        self.claimed: list[torch.Tensor] = []

    @contextmanager
    def on(self, lane: Hashable) -> Iterator[None]:
        before, self.current = self.current, lane
        self.computing.setdefault(lane, deque())
        try:
            yield
        finally:
            self.current = before

    def lane(self) -> Hashable:
        return self.current

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Iterable[Mark]) -> Mark:
        mark = Mark()
        self.copies.append(source.data_ptr())

        def begin() -> None:
            target.numpy().fill(POISON)

        def end() -> None:
            # Through numpy: the version that the ring looks at is of what the caller's kernels write.
            target.numpy()[:] = source.numpy()

        self.copying.append(Work([begin, end, lambda: setattr(mark, "passed", True)], after))
        return mark

    def wait(self, mark: Mark) -> None:
        self.computing[self.current].append(Work([], [mark]))

    def mark(self) -> Mark:
        mark = Mark()
        self.submit(lambda: setattr(mark, "passed", True))
        return mark

    def finish(self) -> None:
        self.run(0)

    def claim(self, memory: torch.Tensor) -> None:
        self.claimed.append(memory)

    def submit(self, do: Callable[[], None]) -> None:
        """A kernel on the caller's lane."""
        self.computing[self.current].append(Work([do]))

    def run(self, seed: int, prefer: str = "") -> None:
        """Runs everything in an order that the marks allow. prefer: the lane that goes first whenever it may (`copy`, `compute`)."""
        chance = random.Random(seed)
        while True:
            lanes = [("copy", self.copying), *(("compute", lane) for lane in self.computing.values())]
            ready = [(kind, lane) for kind, lane in lanes if lane and all(mark.passed for mark in lane[0].after)]
            if not ready:
                assert not any(lane for _, lane in lanes), "a lane waits for ever"
                return
            liked = [item for item in ready if item[0] == prefer]
            _, lane = chance.choice(liked or ready)
            if lane[0].steps:
                lane[0].steps.popleft()()
            if not lane[0].steps:
                lane.popleft()


def slot_memory(num_bytes: int) -> torch.Tensor:
    return torch.full((num_bytes,), POISON, dtype=torch.uint8)


def make_ring(lanes: Any, num_blocks: int, depth: int) -> tuple[Ring, list[torch.Tensor]]:
    """Block i is BYTES times the value i + 1."""
    ring = Ring(lanes, slot_memory, depth)
    hosts = [torch.full((BYTES,), number + 1, dtype=torch.uint8) for number in range(num_blocks)]
    for host in hosts:
        ring.add(host)
    return ring, hosts


def compute(lanes: Any, ring: Ring, number: int, into: list[list[int]]) -> None:
    """A kernel that reads all of the block, in two turns."""
    slot = ring.enter(number)
    seen: list[int] = []
    into.append(seen)
    half = BYTES // 2
    lanes.submit(lambda: seen.extend(set(slot.memory[:half].tolist())))
    lanes.submit(lambda: seen.extend(set(slot.memory[half:BYTES].tolist())))
    ring.leave(slot)


def run(lanes: Any, calls: Iterable[int], *, num_blocks: int, depth: int, seed: int, prefer: str = "") -> bool:
    """Whether every call saw its own block's bytes and nothing else."""
    ring, _ = make_ring(lanes, num_blocks, depth)
    seen: list[list[int]] = []
    calls = list(calls)
    for number in calls:
        compute(lanes, ring, number, seen)
    lanes.run(seed, prefer)
    return seen == [[number + 1, number + 1] for number in calls]


@settings(deadline=None, max_examples=150)
@given(
    st.integers(2, 7).flatmap(
        lambda blocks: st.tuples(st.just(blocks), st.integers(1, 4), st.lists(st.integers(0, blocks - 1), max_size=30))
    ),
    st.integers(0, 2**31),
    st.sampled_from(["", "copy", "compute"]),
)
def test_every_call_sees_its_own_block_in_any_order_of_calls_and_lanes(case, seed: int, prefer: str) -> None:
    num_blocks, depth, calls = case
    assert run(LazyLanes(), calls, num_blocks=num_blocks, depth=depth, seed=seed, prefer=prefer)


class NoWaitForUsers(LazyLanes):
    """Copies begin before the slot's last computation has ended."""

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Iterable[Any]) -> Any:
        return super().copy(source, target, ())


class NoWaitForCopies(LazyLanes):
    """Blocks compute before their bytes are there."""

    def wait(self, mark: Any) -> None: ...


@pytest.mark.parametrize(("lanes", "prefer"), [(NoWaitForUsers, "copy"), (NoWaitForCopies, "compute")])
def test_without_either_wait_a_call_sees_other_bytes(lanes: type, prefer: str) -> None:
    calls = [0, 1, 2, 3] * 2
    assert not run(lanes(), calls, num_blocks=4, depth=1, seed=0, prefer=prefer)
    assert run(LazyLanes(), calls, num_blocks=4, depth=1, seed=0, prefer=prefer)


@pytest.mark.parametrize(("num_blocks", "depth"), [(5, 1), (6, 2), (3, 1), (7, 3)])
def test_a_decode_loop_is_always_on_time_and_copies_each_block_once_a_pass(lanes: Any, num_blocks: int, depth: int) -> None:
    ring, hosts = make_ring(lanes, num_blocks, depth)
    for number in [*range(num_blocks)] * 4:
        slot = ring.enter(number)
        assert slot.memory[0] == number + 1
        ring.leave(slot)
    assert ring.counts == {"on_time": 4 * num_blocks, "late": 0, "stale": 0, "copied_bytes": (4 * num_blocks + depth) * BYTES}
    # In the order of the blocks, and over the end to the first one: the next call finds it on its way.
    order = [hosts[number].data_ptr() for number in range(num_blocks)]
    assert lanes.copies == (order * 5)[: 4 * num_blocks + depth]
    assert len(ring.slots) == depth + 1


def test_another_order_is_late_once_and_then_expected(lanes: Any) -> None:
    ring, _ = make_ring(lanes, 6, 1)
    order = [0, 3, 1, 4]
    late = []
    for _ in range(4):
        before = ring.counts["late"]
        for number in order:
            slot = ring.enter(number)
            assert slot.memory[0] == number + 1
            ring.leave(slot)
        late.append(ring.counts["late"] - before)
    # The way from the last back to the first shows in the second pass only.
    assert late == [3, 1, 0, 0]


def test_a_block_that_is_called_again_is_not_copied_again(lanes: Any) -> None:
    ring, _ = make_ring(lanes, 4, 1)
    for _ in range(3):
        ring.leave(ring.enter(0))
    assert ring.counts["copied_bytes"] == 2 * BYTES


def test_what_is_written_to_the_host_counts_in_the_next_call(lanes: Any) -> None:
    ring, hosts = make_ring(lanes, 4, 2)
    ring.prepare()
    hosts[1].fill_(77)
    for number, value in ((0, 1), (1, 77), (2, 3)):
        slot = ring.enter(number)
        assert slot.memory[:BYTES].unique().tolist() == [value]
        ring.leave(slot)
    assert ring.counts["stale"] == 1


@pytest.mark.parametrize(("finished", "expected"), [(False, 77), (True, 2)])
def test_calls_that_the_device_has_not_come_to_keep_the_hosts_bytes_once_they_are_finished(finished: bool, expected: int) -> None:
    lanes = LazyLanes()
    ring, hosts = make_ring(lanes, 4, 1)
    seen: list[list[int]] = []
    for number in (0, 1):
        compute(lanes, ring, number, seen)
    if finished:
        ring.finish()
    hosts[1].fill_(77)
    compute(lanes, ring, 1, seen)
    lanes.run(0)
    assert seen[1:] == [[expected] * 2, [77] * 2]


@pytest.mark.parametrize("seed", range(20))
def test_two_streams_that_use_one_slot_are_both_waited_for(seed: int) -> None:
    lanes = LazyLanes()
    ring, _ = make_ring(lanes, 4, 1)
    seen: list[list[int]] = []
    for number in (0, 1, 2, 3, 0):
        for lane in ("main", "other"):
            with lanes.on(lane):
                compute(lanes, ring, number, seen)
    lanes.run(seed, "copy")
    assert seen == [[number + 1] * 2 for number in (0, 0, 1, 1, 2, 2, 3, 3, 0, 0)]


def test_threads_take_turns_and_each_sees_its_own_block(lanes: Any) -> None:
    ring, _ = make_ring(lanes, 5, 1)
    wrong: list[int] = []

    def loop(start: int) -> None:
        for step in range(200):
            number = (start + step) % 5
            slot = ring.enter(number)
            if slot.memory[:BYTES].unique().tolist() != [number + 1]:
                wrong.append(number)
            ring.leave(slot)

    threads = [threading.Thread(target=loop, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert ring.counts["on_time"] + ring.counts["late"] == 600


def test_a_failed_copy_leaves_the_ring_usable(lanes: Any) -> None:
    class Failing(type(lanes)):
        fails = False

        def copy(self, source: torch.Tensor, target: torch.Tensor, after: Iterable[Any]) -> None:
            if self.fails:
                raise RuntimeError("the device is gone")
            super().copy(source, target, after)

    failing = Failing()
    ring, _ = make_ring(failing, 4, 1)
    ring.leave(ring.enter(0))
    failing.fails = True
    with pytest.raises(RuntimeError, match="the device is gone"):
        ring.enter(3)
    failing.fails = False
    for number in (3, 0, 1):
        slot = ring.enter(number)
        assert slot.memory[0] == number + 1
        ring.leave(slot)


def test_blocks_that_call_one_another_deeper_than_there_are_slots(lanes: Any) -> None:
    ring, _ = make_ring(lanes, 4, 1)
    first, second = ring.enter(0), ring.enter(1)
    with pytest.raises(UnsupportedOperationError, match="2 are at work at once"):
        ring.enter(2)
    ring.leave(second)
    ring.leave(first)
    ring.leave(ring.enter(2))


def test_a_copy_of_the_ring_has_slots_of_its_own(lanes: Any) -> None:
    ring, _ = make_ring(lanes, 3, 1)
    ring.prepare()
    other = ring.__deepcopy__({})
    assert other.slots == []
    other.add(torch.zeros(8, dtype=torch.uint8))
    other.add(torch.ones(8, dtype=torch.uint8))
    slot = other.enter(1)
    assert slot.memory.unique().tolist() == [1]
    other.leave(slot)
    assert not {memory.data_ptr() for memory in ring.slots} & {memory.data_ptr() for memory in other.slots}
