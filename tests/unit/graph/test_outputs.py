"""Graphs do not hold what they copy out. Here memory of the pool is a tensor that the test holds, seen by its address."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from kernel_pytorch.graph.outputs import LetGo, held
from kernel_pytorch.graph.recorder import Recording

pytestmark = pytest.mark.usefixtures("both_ways")


def by_address(tensors: Sequence[torch.Tensor]) -> LetGo:
    views = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        data = torch.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), dtype=torch.uint8)
        view = torch.empty(0, dtype=tensor.dtype)
        views.append(view.set_(data.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()))
    return LetGo(views, sum(tensor.nbytes for tensor in tensors))


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        y = x * 2
        return {"y": y, "tail": y[1:]}


@torch.inference_mode()
def test_what_is_copied_out_is_not_held(wrap: Any, Rerun: Any) -> None:
    pool: list[torch.Tensor] = []
    recorded: list[Any] = []

    class Pooled(Rerun):
        def record(self, call: Callable[[], Any]) -> Recording:
            recording = super().record(call)
            # Their memory, as a pool keeps it: the tensors that the call made are another matter.
            outputs = tree_leaves(recording.output)
            pool.extend(outputs)
            fresh = {name: leaf[:] for name, leaf in recording.output.items()}
            recorded.extend(weakref.ref(leaf) for leaf in fresh.values())
            return Recording(fresh, recording.replay, 1000, 1000, by_address)

    model = Pair()
    graphed, recorder = wrap(model, Pooled())
    x = torch.arange(8.0)
    kept = [model(x) for _ in range(4)]
    assert recorder.num_recorded == 1
    assert [leaf() for leaf in recorded] == [None, None]
    # y has 32 bytes, its tail 28.
    assert graphed.manager.statistics["held_bytes"] == 1000
    assert (graphed.decisions[0]["held_bytes"], graphed.decisions[0]["pool_bytes"]) == (940, 1000)
    for tensor in pool:
        tensor.fill_(-1)
    assert all(torch.equal(out["y"], 2 * x) and torch.equal(out["tail"], 2 * x[1:]) for out in kept)
    again = model(x)
    assert torch.equal(again["y"], 2 * x)
    assert torch.equal(again["tail"], 2 * x[1:])


def test_held_gives_what_it_was_given() -> None:
    x = torch.ones(3)
    assert held((x,)).tensors[0] is x
    assert held((x,)).num_bytes == 0
