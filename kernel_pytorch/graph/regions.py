"""The regions of a compiled call as pieces, where graph breaks part it: each is what Inductor made of one traced graph.

torch 2.13 asks `torch._inductor.config.cudagraph_policy` about every compiled graph. The policy here puts a callable of ours
around each, which does nothing until the whole call was refused. Older versions have no such setting: there, a compiled call
that cannot be recorded as a whole stays as it is. Inductor's own CUDA graphs stay off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch._inductor.config as inductor_config
from torch import nn

from kernel_pytorch.graph.graphed_call import GraphedCall
from kernel_pytorch.graph.manager import CUDAGraphManager


def policy_exists() -> bool:
    return hasattr(inductor_config, "cudagraph_policy")


class Region:
    """One compiled graph. Called as Inductor calls: with a list of inputs, weights among them."""

    def __init__(self, compiled: Callable[[list[Any]], Any], written: Sequence[int], name: str, manager: CUDAGraphManager) -> None:
        self._compiled = compiled
        # No module: what a compiled graph reads are its inputs, and what changes in a model Dynamo has looked at.
        self.graphed = GraphedCall(nn.Module(), self._plain, manager, name=name, writes=tuple(written))
        self.active = False

    def _plain(self, *inputs: Any) -> Any:
        return self._compiled(list(inputs))

    def __call__(self, inputs: list[Any]) -> Any:
        return self.graphed(*inputs) if self.active else self._compiled(inputs)


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
            region.graphed.close()

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
        region = Region(compiled, sorted(code.mutated_input_idxs), f"region {len(self._regions)}", self._manager)
        region.active = self._active
        self._regions.append(region)
        code.current_callable = region
