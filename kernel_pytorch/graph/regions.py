"""The regions of a compiled call as pieces, where graph breaks part it: each is what Inductor made of one traced graph.

torch 2.13 asks `torch._inductor.config.cudagraph_policy` about every compiled graph. The policy here puts a callable of ours
around each, which does nothing until the whole call was refused. Older versions have no such setting: there, a compiled call
that cannot be recorded as a whole stays as it is. Inductor's own CUDA graphs stay off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import nn

from kernel_pytorch.graph.graphed_call import GraphedCall
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.signature import at_addresses, pointers

# Times that a region may find its weights elsewhere before it is left to Inductor alone.
_MAX_BOUND = 4


def policy_exists() -> bool:
    return hasattr(inductor_config, "cudagraph_policy")


class Region:
    """One compiled graph. Called as Inductor calls: with a list of inputs, weights among them.

    fixed: tensors that stay where they are, as Inductor says, and are not written to. They are no arguments of the recorded call:
    they are compared by address, and when they are elsewhere, what was recorded is dropped. written: inputs that the graph
    writes to."""

    def __init__(
        self,
        compiled: Callable[[list[Any]], Any],
        fixed: Sequence[int],
        written: Sequence[int],
        name: str,
        manager: CUDAGraphManager,
    ) -> None:
        self._compiled, self._manager, self.name = compiled, manager, name
        self._fixed, self._written = list(fixed), list(written)
        self._graphed: GraphedCall | None = None
        self._num_bound = 0
        self.active = False

    def __call__(self, inputs: list[Any]) -> Any:
        # Inside a trial or a replay, this thread's maybe: dropping graphs would wait for it.
        if not self.active or self._manager.lock.locked():
            return self._compiled(inputs)
        weights = [inputs[i] for i in self._fixed]
        if self._graphed is None or not at_addresses(weights, self._addresses, self._all):
            if self._num_bound >= _MAX_BOUND:
                return self._compiled(inputs)
            self._bind(inputs, weights)
        assert self._graphed is not None
        return self._graphed(*[inputs[i] for i in self._others])

    def _bind(self, inputs: list[Any], weights: list[torch.Tensor]) -> None:
        self.close()
        self._num_bound += 1
        if not all(isinstance(weight, torch.Tensor) for weight in weights):
            self._fixed = [i for i in self._fixed if isinstance(inputs[i], torch.Tensor)]
            weights = [inputs[i] for i in self._fixed]
        self._addresses, self._all = pointers(weights), list(range(len(weights)))
        self._others = [i for i in range(len(inputs)) if i not in self._fixed]
        held = dict(zip(self._fixed, weights, strict=True))
        num_inputs = len(inputs)

        def plain(*others: Any) -> Any:
            given = held | dict(zip(self._others, others, strict=True))
            return self._compiled([given[i] for i in range(num_inputs)])

        # No module: what a compiled graph reads are its inputs, and what changes in a model Dynamo has looked at.
        writes = tuple(self._others.index(i) for i in self._written)
        self._graphed = GraphedCall(nn.Module(), plain, self._manager, name=self.name, writes=writes)

    def close(self) -> None:
        if self._graphed is not None:
            self._graphed.close()
        self._graphed = None


class Regions:
    """Every region that was compiled while `compiling()` was entered."""

    def __init__(self, manager: CUDAGraphManager) -> None:
        self._manager = manager
        self._regions: list[Region] = []
        self._active = False
        self._policy = self._make_policy() if policy_exists() else None

    def compiling(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._policy is None else inductor_config.patch(cudagraph_policy=self._policy)

    def activate(self) -> None:
        self._active = True
        for region in self._regions:
            region.active = True

    def take_away(self) -> None:
        self._active = False
        for region in self._regions:
            region.active = False
            region.close()

    def _make_policy(self) -> Any:
        from torch._inductor.cudagraph_utils import CUDAGraphPolicy
        from torch._inductor.output_code import CompiledFxGraph

        wrap = self._wrap

        class Policy(CUDAGraphPolicy):
            def wrap_output(self, output_code: Any) -> Any:
                if isinstance(output_code, CompiledFxGraph):
                    wrap(output_code)
                return output_code

        return Policy()

    def _wrap(self, code: Any) -> None:
        compiled = code.current_callable
        on_device = set(code.device_types) == {self._manager.recorder.device.type}
        if compiled is None or isinstance(compiled, Region) or not on_device:
            return
        fixed = [i for i in code.fx_kwargs.get("static_input_idxs") or () if i not in code.mutated_input_idxs]
        region = Region(compiled, fixed, sorted(code.mutated_input_idxs), f"region {len(self._regions)}", self._manager)
        region.active = self._active
        self._regions.append(region)
        code.current_callable = region
