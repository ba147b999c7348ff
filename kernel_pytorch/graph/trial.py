"""One attempt to record a call: watched, recorded, compared where something stands for the caller's own tensors, timed.

The call runs several times, on memory and random state that are put back in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from kernel_pytorch.graph.analysis import WorkloadAnalysis
from kernel_pytorch.graph.captured import Graph
from kernel_pytorch.graph.failures import CALL_ERRORS, first_line
from kernel_pytorch.graph.inputs import Call, describe, is_plain, overlaps, rebuild
from kernel_pytorch.graph.kinds import Kind
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.padding_check import rounding, types_computed_in
from kernel_pytorch.graph.placement import HostArguments, HostState, can_be_sent, relative_l2
from kernel_pytorch.graph.recorder import Recording
from kernel_pytorch.graph.rival import Arms, EagerRival
from kernel_pytorch.graph.state import ModuleGuard, WriteWatch, python_state, same_bits
from kernel_pytorch.stance import eager_code

_COPY_SAMPLES = 5
# A replay with copies over one in place: from here on, addresses that come back get graphs of their own.
_COSTLY = 1.25
# Pieces of fewer are not recorded: a replay is a launch too.
_LEAST_OPERATIONS = 3


@dataclass
class Outcome:
    """graph: recorded and worth it. done, result: the call was made and counts. refusal: why this kind is not tried again.
    cannot: because it cannot be recorded, so that its parts are worth a try. timed: because of its times, which were written
    down already. moved: the model's own tensors were moved."""

    graph: Graph | None = None
    done: bool = False
    result: Any = None
    refusal: str | None = None
    cannot: bool = False
    timed: bool = False
    moved: bool = False


@dataclass
class _Inputs:
    """args, kwargs: the caller's. static: the leaves that are recorded with. buffers: those of them that stand in, by number. host:
    of those, the ones for arguments on the host. first, watch: of the call as it is, and with what stands in."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    static: list[torch.Tensor]
    buffers: dict[int, torch.Tensor]
    host: HostArguments | None
    first: WriteWatch
    watch: WriteWatch


class Trial:
    """guard: of the model, which is to know of tensors that are moved. rehearse(kind, graph, args, kwargs): the replay with all that
    a caller's call does around it, for timing. staged: arguments that the graph is to have copied in. writes: arguments that
    compiled code writes to, which cannot be watched; None for other code. rival: where the plain call is compiled code of the model,
    and eager code may be the faster one."""

    def __init__(
        self,
        manager: CUDAGraphManager,
        plain: Callable[..., Any],
        model: nn.Module,
        guard: ModuleGuard,
        rehearse: Callable[..., Any],
        kind: Kind,
        call: Call,
        staged: set[int],
        writes: tuple[int, ...] | None = None,
        rival: EagerRival | None = None,
    ) -> None:
        self._manager, self._recorder = manager, manager.recorder
        self._plain, self._model, self._guard, self._rehearse = plain, model, guard, rehearse
        self._kind, self._call, self._staged, self._writes = kind, call, staged, writes
        self._rival = rival
        self._rng, self._draws = self._recorder.rng_state(), False
        self._far = [i for i, tensor in enumerate(call.tensors) if self._recorder.is_elsewhere(tensor)]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        kind, call = self._kind, self._call
        kind.num_attempts += 1
        large = next((call.tensors[i] for i in self._far if not can_be_sent(call.tensors[i])), None)
        if large is not None:
            return Outcome(refusal=f"an argument of {large.nbytes} bytes is on {large.device}", cannot=True)
        before = python_state(self._model)
        watch = self._new_watch()
        try:
            result = self._watched(watch, args, kwargs)
        except CALL_ERRORS as error:
            self._undo(watch)
            return Outcome(refusal=f"the call cannot be watched: {first_line(error)}")
        after = describe(args, kwargs)
        if python_state(self._model) != before or (after.key(), after.places()) != (call.key(), call.places()):
            # What Python holds cannot be put back, so this call counts. A model may fill a cache once: try once more.
            changes = "the call changes Python attributes, which a replay would not"
            return Outcome(done=True, result=result, refusal=changes if kind.num_attempts > 1 else None, cannot=True)
        why = _refused(watch) or self._elsewhere(watch)
        if why is not None:
            return Outcome(done=True, result=result, refusal=why, cannot=True)
        if "module" in kind.row and self._writes is None and watch.num_operations < _LEAST_OPERATIONS:
            return Outcome(done=True, result=result, refusal=f"{watch.num_operations} operations are not worth a graph")
        self._draws = not torch.equal(self._rng, self._recorder.rng_state())
        self._undo(watch)
        kind.by_address = tuple(i for i, t in enumerate(call.tensors) if i not in self._far and (watch.wrote(t) or overlaps(t)))
        self._staged -= set(kind.by_address)
        state = HostState(self._guard.slots, self._recorder, watch)
        outcome = Outcome()
        if state or (self._far and kind.substitutes):
            outcome = self._attempt(args, kwargs, watch, self._far if kind.substitutes else [], state)
            if not outcome.cannot:
                outcome.moved = bool(state)
                return outcome
            state.put_back()
            self._guard.look_again()
            kind.substitutes = False
        with_placement, kind.by_value = outcome.refusal, tuple(self._far)
        outcome = self._attempt(args, kwargs, watch, [], None)
        if outcome.cannot and with_placement:
            outcome.refusal = f"{outcome.refusal}; with what is on the host put on the device: {with_placement}"
        return outcome

    def _attempt(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        first: WriteWatch,
        sent: list[int],
        state: HostState | None,
    ) -> Outcome:
        """first: of this call as it is. sent: arguments on the host that device memory stands for. state: what the model holds
        there, moved to the device first. Where something stands in the call is watched again, and compared."""
        tensors = self._call.tensors
        placed = bool(sent) or state is not None
        seen = self._new_watch() if placed else first
        try:
            expected = self._outcome_of(args, kwargs, first) if placed else None
            if state is not None:
                state.place()
                self._guard.look_again()
            host = HostArguments(self._recorder, tensors, sent) if sent else None
            if host is not None:
                host.send(tensors)
            buffers = {i: _buffer_like(tensors[i]) for i in self._staged} | (host.buffers if host is not None else {})
            static = [buffers.get(i, tensor) for i, tensor in enumerate(tensors)]
            if placed:
                self._watched(seen, *self._with(static, args, kwargs))
                self._undo(first, seen)
                why = _refused(seen)
                if why is None and any(seen.wrote(buffers[i]) for i in sent):
                    why = "the call writes to an argument on the host"
                if why is not None:
                    return Outcome(refusal=why, cannot=True)
            why = self._lost(seen)
            if why is not None:
                return Outcome(refusal=why, cannot=True)
            return self._record(_Inputs(args, kwargs, static, buffers, host, first, seen), expected)
        except CALL_ERRORS as error:
            crossing = f"; it takes host memory to the device: {seen.said(seen.crosses)}" if seen.crosses is not None else ""
            return Outcome(refusal=f"capture failed: {first_line(error)}{crossing}", cannot=True)
        finally:
            self._undo(first, seen)

    def _record(self, inputs: _Inputs, expected: list[Any] | None) -> Outcome:
        args, kwargs = self._with(inputs.static, inputs.args, inputs.kwargs)
        # Compiles on the caller's stream, as the plain call would too.
        self._plain(*args, **kwargs)
        self._undo(inputs.watch)
        start = time.monotonic()
        graph = self._graph(inputs)
        self._recorder.hold(inputs.buffers.values())
        error = None
        if expected is not None:
            error = relative_l2(self._replayed(graph, inputs), expected)
            if error is None:
                return Outcome(refusal="its outputs are others when what is on the host is on the device", cannot=True)
            self._undo(inputs.watch)
        outcome = Outcome()
        try:
            outcome = self._timed(graph, inputs, start, error)
        finally:
            if outcome.graph is not graph:
                graph.close()
        return outcome

    def _graph(self, inputs: _Inputs) -> Graph:
        """Records the call, by the code that is switched on."""
        recorder, watch = self._recorder, inputs.watch
        args, kwargs = self._with(inputs.static, inputs.args, inputs.kwargs)

        def recorded() -> Any:
            return self._plain(*args, **kwargs)

        def undone() -> None:
            # A cache that is written at a position that the call counts up itself must not run over.
            recorded()
            self._undo(watch)

        recorder.warm_up(undone, self._manager.num_warmup_calls)
        recording = recorder.record(recorded)
        # Replays from here on, the manager's or not, are in this stream's order.
        recorder.enter_replay()
        self._manager.statistics["captures"] += 1
        pure = not self._draws and not inputs.first.num_written
        repeatable = pure or self._repeats(recording, watch)
        by_value = self._kind.by_value
        return Graph(recording, self._call, inputs.static, inputs.buffers, inputs.host, by_value, watch, pure=pure, repeatable=repeatable)

    def _replayed(self, graph: Graph, inputs: _Inputs) -> list[Any]:
        """What a replay returns, and then what the call writes."""
        return [*tree_leaves(graph.run(self._call.tensors)), *inputs.first.written()]

    def _repeats(self, recording: Recording, watch: WriteWatch) -> bool:
        """Whether a second replay in a row leaves and returns the same bits as the first. A call that counts is not asked."""
        if watch.counts:
            return False
        states = []
        for _ in range(2):
            recording.replay()
            states.append([leaf.clone() for leaf in (*tree_leaves(recording.output), *watch.written()) if isinstance(leaf, torch.Tensor)])
        self._undo(watch)
        return all(map(same_bits, *states))

    def _timed(self, graph: Graph, inputs: _Inputs, start: float, error: float | None) -> Outcome:
        kind, terms, manager = self._kind, self._manager.terms, self._manager
        with manager.uncounted(kind):
            timed = self._recorder.compare(
                lambda: self._plain(*inputs.args, **inputs.kwargs),
                lambda: self._rehearse(kind, graph, inputs.args, inputs.kwargs),
                inputs.watch.restore,
                terms.min_speedup,
            )
        copies = bool(self._staged)
        if not copies:
            kind.in_place_ms = timed.replay_ms
        analysis = WorkloadAnalysis.of(kind.row["inputs"], kind.row["num_calls"], timed)
        if graph.buffers:
            analysis.copy_ms = median([self._copy_ms(graph) for _ in range(_COPY_SAMPLES)])
        analysis.num_written, analysis.num_operations = inputs.watch.num_written, inputs.watch.num_operations
        analysis.placement_relative_l2 = error
        analysis.capture_s = time.monotonic() - start
        if copies and kind.in_place_ms is not None and timed.replay_ms > _COSTLY * kind.in_place_ms:
            graph.copies_cost = terms.repays(analysis.capture_s, timed.replay_ms - kind.in_place_ms)
        keep, reason = timed.verdict(terms.min_speedup)
        if keep and not terms.repays(analysis.capture_s, analysis.saved_ms):
            keep, reason = False, f"{reason}; {terms.payback_calls} calls would not repay {analysis.capture_s:.2f} s of capture"
        reason = f"replay is {'kept' if keep else 'not kept'}: {reason}"
        if keep and self._rival is not None:
            better = self._rival.better_of(graph, self._arms(inputs), analysis)
            better.copies_cost, graph = graph.copies_cost, better
            analysis.capture_s = time.monotonic() - start
        analysis.copied_bytes, analysis.pool_bytes, analysis.held_bytes = graph.copied_bytes, graph.pool_bytes, graph.held_bytes
        if keep:
            no_room = manager.keep(kind, graph)
            keep, reason = (True, reason) if no_room is None else (False, no_room)
        manager.decide({**analysis.row(), "captured": keep, "reason": reason}, kind)
        if not keep and copies:
            # What copies cost is no reason against a graph for one address.
            kind.copies_refused = True
            return Outcome()
        return Outcome(graph if keep else None, refusal=None if keep else reason, timed=True)

    def _copy_ms(self, graph: Graph) -> float:
        """Of all that is copied in: arguments on the host count as changed."""
        if graph.host is not None:
            graph.host.forget()
        return self._recorder.milliseconds(lambda: graph.fill(self._call.tensors))

    def _arms(self, inputs: _Inputs) -> Arms:
        kind, args, kwargs = self._kind, inputs.args, inputs.kwargs
        return Arms(
            kind,
            record=lambda: self._graph(inputs),
            call=lambda: self._outcome_of(args, kwargs, inputs.first),
            replay=lambda graph: self._replayed(graph, inputs),
            rehearse=lambda graph: self._rehearse(kind, graph, args, kwargs),
            restore=inputs.watch.restore,
            undo=lambda: self._undo(inputs.first, inputs.watch),
            num_written=inputs.first.num_written,
            draws=self._draws,
            tolerance=rounding(types_computed_in(self._model, self._recorder.device)),
        )

    def _new_watch(self) -> WriteWatch:
        return WriteWatch(self._recorder.device.type, is_elsewhere=self._recorder.is_elsewhere, model=self._model)

    def _watched(self, watch: WriteWatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for index in self._writes or ():
            watch.will_write(describe(args, kwargs).tensors[index])
        with eager_code(), watch:
            return self._plain(*args, **kwargs)

    def _elsewhere(self, watch: WriteWatch) -> str | None:
        """Why the call cannot be recorded here: it uses another device, on which it would run while it is recorded and never again."""
        devices = [*(tensor.device for tensor in self._call.tensors), *(storage.device for storage in watch.found.values())]
        foreign = next(filter(self._recorder.is_foreign, devices), None)
        return None if foreign is None else f"the call uses memory of {foreign}; graphs are made on {self._recorder.device}"

    def _lost(self, watch: WriteWatch) -> str | None:
        """Why replays would read host memory that is gone: the call made it, or was given it. What the model holds stays."""
        held = {slot[2].untyped_storage()._cdata for slot in self._guard.slots if isinstance(slot[2], torch.Tensor) and is_plain(slot[2])}
        lost = next((name for key, name in watch.taken.items() if key not in held), None)
        return None if lost is None else f"the call takes host memory that the model does not hold to the device: {watch.said(lost)}"

    def _with(self, static: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = iter(static)
        return rebuild(args, leaves), rebuild(kwargs, leaves)

    def _outcome_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], first: WriteWatch) -> list[Any]:
        """What the plain call returns and writes: copies."""
        leaves = [*tree_leaves(self._plain(*args, **kwargs)), *first.written()]
        copies = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._undo(first)
        return copies

    def _undo(self, *watches: WriteWatch) -> None:
        for watch in watches:
            watch.restore()
        self._recorder.set_rng_state(self._rng)


def _refused(watch: WriteWatch) -> str | None:
    if watch.waits_for is not None:
        return f"the call waits for a value of the device: {watch.said(watch.waits_for)}"
    if watch.on_host is not None:
        return f"the call computes on the host from memory that may change: {watch.said(watch.on_host)}"
    return None


def _buffer_like(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, so that it is served by the same kernels."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
