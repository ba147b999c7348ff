"""A block whose weights are on the device only while it works. It keeps its class, its attributes and its names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.memory.pack import Pack, is_movable
from kernel_pytorch.memory.ring import Ring, Slot

Allocate = Callable[[int], torch.Tensor]


class _Seat:
    """What a streamed block has beside its class: its pack, and its number in the ring."""

    def __init__(self, block: nn.Module, names: Sequence[str], ring: Ring, pin: Allocate) -> None:
        self.pin, self.ring = pin, ring
        self.pack = Pack(block, names, pin)
        self.number = ring.add(self.pack.host)
        self.compute: Callable[..., Any] = type(block).forward


# Recursive: no part of the streaming is traced.
@torch.compiler.disable()
def _enter(seat: _Seat) -> tuple[Slot, int]:
    """Puts the block's weights in place; returns the slot and the version of its memory."""
    if seat.pack.trainable and torch.is_grad_enabled():
        raise UnsupportedOperationError(
            "an offloaded block was called with gradients enabled: its weights are overwritten before a backward pass could read them;"
            " call it under torch.no_grad() or torch.inference_mode()"
        )
    slot = seat.ring.enter(seat.number)
    placed = False
    try:
        # A block that calls itself has its weights.
        if slot.num_holders == 1:
            seat.pack.place(slot.number, slot.memory)
        placed = True
    finally:
        if not placed:
            seat.ring.leave(slot)
    return slot, slot.memory._version


@torch.compiler.disable()
def _leave(seat: _Seat, slot: Slot, version: int, *, failed: bool) -> None:
    wrote = slot.memory._version != version
    if slot.num_holders == 1:
        seat.pack.remove()
    if wrote:
        seat.ring.forget(slot)
    seat.ring.leave(slot)
    if wrote and not failed:
        raise UnsupportedOperationError(
            "an offloaded block writes to its own weights, which would be lost: the host's are not changed; leave the block out with"
            " memory.exclude"
        )


@torch.compiler.disable()
def _own(slot: Slot, output: Any) -> Any:
    """The output, with copies of what lies in the slot (a weight, or a view of one): the next block's bytes come there."""
    memory = slot.memory.untyped_storage()._cdata

    def is_inside(tensor: torch.Tensor) -> bool:
        return is_movable(tensor) and tensor.untyped_storage()._cdata == memory

    if not any(isinstance(leaf, torch.Tensor) and is_inside(leaf) for leaf in tree_leaves(output)):
        return output
    return tree_map_only(torch.Tensor, lambda tensor: tensor.clone() if is_inside(tensor) else tensor, output)


class StreamedBlock:
    """Mixed into a block's class. Its call computes as the block's own, in a slot of the ring."""

    _seat: _Seat
    # The class that the block had, by which other steps tell what is alike.
    original_class: type[nn.Module]

    # Not recursive: the frame itself is not traced, and the block's own forward is.
    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        seat = self._seat
        slot, version = _enter(seat)
        failed = True
        try:
            output = _own(slot, seat.compute(self, *args, **kwargs))
            failed = False
            return output
        finally:
            _leave(seat, slot, version, failed=failed)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles what the block computes; fetching its weights stays outside."""
        forward = self.original_class.forward

        # A function of our own: torch.compile skips the frames of torch's classes at the top.
        def compute(block: nn.Module, *inputs: Any, **named: Any) -> Any:
            return forward(block, *inputs, **named)

        self._seat.compute = torch.compile(compute, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Calls that the device has not come to yet compute with the values of now.
        self._seat.ring.finish()
        super()._load_from_state_dict(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def __copy__(self) -> Any:
        copied = self.original_class.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedOperationError(
            "an offloaded block cannot be pickled: what brings its weights belongs to this process; save the result with its save(), or the"
            " model's state_dict()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A streamed block with memory of its own."""
        seat = self._seat
        copied = self.original_class.__new__(self.original_class)
        memo[id(self)] = copied
        state = {name: value for name, value in self.__dict__.items() if name != "_seat"}
        copied.__dict__.update(copy.deepcopy(state, memo))
        ring = memo.setdefault(id(seat.ring), copy.deepcopy(seat.ring, memo))
        return stream(copied, seat.pack.names, ring, seat.pin)

    @property
    def held_tensors(self) -> list[torch.Tensor]:
        """Device memory that belongs to the block and its like, and is no parameter: the slots."""
        return self._seat.ring.slots

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory that the block keeps pinned."""
        return self._seat.pack.host.untyped_storage().nbytes()


@cache
def _streamed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """One for each class: blocks that are alike stay alike."""
    return type(cls.__name__, (StreamedBlock, cls), {"original_class": cls, "__module__": __name__, "__doc__": cls.__doc__})


def stream(block: nn.Module, names: Sequence[str], ring: Ring, pin: Allocate) -> nn.Module:
    """Makes `block` a streamed one, in place: the tensors under `names` move to pinned memory, and `ring` brings them.

    pin: makes flat uint8 pinned memory of so many bytes. The other tensors of the block stay where they are."""
    seat = _Seat(block, names, ring, pin)
    block.__class__ = _streamed_class(type(block))
    # Not through nn.Module's __setattr__, which some classes override.
    block.__dict__["_seat"] = seat
    return block
