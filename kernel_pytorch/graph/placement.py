"""Graph-aware placement: small tensors on the host that a graph would trip over get device memory to stand for them.

Arguments are sent into that memory in every call in which they changed. What a model holds (a buffer, an attribute) is
moved once, on the model that this library was given to change. Either way the outputs must be what they were: an operation
with a scalar on the host may round once more or once less than with the same scalar on the device (a division by one is a
multiplication by its inverse), so the same up to a few roundings."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from kernel_pytorch.graph.inputs import BY_VALUE, overlaps, value_key
from kernel_pytorch.graph.recorder import Recorder
from kernel_pytorch.graph.state import HOST_BYTES, WriteWatch, same_bits

# Sends that may be under way before the host waits for one: calls that nobody reads the results of run ahead.
_BLOCKS = 8
_ALIGNMENT = 64

# An argument on the host that is larger is not sent in every call: the call goes straight through.
MAX_SENT_BYTES = 2**16


def can_be_sent(tensor: torch.Tensor) -> bool:
    return tensor.nbytes <= MAX_SENT_BYTES and not overlaps(tensor)


class HostArguments:
    """Device memory that stands for arguments on the host: all of them are sent at once, and only when one has another value.

    buffers: what stands for argument i, contiguous. sent: int64 [1], the number of the block that was sent last; less _BLOCKS, where what
    the device has is not known. The next block follows it either way. replayer.cpp sends too."""

    def __init__(self, recorder: Recorder, tensors: list[torch.Tensor], which: list[int]) -> None:
        self._recorder, self._which = recorder, which
        ends = list(itertools.accumulate(-(-max(tensors[i].nbytes, 1) // _ALIGNMENT) * _ALIGNMENT for i in which))
        self.starts = [0, *ends[:-1]]
        self._like = [(tensors[i].shape, tensors[i].dtype) for i in which]
        self.device = torch.zeros(ends[-1], dtype=torch.uint8, device=recorder.device)
        self.buffers = dict(zip(which, self._views(self.device), strict=True))
        self.blocks = [recorder.pinned(ends[-1]) for _ in range(_BLOCKS)]
        self._in_blocks = [self._views(block) for block in self.blocks]
        self.marks = recorder.marks(_BLOCKS)
        self.sent = torch.full((1,), -1, dtype=torch.int64, device="cpu")

    def send(self, tensors: list[torch.Tensor]) -> None:
        """Copies the arguments in, in the current stream's order; they may be changed as soon as this returns."""
        given, last = [tensors[i] for i in self._which], int(self.sent)
        if last >= 0 and all(map(_equal, given, self._in_blocks[last])):
            return
        number = (last + 1) % _BLOCKS
        if self.marks:
            self.marks[number].synchronize()
        # Until all of it is done: what is raised meanwhile leaves neither the old values on the device nor the new ones for sure.
        self.sent.fill_(number - _BLOCKS)
        for view, tensor in zip(self._in_blocks[number], given, strict=True):
            view.copy_(tensor)
        self.device.copy_(self.blocks[number], non_blocking=True)
        if self.marks:
            self._recorder.put(self.marks[number])
        self.sent.fill_(number)

    def forget(self) -> None:
        """The next call sends, whatever its values are, from the next block: the host does not wait for the one before."""
        if int(self.sent) >= 0:
            self.sent.sub_(_BLOCKS)

    def whose(self, tensor: torch.Tensor) -> int | None:
        """The argument in whose stand-in a tensor begins."""
        if tensor.untyped_storage()._cdata != self.device.untyped_storage()._cdata:
            return None
        at = tensor.storage_offset() * tensor.itemsize
        return max((start, i) for i, start in zip(self._which, self.starts, strict=True) if start <= at)[1]

    def rows(self, tensors: list[torch.Tensor]) -> list[tuple[int, int]] | None:
        """Number and place of every argument, for one who copies their memory as it is; None where that is not their values in order."""
        plain = all(tensors[i].is_contiguous() and not tensors[i].is_conj() and not tensors[i].is_neg() for i in self._which)
        return list(zip(self._which, self.starts, strict=True)) if plain else None

    def _views(self, block: torch.Tensor) -> list[torch.Tensor]:
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._like]
        parts = [block[start : start + size] for start, size in zip(self.starts, sizes, strict=True)]
        return [part.view(dtype).view(shape) for part, (shape, dtype) in zip(parts, self._like, strict=True)]


def _equal(tensor: torch.Tensor, sent: torch.Tensor) -> bool:
    """Whether an argument need not be sent: looking at many floating-point numbers costs more than sending them."""
    if tensor.numel() == 1:
        return same_bits(tensor, sent)
    return not (tensor.is_floating_point() or tensor.is_complex()) and torch.equal(tensor, sent)


class HostState:
    """The model's own tensors on the host that the watched call read, each at most HOST_BYTES. False when there are none."""

    def __init__(self, slots: list[tuple[Any, Any, Any]], recorder: Recorder, watch: WriteWatch) -> None:
        self._recorder = recorder
        self._slots = [
            (container, key, tensor)
            for container, key, tensor in slots
            if isinstance(tensor, torch.Tensor)
            and recorder.is_elsewhere(tensor)
            and tensor.nbytes <= HOST_BYTES
            and watch.reads(tensor)
            and not watch.wrote(tensor)
        ]
        self.moved_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._slots)

    def place(self) -> None:
        moved: dict[int, torch.Tensor] = {}
        # Ordinary tensors, also when the call that led here runs in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            for container, key, tensor in self._slots:
                if id(tensor) not in moved:
                    copy = self._recorder.place(tensor.detach())
                    moved[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
                container[key] = moved[id(tensor)]
        self.moved_bytes = sum(tensor.nbytes for tensor in moved.values())

    def put_back(self) -> None:
        for container, key, tensor in self._slots:
            container[key] = tensor


def relative_l2(found: list[Any], expected: list[Any], allowed: float = 0.0) -> float | None:
    """The largest ||found - expected|| / ||expected|| of the tensors; None when something is not the same up to roundings, or up to
    `allowed` where that is more. What is infinite in both is equal."""
    if len(found) != len(expected):
        return None
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor):
            if type(mine) is not type(theirs) or (isinstance(mine, BY_VALUE) and value_key(mine) != value_key(theirs)):
                return None
            continue
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype or mine.device != theirs.device:
            return None
        if same_bits(mine, theirs):
            continue
        if not mine.is_floating_point() or not torch.equal(mine.isnan(), theirs.isnan()):
            return None
        equal = (mine == theirs) | mine.isnan()
        # 0.0 and -0.0, NaNs of other bits: nothing is left to divide by where that is all there is.
        if bool(equal.all()):
            continue
        exact = theirs.double()
        difference = (mine.double() - exact).masked_fill_(equal, 0.0)
        error = float(difference.norm() / exact.nan_to_num_(0.0, 0.0, 0.0).norm())
        # A few roundings; of 16 bits one, for two sums of them in another order differ by that.
        if not error <= max(16 * torch.finfo(torch.float32).eps, torch.finfo(mine.dtype).eps, allowed):
            return None
        worst = max(worst, error)
    return worst
