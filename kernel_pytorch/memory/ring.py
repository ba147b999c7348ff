"""A few slots of device memory through which the blocks of a model pass: which block is where, and what comes next.

Blocks live in pinned host memory, one flat buffer each. While a block computes in its slot, the next ones are copied into the
others. A slot is filled again only after every lane that computed in it has passed; a lane computes in a slot only after the
copy into it has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.memory.lanes import Lanes, Mark


@dataclass
class Slot:
    """memory: bytes for the largest block. block: whose bytes are there, or on their way; None when nobody's. version: of the
    host's bytes when they were copied. ready: behind that copy. users: behind the last work in it, by lane."""

    number: int
    memory: torch.Tensor
    block: int | None = None
    version: int = -1
    ready: Mark = None
    users: dict[Hashable, Mark] = field(default_factory=dict)
    num_holders: int = 0
    last_turn: int = 0


class Ring:
    """`add` blocks, then `enter` and `leave` them in any order, from any thread: one holds the ring at a time.

    prefetch_depth: blocks that are copied while one computes; with it the device has prefetch_depth + 1 slots.
    allocate: makes a slot of so many bytes. What follows a block is what followed it last time, at first the next one, the
    first after the last. `counts` is live: on_time (the block was there or on its way), late (its copy began when it was called),
    stale (the host's values had changed since the copy), copied_bytes.
    """

    def __init__(self, lanes: Lanes, allocate: Callable[[int], torch.Tensor], prefetch_depth: int) -> None:
        self.counts = {"on_time": 0, "late": 0, "stale": 0, "copied_bytes": 0}
        self._lanes, self._allocate, self._depth = lanes, allocate, prefetch_depth
        self._lock = threading.RLock()
        self._hosts: list[torch.Tensor] = []
        self._follower: dict[int, int] = {}
        self._slots: list[Slot] = []
        self._last: int | None = None
        self._turn = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Ring:
        """One of the same kind, empty: the copied blocks add themselves."""
        return Ring(self._lanes, self._allocate, self._depth)

    def add(self, host: torch.Tensor) -> int:
        """The number of a block with these flat uint8 bytes, pinned. Blocks are added before the first one is entered."""
        assert not self._slots, "slots are as large as the largest block: no block comes later"
        self._hosts.append(host)
        return len(self._hosts) - 1

    @property
    def slots(self) -> list[torch.Tensor]:
        """Device memory of the slots; none before `prepare`."""
        return [slot.memory for slot in self._slots]

    def prepare(self) -> None:
        """Takes the slots' memory, and starts to copy the first blocks."""
        with self._lock:
            if self._slots:
                return
            num_blocks = len(self._hosts)
            self._follower = {number: (number + 1) % num_blocks for number in range(num_blocks)}
            num_bytes = max(host.numel() for host in self._hosts)
            # Slots outlive the call that makes them, which may be one of inference mode.
            with torch.inference_mode(False):
                slots = [Slot(number, self._allocate(num_bytes)) for number in range(min(self._depth + 1, num_blocks))]
            for slot in slots:
                self._lanes.claim(slot.memory)
                # The memory may have been someone's whose work on this lane has not ended.
                slot.users[self._lanes.lane()] = self._lanes.mark()
            self._slots = slots
            for number, slot in enumerate(slots[: self._depth]):
                self._fill(slot, number)

    def enter(self, number: int) -> Slot:
        """The slot in which the caller's lane may compute with the block's bytes until `leave`. Starts the next copies."""
        self._lock.acquire()
        entered = False
        try:
            self.prepare()
            slot = self._find(number)
            self._lanes.wait(slot.ready)
            if self._last is not None:
                self._follower[self._last] = number
            self._last = number
            self._turn += 1
            slot.last_turn = self._turn
            self._prefetch(number)
            slot.num_holders += 1
            entered = True
            return slot
        finally:
            if not entered:
                self._lock.release()

    def leave(self, slot: Slot) -> None:
        """Ends what `enter` began, after all work with the block has been queued, or has failed."""
        try:
            slot.num_holders -= 1
            slot.users[self._lanes.lane()] = self._lanes.mark()
        finally:
            self._lock.release()

    def forget(self, slot: Slot) -> None:
        """The slot's bytes are not the block's any more: it is copied again when it is called."""
        slot.version = -1

    def finish(self) -> None:
        """Waits until no copy reads the host's bytes any more: what is written there from now on counts in later calls only."""
        with self._lock:
            self._lanes.finish()

    def _find(self, number: int) -> Slot:
        slot = self._holding(number)
        if slot is None:
            self.counts["late"] += 1
            slot = self._free_slot((number, *self._upcoming(number))) or self._free_slot(())
            if slot is None:
                raise UnsupportedOperationError(
                    f"offloaded blocks call one another: {len(self._slots)} are at work at once, as many as there are slots;"
                    " memory.include must name blocks that follow one another"
                )
            self._fill(slot, number)
        elif slot.version != self._hosts[number]._version and not slot.num_holders:
            self.counts["stale"] += 1
            self._fill(slot, number)
        else:
            self.counts["on_time"] += 1
        return slot

    def _prefetch(self, number: int) -> None:
        coming = self._upcoming(number)
        for upcoming in coming:
            if self._holding(upcoming) is None:
                slot = self._free_slot((number, *coming))
                if slot is not None:
                    self._fill(slot, upcoming)

    def _upcoming(self, number: int) -> list[int]:
        """The blocks that are expected after this one, as many as there are other slots."""
        found: list[int] = []
        following = self._follower[number]
        while len(found) < len(self._slots) - 1 and following not in (number, *found):
            found.append(following)
            following = self._follower[following]
        return found

    def _holding(self, number: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.block == number), None)

    def _free_slot(self, keep: Collection[int]) -> Slot | None:
        """The slot that was not at work for longest, of those that nobody is in and whose block is not to be kept."""
        free = [slot for slot in self._slots if not slot.num_holders and slot.block not in keep]
        return min(free, key=lambda slot: slot.last_turn, default=None)

    def _fill(self, slot: Slot, number: int) -> None:
        host = self._hosts[number]
        slot.block = None
        version = host._version
        slot.ready = self._lanes.copy(host, slot.memory[: host.numel()], tuple(slot.users.values()))
        slot.users.clear()
        slot.block, slot.version = number, version
        self.counts["copied_bytes"] += host.numel()
