"""CUDAGraphManager: every graph of a model, in one memory pool, under one budget, with counts of what really happened."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kernel_pytorch.cache import LRUCache
from kernel_pytorch.graph.captured import Graph
from kernel_pytorch.graph.inputs import Call
from kernel_pytorch.graph.kinds import MAX_BY_ADDRESS, Kind, shown
from kernel_pytorch.graph.recorder import Recorder
from kernel_pytorch.graph.strategy import Terms

# Of the device memory that is free when the first graph is made, the share that graphs may take where no budget is given.
FREE_SHARE = 0.25


class CUDAGraphManager:
    """Owns the graphs of the calls that were given to it: the whole model's, or those of its pieces.

    statistics: counts, live: captures, replays, straight_calls, evictions, guard_misses, copied_bytes, and held_bytes, which
    are allocated now. decisions: live, one entry for everything that was decided, with its reason. workload: live, one
    entry a kind of call, with the calls seen and replayed. budget_bytes: None until the first graph is made, unless given.
    pieces_off: pieces of the model are called plainly, for a comparison. lock: held while a call is recorded or replayed;
    replays share memory, so there is one at a time."""

    def __init__(self, recorder: Recorder, terms: Terms, *, num_warmup_calls: int, memory_budget_bytes: int | None = None) -> None:
        self.recorder, self.terms, self.num_warmup_calls = recorder, terms, num_warmup_calls
        self.budget_bytes = memory_budget_bytes
        self.lock = threading.Lock()
        self.pieces_off = False
        self.decisions: list[dict[str, Any]] = []
        self.workload: list[dict[str, Any]] = []
        names = ("captures", "replays", "straight_calls", "evictions", "guard_misses", "copied_bytes", "held_bytes")
        self.statistics: dict[str, int] = dict.fromkeys(names, 0)
        self._graphs: LRUCache[int, tuple[Kind, Graph]] = LRUCache(None)
        self._newest = -1
        self._wasted = 0

    def replay(self, kind: Kind, graph: Graph, tensors: list[torch.Tensor]) -> Any:
        self.load(graph, tensors)
        return self.launch(kind, graph, tensors)

    def load(self, graph: Graph, tensors: list[torch.Tensor]) -> None:
        """The start of a replay, which does no harm if the launch does not follow: copies into memory of the graph's own."""
        self.recorder.enter_replay()
        if graph.buffers:
            graph.fill(tensors)

    def launch(self, kind: Kind, graph: Graph, tensors: list[torch.Tensor]) -> Any:
        result = graph.launch(tensors)
        self.recorder.leave_replay()
        self.count(kind, graph)
        return result

    def count(self, kind: Kind, graph: Graph) -> None:
        """One replay more. The device works meanwhile."""
        if graph.number != self._newest:
            self._graphs.get(graph.number)
            self._newest = graph.number
        graph.num_replays += 1
        self.statistics["replays"] += 1
        self.statistics["copied_bytes"] += graph.copied_bytes
        kind.row["num_replays"] += 1

    @contextmanager
    def uncounted(self, kind: Kind) -> Iterator[None]:
        """Replays inside are for timing: they are not in the counts."""
        statistics, row = dict(self.statistics), dict(kind.row)
        try:
            yield
        finally:
            self.statistics.update(statistics)
            kind.row.update(row)

    def pieces(self) -> list[str]:
        """Names of the pieces of a model that have a graph."""
        return sorted({kind.row["module"] for kind, _ in self._all() if "module" in kind.row})

    def num_unused(self) -> int:
        """Graphs that no call has used but the one that they were made in, those that were dropped like that among them."""
        return self._wasted + sum(not graph.used for _, graph in self._all())

    def kind(self, call: Call, name: str) -> Kind:
        row = {"inputs": shown(call), "num_calls": 0, "num_replays": 0, **({"module": name} if name else {})}
        self.workload.append(row)
        return Kind(row, call.objects)

    def forget(self, kind: Kind) -> None:
        self.drop(kind)
        self.workload.remove(kind.row)

    def keep(self, kind: Kind, graph: Graph) -> str | None:
        """Makes room for a graph; the reason when there is no room even alone."""
        self._set_budget()
        for older in kind.replaced_by(graph):
            self._release(kind, older)
        graph.num_replays = 0
        kind.graphs.append(graph)
        # Those that copy the least are looked at first.
        kind.graphs.sort(key=lambda other: len(other.buffers))
        self._graphs.set(graph.number, (kind, graph))
        for older in [other for owner, other in self._all() if owner is kind][:-MAX_BY_ADDRESS]:
            self._release(kind, older)
        while self.budget_bytes is not None and self.total_bytes() > self.budget_bytes and len(self._graphs) > 1:
            oldest = self._graphs.evict()
            assert oldest is not None
            self._evicted(*oldest[1])
        self.statistics["held_bytes"] = self.total_bytes()
        if self.budget_bytes is None or self.total_bytes() <= self.budget_bytes:
            return None
        needed = self.total_bytes()
        self._release(kind, graph)
        return f"the graph needs {needed} bytes, the budget is {self.budget_bytes}"

    def has_room(self, graph: Graph) -> bool:
        """Whether the budget allows for a graph alone."""
        self._set_budget()
        return self.budget_bytes is None or graph.held_bytes + graph.running_bytes <= self.budget_bytes

    def total_bytes(self) -> int:
        """Input buffers of all graphs, outputs that must be held, and the most that any of them needs while it runs, which they share."""
        graphs = [graph for _, graph in self._all()]
        running = max((graph.running_bytes for graph in graphs), default=0)
        return sum(graph.held_bytes for graph in graphs) + running

    def drop(self, kind: Kind) -> None:
        for graph in list(kind.graphs):
            self._wasted += not graph.used
            self._release(kind, graph)

    def decide(self, row: dict[str, Any], kind: Kind) -> None:
        """Adds a decision about a kind of call, with the piece of the model that it is a call of."""
        self.decisions.append({key: value for key, value in kind.row.items() if key in ("module", "inputs")} | row)

    def _set_budget(self) -> None:
        if self.budget_bytes is None:
            free = self.recorder.free_bytes()
            self.budget_bytes = None if free is None else int(free * FREE_SHARE)

    def _all(self) -> list[tuple[Kind, Graph]]:
        return self._graphs.values()

    def _release(self, kind: Kind, graph: Graph) -> None:
        graph.close()
        self._graphs.pop(graph.number)
        kind.graphs.remove(graph)
        self.statistics["held_bytes"] = self.total_bytes()

    def _evicted(self, kind: Kind, graph: Graph) -> None:
        self._wasted += not graph.used
        self._release(kind, graph)
        self.statistics["evictions"] += 1
        if not kind.graphs:
            # Made again only when the kind is called as often again as it was, so that graphs do not chase each other out.
            kind.calls_to_wait = 2 * kind.row["num_calls"]
        self.decide({"captured": False, "reason": f"evicted: over the budget of {self.budget_bytes} bytes"}, kind)
