"""The C++ class that replays calls like the last one: what it answers, and what it leaves to Python."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree

from kernel_pytorch.graph import replayer as replayer_module
from kernel_pytorch.graph.placement import HostArguments
from kernel_pytorch.graph.replayer import QuickReplay, replayer_class
from kernel_pytorch.kernels.native import NativeLibrary

Replayer, _why = replayer_class()
pytestmark = pytest.mark.skipif(Replayer is None, reason=f"no C++ replayer: {_why}")

TENSOR = ("tensor",)


class Call:
    """x + 1 of one tensor, `recorded`: as a graph would, from a buffer into an output of its own."""

    def __init__(self) -> None:
        self.x, self.buffer, self.out = torch.arange(6.0).reshape(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)
        self.num_plays = 0
        self.mode = "then"

    def play(self) -> None:
        self.num_plays += 1
        self.out.copy_(self.buffer + 1)

    def replayer(self, **changes: Any) -> Any:
        given: dict[str, Any] = {
            "tensor_types": (torch.Tensor, nn.Parameter),
            "args": ("tuple", [TENSOR]),
            "kwargs": ("dict", [], []),
            "tensors": [self.x],
            "in_place": [],
            "copies": [(0, self.buffer)],
            "host": None,
            "modes": [(lambda name: (name, self.mode), ("a",), ("a", "then"))],
            "code": [],
            "children": [],
            "others": [],
            "addresses": [],
            "empty": [],
            "sizes": [],
            "trained": [],
            "code_first": True,
            "tensors_first": True,
            "play": self.play,
            "outputs": [("clone", self.out)],
            "result": TENSOR,
            "unflatten": None,
            "device": None,
            "last_stream": None,
        }
        made = Replayer()
        made.configure(**{**given, **changes})
        return made


def test_a_call_like_the_last_one_is_replayed_and_its_output_is_a_copy() -> None:
    call = Call()
    replayer = call.replayer()
    first = replayer.run((torch.full((2, 3), 5.0),), {})
    second = replayer.run((call.x,), {})
    assert torch.equal(first, torch.full((2, 3), 6.0))
    assert torch.equal(second, call.x + 1)
    assert call.num_plays == 2
    assert replayer.run((nn.Parameter(call.x),), {}) is not NotImplemented


OTHERS = {
    "another shape": lambda x: ((x[:1],), {}),
    "other strides": lambda x: ((x.t().contiguous().t(),), {}),
    "another dtype": lambda x: ((x.double(),), {}),
    "a lazy negative": lambda x: ((torch.complex(x, x).conj().imag[:, :],), {}),
    "sparse": lambda x: ((x.to_sparse(),), {}),
    "sparse rows": lambda x: ((x.to_sparse_csr(),), {}),
    "nested": lambda x: ((torch.nested.nested_tensor(list(x)),), {}),
    "on no device": lambda x: ((x.to("meta"),), {}),
    "a subclass": lambda x: ((x.as_subclass(type("Mine", (torch.Tensor,), {})),), {}),
    "no tensor": lambda x: ((3,), {}),
    "one more": lambda x: ((x, x), {}),
    "one by name": lambda x: ((x,), {"y": x}),
    "none": lambda x: ((), {}),
    "a list": lambda x: (([x],), {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_are_left_to_python(name: str) -> None:
    call = Call()
    args, kwargs = OTHERS[name](call.x)
    assert call.replayer().run(args, kwargs) is NotImplemented
    assert call.num_plays == 0


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        (1, 1, True),
        (1, True, False),
        (1, 1.0, False),
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        (1j, complex(-0.0, 1), False),
        ("a", "a" * 1, True),
        ("a", "b", False),
        (None, False, False),
        (torch.float32, torch.float32, True),
        (torch.device("cpu"), torch.device("cpu"), True),
        (2**80, 2**80, True),
    ],
)
def test_values_are_told_apart_as_python_tells_them(then: Any, now: Any, expected: bool) -> None:
    call = Call()
    replayer = call.replayer(args=("tuple", [TENSOR, ("value", then)]))
    assert (replayer.run((call.x, now), {}) is not NotImplemented) is expected


def test_structures_are_matched_in_their_order() -> None:
    call = Call()
    args = ("tuple", [("tuple", [("list", [TENSOR]), ("dict", ["a", "b"], [TENSOR, ("value", 2)])])])
    replayer = call.replayer(args=args, kwargs=("dict", ["z"], [TENSOR]), tensors=[call.x] * 3)
    x = call.x
    assert replayer.run((([x], {"a": x, "b": 2}),), {"z": x}) is not NotImplemented
    for wrong in ([[x], {"a": x, "b": 2}], ((x,), {"a": x, "b": 2}), ([x], {"b": 2, "a": x}), ([x], {"a": x, "c": 2}), ([x], {"a": x})):
        assert replayer.run((wrong,), {"z": x}) is NotImplemented
    assert replayer.run((([x], {"a": x, "b": 2}),), {"y": x}) is NotImplemented


def test_an_argument_in_place_must_be_where_it_was() -> None:
    call = Call()
    replayer = call.replayer(in_place=[(0, call.x.data_ptr())], copies=[])
    assert replayer.run((call.x,), {}) is not NotImplemented
    assert replayer.run((call.x.view(2, 3),), {}) is not NotImplemented
    assert replayer.run((call.x.clone(),), {}) is NotImplemented


def test_several_arguments_are_copied_in() -> None:
    call = Call()
    buffers = [torch.zeros(2, 3) for _ in range(2)]
    replayer = call.replayer(args=("tuple", [TENSOR, TENSOR]), tensors=[call.x] * 2, copies=list(enumerate(buffers)))
    replayer.run((call.x, call.x * 2), {})
    assert torch.equal(buffers[0], call.x)
    assert torch.equal(buffers[1], call.x * 2)


def test_outputs_are_copies_objects_arguments_and_views_of_arguments() -> None:
    call = Call()
    marker = object()
    outputs = [("clone", call.out), ("same", marker), ("argument", 0), ("view", 0, (3,), (1,), 3)]
    result = ("dict", ["a", "b"], [("tuple", [TENSOR, TENSOR]), ("list", [TENSOR, TENSOR])])
    found = call.replayer(outputs=outputs, result=result).run((call.x,), {})
    assert list(found) == ["a", "b"]
    assert found["a"][0] is not call.out
    assert found["a"][1] is marker
    assert found["b"][0] is call.x
    assert torch.equal(found["b"][1], call.x[1])
    assert found["b"][1].data_ptr() == call.x[1].data_ptr()
    assert call.replayer(outputs=outputs, result=None, unflatten=len).run((call.x,), {}) == 4


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("what", ["code", "others", "addresses", "empty", "a list", "gone", "sizes"])
def test_a_model_that_is_not_what_it_was_is_left_to_python(what: str, first: bool) -> None:
    call = Call()
    module, hooks, held = nn.Linear(2, 2), {}, [torch.zeros(1)]
    known = module.weight
    slots = [(module._parameters, "weight", known)]
    changes: dict[str, Any] = {"code_first": first, "tensors_first": first}
    changes |= {
        "code": {"code": slots},
        "others": {"others": slots},
        "gone": {"code": slots},
        "sizes": {"children": [(module._modules, [], [])]},
        "a list": {"others": [(held, 0, held[0])]},
        "addresses": {"addresses": [(known, known.data_ptr())]},
        "empty": {"empty": [hooks]},
    }[what]
    replayer = call.replayer(**changes)
    assert replayer.run((call.x,), {}) is not NotImplemented
    assert call.num_plays == 1
    if what in ("code", "others"):
        module.weight = nn.Parameter(known.detach().clone())
    elif what == "gone":
        del module._parameters["weight"]
    elif what == "a list":
        held.clear()
    elif what == "sizes":
        module.more = nn.Identity()
    elif what == "addresses":
        known.data = known.data.clone()
    else:
        hooks[1] = print
    assert replayer.run((call.x,), {}) is NotImplemented
    # Looked at first, nothing is launched; otherwise a replay that does no harm was.
    assert call.num_plays == (1 if first else 2)


@pytest.mark.parametrize("first", [True, False])
def test_submodules_in_another_order_are_left_to_python(first: bool) -> None:
    call = Call()
    model = nn.Sequential(nn.ReLU(), nn.Tanh())
    replayer = call.replayer(children=[(model._modules, list(model._modules), list(model._modules.values()))], code_first=first)
    assert replayer.run((call.x,), {}) is not NotImplemented
    model._modules["0"] = model._modules.pop("0")
    assert replayer.run((call.x,), {}) is NotImplemented
    assert call.num_plays == (1 if first else 2)


def test_tensors_whose_memory_is_exchanged_are_seen() -> None:
    call = Call()
    weight, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    replayer = call.replayer(addresses=[(weight, weight.data_ptr())])
    assert replayer.run((call.x,), {}) is not NotImplemented
    # Raises where somebody but Python holds on to what is exchanged.
    torch.utils.swap_tensors(weight, other)
    assert replayer.run((call.x,), {}) is NotImplemented


def test_a_call_made_inside_of_a_call_and_a_close_in_it_do_no_harm() -> None:
    call = Call()
    found: list[Any] = []

    def play() -> None:
        call.play()
        if call.num_plays == 1:
            found.append(replayer.run((call.x,), {}))
            replayer.close()
            found.append(replayer.run((call.x,), {}))

    replayer = call.replayer(play=play, outputs=[("clone", call.out), ("argument", 0)], result=("tuple", [TENSOR, TENSOR]))
    given = [torch.full((2, 3), 4.0)]
    outer = replayer.run(tuple(given), {})
    assert torch.equal(found[0][0], call.x + 1)
    assert found[1] is NotImplemented
    assert outer[1] is given[0]


def test_what_a_replayer_is_made_of_must_agree() -> None:
    call = Call()
    for changes in ({"in_place": [(1, 0)]}, {"copies": [(-1, call.buffer)]}, {"outputs": [("argument", 7)]}):
        with pytest.raises(IndexError, match="there is no argument"):
            call.replayer(**changes)
    with pytest.raises(ValueError, match="tensors are given"):
        call.replayer(tensors=[])
    with pytest.raises(ValueError, match="places"):
        call.replayer(result=("tuple", [TENSOR, TENSOR]))
    sends = ([(0, 0)], [torch.zeros(24, dtype=torch.uint8)], torch.zeros(24, dtype=torch.uint8), torch.tensor([-1]), [])
    call.replayer(host=sends)
    for at, row, error in [
        (0, [(1, 0)], "there is no argument 1"),
        (0, [(0, 1)], "does not lie in its block"),
        (1, [], "no block"),
        (3, torch.tensor([-1.0]), "not a number on the host"),
        (4, [torch.Event("cpu")] * 2, "each block has an event"),
    ]:
        with pytest.raises((IndexError, ValueError), match=error):
            call.replayer(host=(*sends[:at], row, *sends[at + 1 :]))
    with pytest.raises(TypeError, match="an event was expected"):
        call.replayer(host=(*sends[:4], [1]))
    # One that fails changes nothing.
    replayer = call.replayer()
    with pytest.raises(TypeError, match="missing"):
        replayer.configure()
    assert replayer.run((call.x,), {}) is not NotImplemented


def test_arguments_on_the_host_are_sent_when_they_changed_by_whoever_sees_it(Rerun: Any) -> None:
    scalar, whole = torch.tensor(0.5, dtype=torch.float64), torch.tensor([1, 2])
    host = HostArguments(Rerun(), [scalar, whole], [0, 1])
    out = torch.zeros(2)
    replayer = Call().replayer(
        args=("tuple", [TENSOR, TENSOR]),
        tensors=[scalar, whole],
        copies=[],
        host=(host.rows([scalar, whole]), host.blocks, host.device, host.sent, host.marks),
        play=lambda: out.copy_(host.buffers[0] * host.buffers[1]),
        outputs=[("clone", out)],
    )

    def run() -> list[float]:
        return replayer.run((scalar, whole), {}).tolist()

    assert (run(), int(host.sent)) == ([0.5, 1.0], 0)
    host.send([scalar, whole])
    assert (run(), int(host.sent)) == ([0.5, 1.0], 0)
    whole[1] = 6
    assert (run(), int(host.sent)) == ([0.5, 3.0], 1)
    scalar.fill_(-0.0)
    host.send([scalar, whole])
    assert int(host.sent) == 2
    scalar.fill_(0.0)
    run()
    assert int(host.sent) == 3
    assert not torch.signbit(host.buffers[0])
    for number in range(20):
        whole[0] = number
        scalar.fill_(2.0)
        assert run() == [2.0 * number, 12.0]
    assert int(host.sent) == 7
    host.forget()
    assert (run(), int(host.sent)) == ([38.0, 12.0], 0)
    assert replayer.run((scalar, whole.int()), {}) is NotImplemented
    # The block that follows, by either: the device may still read the one before.
    for number in range(1, 20):
        host.forget()
        host.forget()
        if number % 3:
            run()
        else:
            host.send([scalar, whole])
        assert int(host.sent) == number % 8


def test_what_was_not_sent_to_the_end_is_sent_again(Rerun: Any) -> None:
    class Fails(Rerun):
        fails = False

        def marks(self, number: int) -> list[Any]:
            return [SimpleNamespace(synchronize=lambda: None) for _ in range(number)]

        def put(self, mark: Any) -> None:
            if self.fails:
                raise KeyboardInterrupt

    recorder, scalar = Fails(), torch.tensor(1.0)
    host = HostArguments(recorder, [scalar], [0])
    host.send([scalar])
    recorder.fails = True
    with pytest.raises(KeyboardInterrupt):
        host.send([torch.tensor(2.0)])
    recorder.fails = False
    host.send([scalar])
    assert host.buffers[0].item() == 1.0
    # The block that the device may still read is not the one that was written.
    assert int(host.sent) == 2


def test_arguments_on_the_host_whose_memory_is_not_their_values_are_left_to_python(Rerun: Any) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    for tensor in (matrix.t(), torch.complex(matrix, matrix).conj(), torch.complex(matrix, matrix).conj().imag):
        host = HostArguments(Rerun(), [tensor], [0])
        assert host.rows([tensor]) is None
        host.send([tensor])
        assert torch.equal(host.buffers[0], tensor)


def test_other_modes_are_left_to_python() -> None:
    call = Call()
    replayer = call.replayer()
    call.mode = "now"
    assert replayer.run((call.x,), {}) is NotImplemented
    assert call.num_plays == 0


def test_what_python_raises_comes_through() -> None:
    call = Call()

    def fail() -> None:
        raise ValueError("played wrong")

    with pytest.raises(ValueError, match="played wrong"):
        call.replayer(play=fail).run((call.x,), {})
    with pytest.raises(RuntimeError, match="size"):
        call.replayer(copies=[(0, torch.zeros(5))]).run((call.x,), {})
    with pytest.raises(TypeError, match="args and kwargs"):
        call.replayer().run((call.x,))
    with pytest.raises(TypeError, match="args is missing"):
        Replayer().configure(tensor_types=(torch.Tensor, nn.Parameter))


def test_closed_it_answers_nothing_and_holds_nothing() -> None:
    call = Call()
    replayer = call.replayer()
    memory = weakref.ref(call.buffer)
    replayer.close()
    assert replayer.run((call.x,), {}) is NotImplemented
    del call.buffer
    assert memory() is None
    assert Replayer().run((), {}) is NotImplemented


def test_a_model_that_holds_its_replayer_is_collected_with_it() -> None:
    call = Call()
    module = nn.Linear(2, 2)
    module.replayer = call.replayer(code=[(module._parameters, "weight", module.weight)], play=module.forward)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_what_a_weight_holds_is_collected_with_its_replayer() -> None:
    call = Call()
    module = nn.Linear(2, 2)
    setattr(module.weight, "owner", module)  # noqa: B010 a tensor has no such attribute of its own
    module.replayer = call.replayer(addresses=[(module.weight, module.weight.data_ptr())])
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_references_are_even() -> None:
    import sys

    call = Call()
    marker = ["m"]
    replayer = call.replayer(outputs=[("same", marker), ("argument", 0)], result=("tuple", [TENSOR, TENSOR]))
    before = sys.getrefcount(marker), sys.getrefcount(call.x)
    for _ in range(100):
        replayer.run((call.x,), {})
        replayer.run((call.x, 1), {})
    assert (sys.getrefcount(marker), sys.getrefcount(call.x)) == before


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"y": x + self.weight * scale}


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every call that was put to C++, whether it answered."""
    found: list[bool] = []
    make = QuickReplay.__init__

    def watched(self: QuickReplay, *args: Any) -> None:
        make(self, *args)
        run = self.run

        def noted(*args: Any) -> Any:
            result = run(*args)
            found.append(result is not NotImplemented)
            return result

        self.run = noted

    monkeypatch.setattr(QuickReplay, "__init__", watched)
    return found


@torch.inference_mode()
def test_calls_like_those_before_are_answered_by_cpp_and_counted(wrap: Any, answered: list[bool]) -> None:
    model = Add()
    graphed, recorder = wrap(model)
    xs = [torch.full((4,), float(i)) for i in range(6)]
    for x in xs:
        assert torch.equal(model(x)["y"], x + 1)
    answered.clear()
    for x in xs:
        assert torch.equal(model(x)["y"], x + 1)
    assert answered.count(True) == 6
    assert recorder.num_recorded == 2
    assert graphed.manager.statistics["replays"] == 12
    assert graphed.manager.workload[0]["num_calls"] == graphed.manager.workload[0]["num_replays"] == 12


@torch.inference_mode()
def test_a_changed_model_and_another_kind_of_call_are_not_answered(wrap: Any, answered: list[bool]) -> None:
    model = Add()
    wrap(model)
    x = torch.zeros(4)
    for _ in range(4):
        model(x)
    assert answered[-1]
    assert torch.equal(model(x, 3.0)["y"], torch.full((4,), 3.0))
    model.weight = nn.Parameter(torch.full((4,), 7.0))
    assert torch.equal(model(x)["y"], torch.full((4,), 7.0))
    model.weight.data.add_(1)
    assert torch.equal(model(x)["y"], torch.full((4,), 8.0))
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen
    handle.remove()
    assert torch.equal(model(x)["y"], torch.full((4,), 8.0))


@torch.inference_mode()
def test_a_graph_that_is_given_up_is_not_replayed_and_not_held(wrap: Any, answered: list[bool]) -> None:
    model = Add()
    graphed, _ = wrap(model)
    x = torch.zeros(4)
    for _ in range(4):
        model(x)
    [(_, graph)] = graphed.manager._all()
    memory = weakref.ref(graph._leaves[0])
    del graph
    answered.clear()
    gc.disable()
    try:
        graphed.close()
        assert memory() is None
    finally:
        gc.enable()
    model(x)
    assert not answered[0]


class Mine(torch.Tensor): ...


class Boxed:
    """Takes nothing but tensors, as classes of outputs do."""

    def __init__(self, y: torch.Tensor) -> None:
        self.y, self.size = y, y.shape[0]


_pytree.register_pytree_node(Boxed, lambda boxed: ([boxed.y], None), lambda items, _: Boxed(*items))


class Gives(nn.Module):
    def __init__(self, give: Any) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: torch.Tensor) -> Any:
        return self.give(x + 1)


@torch.inference_mode()
def test_outputs_are_of_the_class_that_they_were(wrap: Any, answered: list[bool]) -> None:
    model = Gives(lambda y: y.as_subclass(Mine))
    _, recorder = wrap(model)
    assert {type(model(torch.zeros(4))) for _ in range(4)} == {Mine}
    assert recorder.num_replays > 1
    assert not answered
    model = Gives(Boxed)
    _, recorder = wrap(model)
    assert all(torch.equal(model(torch.zeros(4)).y, torch.ones(4)) for _ in range(4))
    assert answered[-1]


class ByMode(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if self.training else x + 2


@torch.inference_mode()
def test_graphs_for_other_states_of_a_model_are_not_replayed(wrap: Any, answered: list[bool]) -> None:
    model = ByMode()
    _, recorder = wrap(model)
    x = torch.zeros(4)
    for training in (True, False, True):
        model.train(training)
        for _ in range(4):
            model(x)
        before = recorder.num_replays
        answered.clear()
        for _ in range(4):
            assert torch.equal(model(x), x + (1 if training else 2))
        assert recorder.num_replays - before == 4
        assert answered == [True] * 4
    assert recorder.num_recorded == 2


@torch.inference_mode()
def test_calls_that_are_only_ever_replayed_come_to_cpp(wrap: Any, answered: list[bool]) -> None:
    model = Add()
    graphed, _ = wrap(model)
    x = torch.zeros(4)
    model(x)
    answered.clear()
    for _ in range(2):
        assert graphed.replay((x,), {})[0]
    assert answered == [True]


@torch.inference_mode()
def test_more_kinds_than_are_tried_take_turns(wrap: Any, answered: list[bool]) -> None:
    model = Gives(lambda y: y)
    wrap(model)
    xs = [torch.zeros(size) for size in range(1, 12)]
    for x in [*xs, *xs]:
        model(x)
    answered.clear()
    model(xs[-1])
    assert answered[-1]
    model(xs[0])
    assert not answered[-1]
    model(xs[0])
    assert answered[-1]


class Held(dict):
    """As a library may have it whose weights are not there until they are asked for."""

    given: torch.Tensor | None = None

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key) if self.given is None else self.given


@torch.inference_mode()
def test_weights_in_containers_of_other_classes_are_looked_at_by_python(wrap: Any, answered: list[bool]) -> None:
    model = Add()
    model.__dict__["_parameters"] = Held(model._parameters)
    _, recorder = wrap(model)
    x = torch.zeros(4)
    for _ in range(4):
        model(x)
    assert recorder.num_replays > 1
    assert not answered


@torch.inference_mode()
def test_a_module_where_there_was_none_is_seen_before_the_replay(wrap: Any, answered: list[bool]) -> None:
    model = Add()
    model.register_module("more", None)
    graphed, _ = wrap(model)
    children = graphed._worlds.now.guard.code()[1]
    assert children == [(model._modules, ["more"], [None])]


@torch.inference_mode()
def test_a_graph_that_fails_while_it_is_timed_is_not_held(wrap: Any, Rerun: Any) -> None:
    memory: list[Any] = []

    class Fails(Rerun):
        def record(self, call: Any) -> Any:
            recording = super().record(call)
            memory.append(weakref.ref(recording.output["y"]))
            return recording

        def compare(self, plain: Any, replay: Any, undo: Any, margin: float = 1.0) -> Any:
            replay()
            raise RuntimeError("out of memory")

    model = Add()
    gc.collect()
    gc.disable()
    try:
        graphed, _ = wrap(model, Fails())
        model(torch.zeros(4))
        assert "out of memory" in graphed.decisions[-1]["reason"]
        assert [output() for output in memory] == [None]
    finally:
        gc.enable()


def test_a_damaged_library_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    source = tmp_path / "whole.so"
    built = replayer_module.build(replayer_module._SOURCE, for_python=True).path
    assert built is not None

    def build(*_: Any, **__: Any) -> NativeLibrary:
        if not source.exists():
            source.write_bytes(built.read_bytes() if builds else b"damaged")
            builds.append(1)
        return NativeLibrary(source)

    builds: list[int] = []
    monkeypatch.setattr(replayer_module, "build", build)
    found, why = replayer_class.__wrapped__()
    assert (len(builds), why) == (2, "")
    assert found is not None
    monkeypatch.setattr(replayer_module, "build", lambda *_, **__: NativeLibrary(None, "no compiler"))
    assert replayer_class.__wrapped__() == (None, "no compiler")
