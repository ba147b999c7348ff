"""A module's call that replays a recorded graph where that measures faster, and calls straight through everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from kernel_pytorch.graph.captured import Graph
from kernel_pytorch.graph.inputs import Call, describe
from kernel_pytorch.graph.kinds import Kind, modes, shown
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.replayer import quick_replay
from kernel_pytorch.graph.rival import EagerRival
from kernel_pytorch.graph.signature import pointers
from kernel_pytorch.graph.trial import Trial
from kernel_pytorch.graph.worlds import World, Worlds
from kernel_pytorch.stance import CHOOSING_CODE

# Calls in a row that are not even described, after others like them could not be recorded.
_MAX_SKIPPED = 1023
_REFUSED_IN_A_ROW, _REST = 64, 15


class GraphedCall:
    """Stands where nn.Module.compile() puts its callable. Every new kind of call, by arguments and modes, is recorded once,
    timed against the plain call, and replayed from then on when that is faster by what the manager's terms ask for.

    Returned tensors are copies: the next call does not overwrite them. Outputs that are an argument, or a view of one, come
    back as that. Arguments at another address than before are copied in, except those that the call writes to, which get a
    graph of their own address. The call of a kind that is recorded runs the model more than once, on memory and random
    state that are put back in between. `decisions` says for every kind what was chosen and why.

    Not seen: attributes of modules that change between calls other than tensors; a model that changes such attributes
    itself is found out and never captured. Calls with gradients enabled go straight through. One thread at a time replays,
    and one in the process records; others go straight through.

    name: of the module within the model, "" for the model itself. writes: arguments that compiled code, which cannot be watched,
    writes to; None for other code. on_cannot: called when a kind of call cannot be recorded as a whole. compiling: entered
    around recording. rival: records eager code beside the model's compiled code; None where there is one code."""

    def __init__(
        self,
        model: nn.Module,
        plain: Callable[..., Any],
        manager: CUDAGraphManager,
        *,
        name: str = "",
        writes: tuple[int, ...] | None = None,
        on_cannot: Callable[[GraphedCall], None] | None = None,
        compiling: Callable[[], AbstractContextManager[Any]] = nullcontext,
        rival: EagerRival | None = None,
    ) -> None:
        self.model, self.plain, self.name = model, plain, name
        self._writes, self._compiling, self._rival = writes, compiling, rival
        self.manager, self._recorder, self._busy = manager, manager.recorder, manager.recorder.busy
        self.around_plain: Callable[..., Any] = plain
        self._on_cannot = on_cannot
        self._worlds = Worlds(model, manager, name)
        self._suspicious = False
        self._skipped = self._calls_to_skip = 0
        self._num_refused = self._resting = 0
        self._noted: set[str] = set()

    @property
    def decisions(self) -> list[dict[str, Any]]:
        return self.manager.decisions

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        manager = self.manager
        if is_compiling() or (self.name and manager.pieces_off) or self._busy():
            return self.plain(*args, **kwargs)
        if self._resting:
            self._resting -= 1
            manager.statistics["straight_calls"] += 1
            return self.around_plain(*args, **kwargs)
        if not manager.lock.acquire(blocking=False):
            return self.plain(*args, **kwargs)
        try:
            done, result = self._answered(args, kwargs)
        finally:
            manager.lock.release()
        return result if done else self.around_plain(*args, **kwargs)

    def replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """The call by a graph that is there for it and by nothing else, for a caller with looks of its own at the model: whether it
        was made, while the model was what it had been, and what it returned."""
        if self._resting or self._busy() or not self.manager.lock.acquire(blocking=False):
            return False, None
        try:
            world = self._worlds.now
            result = self._at_once(world, args, kwargs)
            if result is not NotImplemented:
                return True, result
            kind, tensors = world.known(args, kwargs)
            graph = None if kind is None or kind.refusal is not None else kind.find(tensors, ())
            if kind is None or graph is None or graph.seeks_others:
                return False, None
            done, result = self._checked(kind, graph, tensors)
            kind.row["num_calls"] += done
            if done:
                world.quicken(kind, graph, args, kwargs)
            return done, result
        finally:
            self.manager.lock.release()

    def close(self) -> None:
        """Drops every graph of this call; it goes on to replay nothing until kinds of calls are considered again."""
        with self.manager.lock:
            self._worlds.forget()

    def kind_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What tells one kind of call from another, for counting."""
        call = describe(args, kwargs)
        return (call.key(), modes())

    def _answered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Whether the call was made, and what it returned. What is decided about nearly all calls is found here."""
        world = self._worlds.now
        result = self._at_once(world, args, kwargs)
        if result is not NotImplemented:
            return True, result
        kind, tensors = world.known(args, kwargs)
        if kind is not None:
            graph = kind.find(tensors, ())
            if kind.refusal is not None or (graph is None and kind.copies_refused and not kind.wants(tensors)):
                self._count(kind)
                self._num_refused += 1
                # A model that is only ever called in ways that are refused pays for one look in sixteen calls.
                self._resting = _REST if self._num_refused > _REFUSED_IN_A_ROW else 0
                return False, None
            if graph is not None and not (graph.seeks_others and kind.wants(tensors)):
                done, result = self._checked(kind, graph, tensors)
                if done:
                    kind.row["num_calls"] += 1
                    self._num_refused = 0
                    world.quicken(kind, graph, args, kwargs)
                    return True, result
        return self._considered(args, kwargs)

    def _at_once(self, world: World, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call by C++, or NotImplemented. Graphs for other states of the model are not tried: they might be replayed before it is
        looked at."""
        result = NotImplemented if self._suspicious else world.answer(args, kwargs)
        if result is not NotImplemented:
            self._num_refused = 0
        return result

    def _checked(self, kind: Kind, graph: Graph, tensors: list[torch.Tensor]) -> tuple[bool, Any]:
        """The replay, unless the model is not what it was. Where a replay of the wrong thing does no harm, the model is looked
        at while the device works: at all of it, or at the tensors, whose values do not change where it writes."""
        guard = self._worlds.now.guard
        code_first = self._suspicious or not graph.pure
        tensors_first = self._suspicious or not (graph.pure or graph.repeatable)
        self._suspicious = True
        # The device copies inputs in while the model is looked at.
        self.manager.load(graph, tensors)
        if code_first and guard.other_code() is not None:
            return False, None
        if tensors_first and (guard.other_tensors() is not None or guard.has_hooks()):
            return False, None
        result = self.manager.launch(kind, graph, tensors)
        if not code_first and guard.other_code() is not None:
            return False, None
        if not tensors_first and (guard.other_tensors() is not None or guard.has_hooks()):
            return False, None
        # What was found changed is looked at first in the next call, until it is found unchanged.
        self._suspicious = False
        return True, result

    def _rehearse(self, kind: Kind, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A replay with everything that a call does around it: arguments on the host count as changed."""
        if graph.host is not None:
            graph.host.forget()
        quick = quick_replay(kind, graph, self._worlds.now.guard, self._recorder, args, kwargs)
        result = NotImplemented if quick is None else quick.run(args, kwargs)
        if result is not NotImplemented:
            self.manager.count(kind, graph)
            return result
        _, tensors = self._worlds.now.known(args, kwargs)
        if not tensors:
            tensors = describe(args, kwargs).tensors
        graph.fits(tensors, graph.places)
        done, result = self._checked(kind, graph, tensors)
        assert done, "what was timed was no replay"
        return result

    def _considered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """New calls, those that hold objects, and the first ones after the model changed."""
        if self._calls_to_skip > 0:
            self._calls_to_skip -= 1
            self.manager.statistics["straight_calls"] += 1
            return False, None
        why = self._straight_through()
        if why is not None:
            self._note(why, None)
            return False, None
        call = describe(args, kwargs)
        if call.refusal is not None:
            self._note(call.refusal, call)
            self._skip_more()
            return False, None
        self._worlds.find()
        kind = self._worlds.now.kind(call, args, kwargs)
        if kind.refusal is not None:
            self._count(kind)
            if kind.signature is None:
                self._skip_more()
            return False, None
        self._skipped = 0
        kind.row["num_calls"] += 1
        at = pointers(call.tensors)
        graph = kind.find(call.tensors, call.places())
        if graph is not None and not kind.wanted:
            return True, self.manager.replay(kind, graph, call.tensors)
        staged = self._plan(kind, call, at, graph)
        if staged is None or not CHOOSING_CODE.acquire(blocking=False):
            self.manager.statistics["straight_calls"] += 1
            return False, None
        try:
            return self._tried(kind, call, staged, args, kwargs)
        finally:
            CHOOSING_CODE.release()

    def _skip_more(self) -> None:
        """Describing objects costs more than most launches: after each that was for nothing, more calls are not described."""
        self._skipped = min(2 * self._skipped + 1, _MAX_SKIPPED)
        self._calls_to_skip = self._skipped

    def _count(self, kind: Kind) -> None:
        kind.row["num_calls"] += 1
        self.manager.statistics["straight_calls"] += 1

    def _plan(self, kind: Kind, call: Call, at: list[int], costly: Graph | None) -> set[int] | None:
        """Arguments to be copied in by a graph to be recorded now; None to wait, or to do without."""
        if costly is not None:
            kind.wanted = False
            return set()
        staged = kind.plan(call, at)
        if not kind.graphs and kind.row["num_calls"] - kind.calls_to_wait < self.manager.terms.calls_needed(self.manager.num_unused()):
            return None
        if staged is None and not kind.noted:
            kind.noted = True
            reason = "an argument that cannot be copied in (written to, expanded, or inside an object) is a new one in every call"
            if kind.copies_refused:
                reason = "copying an argument in costs more than a replay saves, and it is a new one in every call"
            self.manager.decide({"captured": False, "reason": reason}, kind)
        return staged

    def _tried(self, kind: Kind, call: Call, staged: set[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        guard = self._worlds.now.guard
        trial = Trial(self.manager, self.plain, self.model, guard, self._rehearse, kind, call, staged, self._writes, self._rival)
        with self._compiling():
            outcome = trial.run(args, kwargs)
        if outcome.moved:
            self._worlds.now.start_over(kind, call, args, kwargs)
        if outcome.refusal is not None:
            kind.refusal = outcome.refusal
            self.manager.drop(kind)
            if not outcome.timed:
                self.manager.decide({"captured": False, "reason": outcome.refusal}, kind)
            if outcome.cannot and self._on_cannot is not None:
                self._on_cannot(self)
        if outcome.done:
            return True, outcome.result
        if outcome.graph is None:
            return False, None
        kind.staged |= staged
        return True, self.manager.replay(kind, outcome.graph, call.tensors)

    def _straight_through(self) -> str | None:
        if torch.is_grad_enabled():
            return "gradients are enabled: capture is for no_grad and inference_mode"
        if self._worlds.now.guard.has_hooks():
            return "a module has a forward hook, which a replay would not run"
        return None

    def _note(self, reason: str, call: Call | None) -> None:
        """Says once that calls go straight through, and why."""
        self.manager.statistics["straight_calls"] += 1
        if reason not in self._noted:
            self._noted.add(reason)
            name = {"module": self.name} if self.name else {}
            self.decisions.append({**name, "inputs": "any" if call is None else shown(call), "captured": False, "reason": reason})
