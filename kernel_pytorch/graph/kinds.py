"""Kinds of calls: those that one graph could serve, what was decided for each, and which graph a call is served by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kernel_pytorch.cache import LRUCache
from kernel_pytorch.graph.captured import Graph
from kernel_pytorch.graph.inputs import Call
from kernel_pytorch.graph.signature import Signature, pointers

_C: Any = torch._C
# What is read for `modes`, in every call: functions with their arguments. Those of torch._C are what torch's own call, which are a
# tenth to a half as long.
MODES: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = (
    (torch.is_grad_enabled, ()),
    (torch.is_inference_mode_enabled, ()),
    (torch.is_autocast_enabled, ("cuda",)),
    (torch.get_autocast_dtype, ("cuda",)),
    (torch.get_default_dtype, ()),
    (_C._get_deterministic_algorithms, ()),
    (_C._get_fp32_precision_getter, ("cuda", "matmul")),
    (_C._get_fp32_precision_getter, ("cuda", "conv")),
    (_C._get_math_sdp_enabled, ()),
    (_C._get_flash_sdp_enabled, ()),
    (_C._get_mem_efficient_sdp_enabled, ()),
    (_C._get_cudnn_sdp_enabled, ()),
    # A TorchFunctionMode sees what Python calls, and not what C++ does.
    (_C._len_torch_function_stack, ()),
)
# Graphs of one kind that are for one address each: callers that take turns between buffers have two to four.
MAX_BY_ADDRESS = 4
# Places of arguments that are remembered for a kind, to know those that come back.
_PLACES_REMEMBERED = 64


@dataclass
class Kind:
    """Calls with equal structure, shapes, types and modes.

    row: inputs and counts, as the report shows them. signature: None when an argument is an object. staged: arguments that are
    copied in. by_address: those that the call writes to, or that no copy can stand for. by_value: those on the host that a
    graph holds the value of. calls_to_wait: before the next capture is thought of. demand: times that a place must have been
    seen before a graph is made for it alone."""

    row: dict[str, Any]
    objects: list[Any]
    signature: Signature | None = None
    staged: set[int] = field(default_factory=set)
    by_address: tuple[int, ...] = ()
    by_value: tuple[int, ...] = ()
    substitutes: bool = True
    copies_refused: bool = False
    graphs: list[Graph] = field(default_factory=list)
    num_attempts: int = 0
    calls_to_wait: int = 0
    demand: int = 2
    refusal: str | None = None
    noted: bool = False
    wanted: bool = False
    in_place_ms: float | None = None
    seen: LRUCache[Any, int] = field(default_factory=lambda: LRUCache(_PLACES_REMEMBERED))

    def find(self, tensors: list[torch.Tensor], places: tuple[Any, ...]) -> Graph | None:
        for graph in self.graphs:
            if graph.fits(tensors, places):
                return graph
        return None

    def plan(self, call: Call, at: list[int]) -> set[int] | None:
        """Arguments to copy in by a new graph, for a call that no graph fits; None when none is to be made."""
        if not self.graphs:
            return set(self.staged)
        known = [graph for graph in self.graphs if self._fixed(graph.places, graph.pointers, graph.by_value) == self._here(call, at)]
        if not known:
            return set(self.staged) if self.room(self._here(call, at)) else None
        if not self.copies_refused:
            moved = {i for i in known[0].fixed if i not in self.by_address and at[i] != known[0].pointers[i]}
            return self.staged | moved
        wanted, self.wanted = self.wanted, False
        return set() if wanted or self.room(tuple(at)) else None

    def wants(self, tensors: list[torch.Tensor]) -> bool:
        """Whether these addresses, which are counted, come back often enough for a graph of their own; remembered for `plan`."""
        self.wanted = self.room(tuple(pointers(tensors)))
        return self.wanted

    def replaced_by(self, new: Graph) -> list[Graph]:
        """Graphs with nothing left to do: they copy in less than a new one for the same place, and are for addresses that did not
        come back."""
        place = self._fixed(new.places, new.pointers, new.by_value)
        fewer = [graph for graph in self.graphs if graph.buffers.keys() < new.buffers.keys() and (graph.buffers or not graph.used)]
        return [graph for graph in fewer if self._fixed(graph.places, graph.pointers, graph.by_value) == place]

    def room(self, place: Any) -> bool:
        """Whether this place, which is counted, is to have a graph of its own: the second one at once, others when they come
        back; when there are too many, the one used last the longest ago goes, and the next must come back twice as often."""
        count = (self.seen.get(place) or 0) + 1
        self.seen.set(place, count)
        if len(self.graphs) >= 2 and count < self.demand:
            return False
        if len(self.graphs) >= MAX_BY_ADDRESS:
            self.demand *= 2
        return True

    def _here(self, call: Call, at: list[int]) -> Any:
        return self._fixed(call.places(), at, {i: call.tensors[i] for i in self.by_value})

    def _fixed(self, places: tuple[Any, ...], at: list[int], values: dict[int, torch.Tensor]) -> Any:
        return (places, tuple(at[i] for i in self.by_address), tuple(repr(value.tolist()) for value in values.values()))


def modes() -> tuple[Any, ...]:
    """Everything process- or thread-wide that decides which kernels a call runs."""
    return tuple([read(*given) for read, given in MODES])


def shown(call: Call) -> str:
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in call.tensors) or "no tensors"
