"""The states that a model was in, train and eval or two sets of weights, each with what was decided about calls in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kernel_pytorch.cache import LRUCache
from kernel_pytorch.graph.captured import Graph
from kernel_pytorch.graph.inputs import Call
from kernel_pytorch.graph.kinds import Kind, modes
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.replayer import QuickReplay, quick_replay
from kernel_pytorch.graph.signature import Signature, flatten
from kernel_pytorch.graph.state import ModuleGuard

# States whose graphs are kept, and kinds of calls of each.
_MAX_WORLDS, _MAX_KINDS = 4, 256
# Graphs that C++ tries in turn before Python looks.
_MAX_QUICK = 8


class World:
    """One state of a model. guard: tells whether the model is in it. kinds: by everything that tells calls apart; `_by_form` has them
    by what is not a tensor, found in microseconds. `_quick`: graphs that C++ can replay, those that copy the least first."""

    def __init__(self, model: nn.Module, manager: CUDAGraphManager, name: str) -> None:
        self.guard = ModuleGuard(model, manager.recorder.is_elsewhere)
        self.kinds: LRUCache[Any, Kind] = LRUCache(_MAX_KINDS, on_evict=self._evicted)
        self._manager, self._name = manager, name
        self._by_form: dict[Any, list[Kind]] = {}
        self._quick: list[QuickReplay] = []

    def known(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Kind | None, list[torch.Tensor]]:
        """The kind of a call that was described before, and its tensors."""
        flat = flatten(args, kwargs)
        if flat is not None:
            form, tensors = flat
            for kind in self._by_form.get((form, modes()), ()):
                if kind.signature is not None and kind.signature.fits(tensors):
                    return kind, tensors
        return None, []

    def kind(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
        """The kind of a call, a new one if need be."""
        now = modes()
        kind = self.kinds.get((call.key(), now))
        if kind is None:
            kind = self._manager.kind(call, self._name)
            self.kinds.set((call.key(), now), kind)
        flat = flatten(args, kwargs)
        if flat is not None and kind.signature is None:
            kind.signature = Signature(flat[1])
            self._by_form.setdefault((flat[0], now), []).insert(0, kind)
        return kind

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call by C++, for one like those before, while the model is what it was; else NotImplemented."""
        for quick in self._quick:
            result = quick.run(args, kwargs)
            if result is not NotImplemented:
                kind, graph = quick.kind, quick.graph
                assert kind is not None
                assert graph is not None
                self._manager.count(kind, graph)
                kind.row["num_calls"] += 1
                return result
        return NotImplemented

    def quicken(self, kind: Kind, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Has C++ replay the graph from now on, for calls like this one, where it can."""
        if graph.seeks_others:
            return
        quick = quick_replay(kind, graph, self.guard, self._manager.recorder, args, kwargs)
        if quick is not None and quick not in self._quick:
            still = [other for other in self._quick if other.graph is not None]
            if len(still) >= _MAX_QUICK:
                still.remove(min(still, key=lambda other: other.number))
            self._quick = sorted([*still, quick], key=lambda other: other.num_copies)

    def start_over(self, keep: Kind, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After the model's own tensors were moved: of what was decided before, only the kind that it was done for is left."""
        for other in self.kinds.values():
            if other is not keep:
                self._manager.forget(other)
        self.kinds.clear()
        self._by_form.clear()
        self.kinds.set((call.key(), modes()), keep)
        keep.signature = None
        self.kind(call, args, kwargs)

    def forget(self) -> None:
        for kind in self.kinds.values():
            self._manager.forget(kind)
        self.kinds.clear()
        self._by_form.clear()

    def _evicted(self, _: Any, kind: Kind) -> None:
        self._manager.forget(kind)
        self._by_form.clear()


class Worlds:
    """now: the state that the model was found in last."""

    def __init__(self, model: nn.Module, manager: CUDAGraphManager, name: str) -> None:
        self._model, self._manager, self._name = model, manager, name
        self._all: LRUCache[int, World] = LRUCache(_MAX_WORLDS, on_evict=lambda _, world: world.forget())
        self._num_made = 0
        self.now = self._new()

    def find(self) -> None:
        """Looks at the model: `now` is a state that is known, or a new one."""
        broken = self.now.guard.broken()
        if broken is None:
            return
        self._manager.statistics["guard_misses"] += 1
        for number in reversed(self._all.keys()):
            world = self._all.get(number)
            if world is not None and world.guard.broken() is None:
                self.now = world
                return
        self._manager.decisions.append({"inputs": "all", "captured": False, "reason": f"graphs set aside: {broken}"})
        self.now = self._new()

    def forget(self) -> None:
        for world in self._all.values():
            world.forget()

    def _new(self) -> World:
        world = World(self._model, self._manager, self._name)
        self._num_made += 1
        self._all.set(self._num_made, world)
        return world
