"""One recorded call: where its arguments go, what it gives back, and for which arguments it stands."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.graph.inputs import Call, holds_tensors
from kernel_pytorch.graph.placement import HostArguments
from kernel_pytorch.graph.recorder import Recording
from kernel_pytorch.graph.signature import at_addresses, copy_all, pointers
from kernel_pytorch.graph.state import WriteWatch, same_bits

if TYPE_CHECKING:
    from kernel_pytorch.graph.replayer import QuickReplay

_numbers = itertools.count()
_REPLAYS_OF_SEARCH = 64


class Graph:
    """Replays a recording. buffers: device memory that stands for argument i. fixed: arguments that must be where they were.
    by_value: arguments on the host whose values are frozen in. pure: a replay writes nothing that was there before and draws
    no random numbers, so that one too many does no harm. repeatable: a second replay writes and returns what the first did, so
    that one with wrong weights is put right by the call that follows. copies_cost: the replay was timed so much slower than one
    that copies nothing in that addresses which come back are to have graphs of their own.
    is_plain: nothing of it needs Python in every call. quick: the C++ half; quick_tried: whether one was asked for."""

    def __init__(
        self,
        recording: Recording,
        call: Call,
        static: list[torch.Tensor],
        buffers: dict[int, torch.Tensor],
        host: HostArguments | None,
        by_value: tuple[int, ...],
        watch: WriteWatch,
        *,
        pure: bool,
        repeatable: bool,
    ) -> None:
        self.number = next(_numbers)
        self.buffers, self.pure, self.repeatable = buffers, pure, repeatable
        self.host = host
        self.places = call.places()
        self.pointers = pointers(call.tensors)
        self.fixed = [i for i in range(len(call.tensors)) if i not in buffers and i not in by_value]
        self.by_value = {i: call.tensors[i].clone() for i in by_value}
        self.copies = [i for i in buffers if host is None or i not in host.buffers]
        self._into = [buffers[i] for i in self.copies]
        arguments = {tensor.untyped_storage()._cdata: i for i, tensor in enumerate(static)}
        # Memory that the recording reads by address: held, so that it cannot become someone else's. Arguments are not: a
        # graph is for their addresses, whoever is there.
        own = {tensor.untyped_storage()._cdata for tensor in (*static, *call.tensors)}
        self._keep = (call.objects, [storage for key, storage in watch.found.items() if key not in own])
        leaves, self.spec = tree_flatten(recording.output)
        self._sources = [self._source(leaf, call, static, arguments, watch) for leaf in leaves]
        # Neither arguments that come back are held nor what is copied out: until the next replay it is nobody else's either way.
        self._leaves: list[Any] = [leaf if source == "same" else None for leaf, source in zip(leaves, self._sources, strict=True)]
        clones = [i for i, source in enumerate(self._sources) if source == "clone"]
        let_go = recording.let_go([leaves[i] for i in clones])
        for i, tensor in zip(clones, let_go.tensors, strict=True):
            self._leaves[i] = tensor
        self.recording = replace(recording, output=None, held_bytes=max(0, recording.held_bytes - let_go.num_bytes))
        self.held_bytes = self.recording.held_bytes + sum(buffer.nbytes for buffer in buffers.values())
        self.pool_bytes = recording.pool_bytes
        self.copied_bytes = sum(buffer.nbytes for buffer in buffers.values())
        self.num_replays = 0
        self.copies_cost = False
        self.quick: QuickReplay | None = None
        self.quick_tried = False
        self.is_plain = not by_value and not self.places

    def _source(self, leaf: Any, call: Call, static: list[torch.Tensor], arguments: dict[int, int], watch: WriteWatch) -> Any:
        """Where an output comes from: an argument's number, a view of an argument, the `same` object every time, a `clone`."""
        if isinstance(leaf, torch.Tensor):
            for index, tensor in enumerate(static):
                if leaf is tensor:
                    return index
            # What stands for arguments on the host is one storage.
            of_host = None if self.host is None else self.host.whose(leaf)
            index = arguments.get(leaf.untyped_storage()._cdata) if of_host is None else of_host
            # A conjugate, or a negative, that is not computed yet has the argument's memory and other values.
            if index is not None and leaf.dtype == static[index].dtype and not (leaf.is_conj() or leaf.is_neg()):
                return (index, leaf.shape, leaf.stride(), leaf.storage_offset() - static[index].storage_offset())
            return "same" if index is None and watch.was_there(leaf) else "clone"
        if holds_tensors(leaf) and not any(leaf is known for known in call.objects):
            raise UnsupportedOperationError(f"the output holds a {type(leaf).__name__}, whose tensors the next replay would overwrite")
        return "same"

    @property
    def used(self) -> bool:
        """Whether a call used it after the one that it was made in."""
        return self.num_replays > 1

    @property
    def seeks_others(self) -> bool:
        """Whether addresses are still looked out for: callers that take turns between buffers show it soon."""
        return self.copies_cost and self.num_replays < _REPLAYS_OF_SEARCH

    @property
    def running_bytes(self) -> int:
        """What it needs while it runs, beside what it holds: graphs share it."""
        return self.pool_bytes - self.recording.held_bytes

    def close(self) -> None:
        """Lets go of what would hold its memory until Python collects cycles."""
        if self.quick is not None:
            self.quick.close()

    def outputs(self) -> list[tuple[Any, ...]]:
        """Where each output comes from, as replayer.cpp reads it."""
        rows: list[tuple[Any, ...]] = []
        for leaf, source in zip(self._leaves, self._sources, strict=True):
            if isinstance(source, str):
                rows.append((source, leaf))
            else:
                rows.append(("argument", source) if isinstance(source, int) else ("view", *source))
        return rows

    def fits(self, tensors: list[torch.Tensor], places: tuple[Any, ...]) -> bool:
        """Whether this graph computes the call: its kind is known to fit."""
        if self.fixed and not at_addresses(tensors, self.pointers, self.fixed):
            return False
        return places == self.places and all(same_bits(tensors[i], value) for i, value in self.by_value.items())

    def fill(self, tensors: list[torch.Tensor]) -> None:
        """Copies in what does not stay where it is."""
        if len(self.copies) == 1:
            self._into[0].copy_(tensors[self.copies[0]])
        elif self.copies:
            copy_all(self._into, [tensors[i] for i in self.copies])
        if self.host is not None:
            self.host.send(tensors)

    def launch(self, tensors: list[torch.Tensor]) -> Any:
        """Replays, once it is filled, and copies out."""
        self.recording.replay()
        outputs = [self._output(leaf, source, tensors) for leaf, source in zip(self._leaves, self._sources, strict=True)]
        return outputs[0] if self.spec.is_leaf() else tree_unflatten(outputs, self.spec)

    def run(self, tensors: list[torch.Tensor]) -> Any:
        self.fill(tensors)
        return self.launch(tensors)

    def _output(self, leaf: Any, source: Any, tensors: list[torch.Tensor]) -> Any:
        if source == "clone":
            return leaf.clone()
        if source == "same":
            return leaf
        if isinstance(source, int):
            return tensors[source]
        index, shape, stride, offset = source
        return tensors[index].as_strided(shape, stride, tensors[index].storage_offset() + offset)
