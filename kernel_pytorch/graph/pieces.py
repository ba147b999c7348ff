"""A call that cannot be recorded as a whole, in pieces: the largest submodules that can be, or the regions of a compiled call.

Each piece decides for itself by its own times. The whole call is then timed with and without them, on the caller's own calls
in turns, since such a call often cannot be made twice; where it gains too little, the pieces are taken away again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from statistics import median
from typing import Any

from torch import nn

from kernel_pytorch.graph.graphed_call import GraphedCall
from kernel_pytorch.graph.regions import Regions
from kernel_pytorch.graph.timing import Comparison, interval

# Calls in which no piece decides anything, beyond those that a first capture waits for, before the whole call is timed; pairs
# of calls timed in a round, and rounds.
_QUIET_CALLS = 3
_PAIRS, _MAX_ROUNDS = 15, 4
# They hold modules that are called one by one.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class Pieces:
    """Stands around the plain call of `whole` until it is decided whether pieces are worth it.

    A submodule that is compiled is a piece or none: what is inside it is not called. regions: of the compiled whole; None when it
    is not compiled."""

    def __init__(self, whole: GraphedCall, regions: Regions | None) -> None:
        self._whole, self._manager, self._regions = whole, whole.manager, regions
        self._found: list[tuple[nn.Module, Any, GraphedCall]] = []
        self._lock = threading.Lock()
        self._num_decisions = -1
        self._num_quiet = 0
        self._waiting: dict[Any, float] = {}
        self._plain_ms: list[float] = []
        self._pieces_ms: list[float] = []
        whole.around_plain = self
        if regions is None:
            self.descend(whole)
        else:
            regions.activate()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Decided, by another thread or by calls inside this one: nothing is left to do here.
        if self._whole.around_plain is not self or not self._lock.acquire(blocking=False):
            return self._whole.plain(*args, **kwargs)
        try:
            if self._settled():
                return self._sample(args, kwargs)
            with nullcontext() if self._regions is None else self._regions.compiling():
                return self._whole.plain(*args, **kwargs)
        finally:
            self._lock.release()

    def descend(self, into: GraphedCall) -> None:
        """Makes pieces of the modules inside `into`; those that cannot be recorded will be taken apart in turn."""
        for name, child in _parts(into.model, into.name):
            if any(child is module for module, _, _ in self._found):
                continue
            compiled = child._compiled_call_impl
            piece = GraphedCall(
                child,
                compiled or child._call_impl,
                self._manager,
                name=name,
                on_cannot=self.descend if compiled is None else None,
            )
            self._found.append((child, compiled, piece))
            child._compiled_call_impl = piece
        for found in [found for found in self._found if found[2] is into]:
            module, before, _ = found
            module._compiled_call_impl = before
            self._found.remove(found)

    def _settled(self) -> bool:
        num_decisions = len(self._manager.decisions)
        self._num_quiet = self._num_quiet + 1 if num_decisions == self._num_decisions else 0
        self._num_decisions = num_decisions
        return self._num_quiet >= self._manager.terms.first_call + _QUIET_CALLS

    def _sample(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One of the caller's calls, timed: without pieces, and the next of its kind with them."""
        kept = self._manager.pieces()
        if not kept:
            self._decide(False, "no piece is worth a graph")
            return self._whole.plain(*args, **kwargs)
        kind = self._whole.kind_of(args, kwargs)
        result: list[Any] = []
        self._manager.pieces_off = kind not in self._waiting
        try:
            took = self._manager.recorder.milliseconds(lambda: result.append(self._whole.plain(*args, **kwargs)))
        finally:
            self._manager.pieces_off = False
        if kind not in self._waiting:
            self._waiting[kind] = took
            return result[0]
        self._plain_ms.append(self._waiting.pop(kind))
        self._pieces_ms.append(took)
        if len(self._plain_ms) % _PAIRS == 0:
            self._judge(kept)
        return result[0]

    def _judge(self, kept: list[str]) -> None:
        margin = self._manager.terms.min_speedup
        ratio = interval(self._plain_ms, self._pieces_ms)
        timed = Comparison(median(self._plain_ms), median(self._pieces_ms), len(self._plain_ms), speedup=ratio)
        if ratio.low < margin <= ratio.high and len(self._plain_ms) < _PAIRS * _MAX_ROUNDS:
            return
        keep, said = timed.verdict(margin)
        times = {"plain_ms": timed.plain_ms, "replay_ms": timed.replay_ms, "speedup": ratio.middle, "num_samples": timed.num_samples}
        self._decide(keep, f"in {len(kept)} pieces: {said}", pieces=kept, **times)

    def _decide(self, keep: bool, reason: str, **facts: Any) -> None:
        self._whole.around_plain = self._whole.plain
        self._manager.decisions.append({"inputs": "whole call", "captured": keep, "reason": reason, **facts})
        if keep:
            return
        for module, before, piece in self._found:
            module._compiled_call_impl = before
            piece.close()
        if self._regions is not None:
            self._regions.take_away()


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, _CONTAINERS):
            yield from _parts(child, path)
        else:
            yield path, child
