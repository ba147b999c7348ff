"""Graphs do not hold what they copy out. Here memory of the pool is a tensor that the test holds, seen by its address."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

from kernel_pytorch.graph import outputs
from kernel_pytorch.graph.outputs import LetGo, held, in_pool
from kernel_pytorch.graph.recorder import Recording

pytestmark = pytest.mark.usefixtures("both_ways")


POOL = (0, 1)


def seen(address: int, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


def by_address(tensors: Sequence[torch.Tensor]) -> LetGo:
    views = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        data = seen(storage.data_ptr(), storage.nbytes())
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


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Host memory, which a snapshot that is made up says to be a pool's."""
    segments: list[dict[str, Any]] = [{"address": 16, "total_size": 16, "segment_pool_id": POOL}]
    as_tensor = torch.as_tensor

    def of_bytes(data: Any, **words: Any) -> torch.Tensor:
        if not isinstance(data, outputs._Bytes):
            return as_tensor(data, **words)
        told = data.__cuda_array_interface__
        return seen(told["data"][0], told["shape"][0])

    monkeypatch.setattr(torch, "as_tensor", of_bytes)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    return segments


def pooled(pool: list[dict[str, Any]], *tensors: torch.Tensor) -> LetGo:
    pool += [{"address": tensor.data_ptr(), "total_size": tensor.nbytes, "segment_pool_id": POOL} for tensor in tensors]
    return in_pool(POOL, tensors)


def test_tensors_of_the_pool_are_seen_and_others_are_held(pool: Any) -> None:
    x, y = torch.arange(300.0), torch.arange(300.0)
    let_go = pooled(pool, x)
    (view,) = let_go.tensors
    assert (view.data_ptr(), view.untyped_storage()._cdata == x.untyped_storage()._cdata) == (x.data_ptr(), False)
    assert torch.equal(view, x)
    # 1,200 bytes in blocks of 512.
    assert let_go.num_bytes == 1536
    assert in_pool(POOL, [y]).tensors[0] is y
    assert in_pool((0, 2), [x]).tensors[0] is x


@pytest.mark.parametrize(
    "make",
    [
        lambda: TwoTensor(torch.ones(3), torch.ones(3)),
        lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged),
        lambda: torch.eye(3).to_sparse(),
    ],
    ids=["subclass", "nested", "sparse"],
)
def test_what_has_no_memory_of_its_own_is_held(pool: Any, make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    assert in_pool(POOL, [tensor]).tensors[0] is tensor


def test_memory_that_a_held_view_keeps_is_not_counted_as_free(pool: Any) -> None:
    z = torch.ones(1024, dtype=torch.complex64)
    let_go = pooled(pool, z, z.conj())
    assert let_go.tensors[1].untyped_storage()._cdata == z.untyped_storage()._cdata
    assert let_go.num_bytes == 0


def test_an_allocator_that_does_not_say_whose_memory_is_whose_keeps_outputs_held(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", None)
    x = torch.ones(3)
    assert in_pool(POOL, [x]).tensors[0] is x
