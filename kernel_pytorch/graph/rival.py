"""The eager code of a compiled model as a rival: in a graph, which launches nothing one by one, it may be the faster of the two."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from kernel_pytorch.graph.analysis import WorkloadAnalysis
from kernel_pytorch.graph.captured import Graph
from kernel_pytorch.graph.failures import CALL_ERRORS, first_line
from kernel_pytorch.graph.kinds import Kind
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.placement import relative_l2
from kernel_pytorch.stance import eager_code

# What it must win by, whatever less is asked of a replay; and what it loses by before it is not tried again.
_MARGIN, _CLEAR_LOSS = 1.02, 1.25


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile stands around the model's call, or around a part of it."""
    return any(module._compiled_call_impl is not None or isinstance(module, OptimizedModule) for module in model.modules())


@dataclass(frozen=True)
class Arms:
    """What a trial does with its call, by the code that is switched on.

    kind: of call. record(): a graph of it. call(): copies of what it returns, and then of the num_written storages that it writes.
    replay(graph): the same of a graph. rehearse(graph): a replay for timing. restore(): puts written memory back; undo():
    random state too. draws: the call draws random numbers. tolerance: relative L2 error that rounding explains."""

    kind: Kind
    record: Callable[[], Graph]
    call: Callable[[], list[Any]]
    replay: Callable[[Graph], list[Any]]
    rehearse: Callable[[Graph], Any]
    restore: Callable[[], None]
    undo: Callable[[], None]
    num_written: int
    draws: bool
    tolerance: float


class EagerRival:
    """One for a compiled model: a kind of call whose graph of compiled code is worth it gets another one of eager code, and the
    faster one stays. Code that is clearly slower, or cannot be recorded, is not tried for further kinds."""

    def __init__(self, manager: CUDAGraphManager) -> None:
        self._manager = manager
        self._given_up: str | None = None

    def better_of(self, compiled: Graph, arms: Arms, analysis: WorkloadAnalysis) -> Graph:
        """The graph to keep: `compiled`, which stays open either way, or one of eager code. `analysis` says which, and why."""
        analysis.code, analysis.code_reason = "compiled", self._given_up
        if arms.draws:
            analysis.code_reason = "eager code draws other random numbers, so that nothing can be compared"
        if analysis.code_reason is not None:
            return compiled
        eager: Graph | None = None
        try:
            with eager_code():
                eager = arms.record()
            analysis.code_reason = self._refused(compiled, eager, arms, analysis) or self._timed(compiled, eager, arms, analysis)
        except CALL_ERRORS as error:
            analysis.code_reason = f"the eager code cannot be recorded: {first_line(error)}"
            self._given_up = f"not tried again: {analysis.code_reason}"
        finally:
            if eager is not None and analysis.code != "eager":
                eager.close()
        return eager if eager is not None and analysis.code == "eager" else compiled

    def _refused(self, compiled: Graph, eager: Graph, arms: Arms, analysis: WorkloadAnalysis) -> str | None:
        """Why the graph of eager code must not stand for the call. Its replay is compared with the eager call, in everything, and
        with the compiled one, in what that returns: of written memory only the bytes are known, which roundings change."""
        if not self._manager.has_room(eager):
            return f"the budget of {self._manager.budget_bytes} bytes has no room for the eager code"
        arms.undo()
        expected = arms.call()
        with eager_code():
            own = arms.call()
        found = arms.replay(eager)
        # Before anything is put back: what was written is compared where it is.
        if eager.spec != compiled.spec or list(map(_layout, own)) != list(map(_layout, expected)):
            return "the eager code's outputs are of other shapes, or laid out otherwise"
        if relative_l2(found, own) is None:
            error = relative_l2(found, own, math.inf)
            by = "" if error is None else f": relative L2 error {error:.2g}"
            return f"a replay of the eager code is not what the eager call is{by}"
        num_outputs = len(expected) - arms.num_written
        analysis.eager_relative_l2 = relative_l2(found[:num_outputs], expected[:num_outputs], arms.tolerance)
        return "the eager code's outputs are others than roundings explain" if analysis.eager_relative_l2 is None else None

    def _timed(self, compiled: Graph, eager: Graph, arms: Arms, analysis: WorkloadAnalysis) -> str:
        """Times both and says how they compare."""
        arms.undo()
        margin = max(self._manager.terms.min_speedup, _MARGIN)
        with self._manager.uncounted(arms.kind):
            timed = self._manager.recorder.compare(lambda: arms.rehearse(compiled), lambda: arms.rehearse(eager), arms.restore, margin)
        analysis.compiled_replay_ms, analysis.eager_replay_ms = timed.plain_ms, timed.replay_ms
        said = f"the eager code's replay has {timed.plain_ms / timed.replay_ms:.3f} times the speed of the compiled code's"
        wins, but = timed.is_surely(margin)
        if wins:
            analysis.code = "eager"
        elif timed.replay_ms > _CLEAR_LOSS * timed.plain_ms:
            self._given_up = f"not tried again: for {arms.kind.row['inputs']} {said}"
        return "; ".join(filter(None, [said, f"{margin:g} asked for", but]))


def _layout(leaf: Any) -> Any:
    """Shape and strides, of dims that have more than one element."""
    return [dim for dim in zip(leaf.shape, leaf.stride(), strict=True) if dim[0] != 1] if isinstance(leaf, torch.Tensor) else None
