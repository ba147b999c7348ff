"""What changes between two calls, one thing at a time: the next call is the plain call's, and what it writes is too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kernel_pytorch.graph.kinds import modes
from kernel_pytorch.graph.recorder import Recording
from kernel_pytorch.graph.signature import flatten


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.inference_mode():
        yield


class Tape(TorchDispatchMode):
    """The operations of one call, on the memory that they were made on: what a CUDA graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, *(tree_map_only(torch.Tensor, torch.ops.aten.alias, part) for part in (args, kwargs or {}, result))))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture(name="record")
def _record(wrap: Any, Rerun: Any) -> Callable[[nn.Module], Any]:
    """Puts graphs around a model whose replays run no Python of the model, so that stale ones are wrong."""

    class Recorder(Rerun):
        def record(self, call: Callable[[], Any]) -> Recording:
            with Tape() as tape:
                output = call()

            def replay() -> None:
                self.num_replays += 1
                tape.replay()

            return Recording(output, replay)

    return lambda model: wrap(model, Recorder())[0]


class Row(nn.Module):
    """Says which row of the cache is written."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row

    def forward(self, cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache[self.row + 2 * self.training] = x
        return cache.sum(0)


class Equal(Row):
    """Passes for any other module."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


class Decoder(nn.Module):
    """Writes its cache in place, in a row that a submodule decides on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"row": Row(0), "other": nn.Identity()})
        self.after = nn.Sequential(nn.Identity())
        self.register_buffer("bias", torch.zeros(2))
        self.bias: torch.Tensor

    def forward(self, cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.inner["row"](cache, x)) + self.bias


def _swap(model: Decoder) -> None:
    model.inner["row"] = Row(1)


def _swap_by_dict(model: Decoder) -> None:
    model.inner._modules["row"] = Row(1)


def _swap_for_its_equal(model: Decoder) -> None:
    model.inner["row"] = Equal(0)


def _train(model: Decoder) -> None:
    model.inner["row"].train()


def _train_all(model: Decoder) -> None:
    model.train()


def _append(model: Decoder) -> None:
    model.after.append(nn.ReLU())


def _replace_buffer(model: Decoder) -> None:
    model.bias = torch.ones(2)


def _move_buffer(model: Decoder) -> None:
    model.bias.data = torch.ones(2)


def _nothing(model: Decoder) -> None: ...


CHANGES = [_swap, _swap_by_dict, _swap_for_its_equal, _train, _train_all, _append, _replace_buffer, _move_buffer, _nothing]


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_is_written_as_the_changed_model_writes_it(change: Callable[[Decoder], None], record: Any) -> None:
    model, plain = Decoder().eval(), Decoder().eval()
    graphed = record(model)
    cache, expected = torch.zeros(4, 2), torch.zeros(4, 2)
    for step in range(8):
        if step == 3:
            change(model)
            change(plain)
        x = torch.full((2,), step - 5.0)
        assert torch.equal(model(cache, x), plain.forward(expected, x))
        assert torch.equal(cache, expected)
    assert graphed.manager.statistics["replays"] >= 3


class Leaf(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if not self._modules else x + 1


def test_a_module_that_had_no_submodules_is_given_one(record: Any) -> None:
    model = nn.Sequential(Leaf())
    record(model)
    x = torch.zeros(2)
    assert [model(x).tolist() for _ in range(3)] == [[0.0, 0.0]] * 3
    model[0].add_module("new", nn.Identity())
    assert [model(x).tolist() for _ in range(3)] == [[1.0, 1.0]] * 3


def test_a_pure_call_sees_a_module_that_passes_for_the_one_it_replaced(record: Any) -> None:
    class Plus(nn.Module):
        def __init__(self, number: float) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.number

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Plus)

        def __hash__(self) -> int:
            return 1

    model = nn.Sequential(Plus(1.0))
    record(model)
    x = torch.zeros(1)
    assert [model(x).item() for _ in range(3)] == [1.0] * 3
    model[0] = Plus(2.0)
    assert [model(x).item() for _ in range(3)] == [2.0] * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_submodule_is_looked_at_too(record: Any) -> None:
    """It keeps its mode in C++."""
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Dropout(1.0))), nn.ReLU()).eval()
    graphed = record(model)
    x = torch.ones(2)
    assert [model(x).tolist() for _ in range(3)] == [[1.0, 1.0]] * 3
    model[0].train()
    assert [model(x).tolist() for _ in range(3)] == [[0.0, 0.0]] * 3
    assert graphed.manager.statistics["replays"] >= 2


class Cached(nn.Module):
    def forward(self, cache: Any, x: torch.Tensor) -> torch.Tensor:
        for row in cache:
            for tensor in row:
                tensor[0] = x
        return x * 2


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.t_(),
        lambda t: t.resize_(2, 3),
        lambda t: t.set_(torch.full((3, 3), 7.0)),
        lambda t: t.set_(t.untyped_storage(), 3, (2, 3), (3, 1)),
    ],
)
def test_a_cache_that_was_changed_in_place_is_written_where_it_now_is(which: int, change: Callable[..., Any], record: Any) -> None:
    model = Cached()
    graphed = record(model)
    cache = tuple((torch.zeros(3, 3), torch.zeros(3, 3)) for _ in range(3))
    x = torch.arange(1.0, 4.0)
    for _ in range(4):
        model(cache, x)
    assert graphed.manager.statistics["replays"] >= 3
    tensor = cache[2][which]
    change(tensor)
    expected = tensor.clone()
    for value in (4.0, 5.0):
        x = torch.full((tensor.shape[1],) if which else (1,), value)
        model(cache, x)
        expected[0] = x
        assert torch.equal(tensor, expected)


def test_caches_of_equal_tensors_in_another_structure_are_another_kind() -> None:
    a, b, c, d = torch.zeros(4, 2).unbind()
    calls: list[tuple[Any, ...]] = [
        (((a, b), (c, d)),),
        (((a, b), [c, d]),),
        (([a, b], [c, d]),),
        ([(a, b), (c, d)],),
        (((a,), (b, c, d)),),
        (((a, b, c), (d,)),),
        (((a, b, c, d),),),
        (((a,), (b,), (c,), (d,)),),
        ((a, b, c, d),),
        ((a, b), (c, d)),
        (a, b, c, d),
        (((a, b), c, d),),
        (((a, b), (c, d), ()),),
        ((((a, b), (c, d)),),),
        ((((a,), (b,)), ((c,), (d,))),),
    ]
    forms = []
    for call in calls:
        flat = flatten(call, {})
        assert flat is not None
        assert [id(tensor) for tensor in flat[1]] == [id(tensor) for tensor in (a, b, c, d)]
        forms.append(flat[0])
    assert len(set(forms)) == len(calls)


def test_values_beside_the_tensors_of_a_cache_tell_calls_apart() -> None:
    a, b = torch.zeros(2, 2).unbind()
    calls: list[tuple[Any, ...]] = [
        (((a, 1), (b, 1)),),
        (((a, 1), (b, 2)),),
        (((a, 1), (b, True)),),
        (((a, None), (b, None)),),
        (((1, a), (1, b)),),
        (((1, 2), (3, 4)),),
        (((1, 2), (4, 3)),),
        (((a, b), (1, 2)),),
        (((1, 2), (a, b)),),
    ]
    flats = [flatten(call, {}) for call in calls]
    assert all(flat is not None and all(type(tensor) is torch.Tensor for tensor in flat[1]) for flat in flats)
    assert len({flat[0] for flat in flats if flat is not None}) == len(calls)


MODES: list[tuple[Callable[[Any], Any], Any, Any]] = [
    (torch.set_default_dtype, torch.float64, torch.float32),
    (torch.use_deterministic_algorithms, True, False),
    (torch.backends.cuda.enable_math_sdp, False, True),
    (torch.backends.cuda.enable_flash_sdp, False, True),
    (torch.backends.cuda.enable_mem_efficient_sdp, False, True),
    (torch.backends.cuda.enable_cudnn_sdp, False, True),
    (torch.set_float32_matmul_precision, "high", "highest"),
    (lambda value: setattr(torch.backends.cudnn.conv, "fp32_precision", value), "ieee", "tf32"),
]


@pytest.mark.parametrize(("put", "other", "usual"), MODES)
def test_every_mode_is_read_in_every_call(put: Callable[[Any], Any], other: Any, usual: Any) -> None:
    put(usual)
    before = modes()
    put(other)
    within = modes()
    put(usual)
    assert before != within
    assert modes() == before


def test_autocast_to_another_type_is_another_mode() -> None:
    seen = []
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        for dtype in (torch.float16, torch.bfloat16):
            torch.set_autocast_dtype("cuda", dtype)
            seen.append(modes())
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
    assert len({modes(), *seen}) == 3


def test_a_mode_of_one_thread_is_not_anothers(record: Any) -> None:
    """Grad mode and inference mode are the caller's own: what one thread's call was decided by is not looked up in another's."""

    class Seen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + float(torch.is_inference_mode_enabled())

    model = Seen()
    record(model)
    found: list[float] = []

    def work() -> None:
        with torch.no_grad():
            found.extend(model(torch.zeros(1)).item() for _ in range(3))

    for _ in range(2):
        assert [model(torch.zeros(1)).item() for _ in range(3)] == [1.0] * 3
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [0.0] * 6


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 2), (0, 1, 2), ()])
def test_any_argument_may_move_and_come_back(moving: tuple[int, ...], record: Any) -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return x + 10 * y + 100 * z

    model = Sum()
    graphed = record(model)
    first = [torch.full((1,), float(i)) for i in range(3)]
    for step in range(9):
        args = [torch.full((1,), float(step + i)) if i in moving and step < 6 else first[i] for i in range(3)]
        assert model(*args).item() == sum(args[i].item() * 10**i for i in range(3))
    assert graphed.manager.statistics["replays"] >= 6
