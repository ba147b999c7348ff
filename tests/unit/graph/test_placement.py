"""Tensors on the host that a graph would trip over: arguments are sent, a model's own are moved once, values are never frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.graph import trial
from kernel_pytorch.graph.placement import HostArguments, relative_l2


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.inference_mode():
        yield


class Select(nn.Module):
    def forward(self, x: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x[:, columns] * scale


def test_arguments_on_the_host_are_sent_when_they_changed(wrap: Any, Rerun: Any) -> None:
    model, recorder = Select(), Rerun()
    graphed, _ = wrap(model, recorder)
    x = torch.arange(8.0).reshape(2, 4)
    columns, scale = torch.tensor([0, 2]), torch.tensor(2.0)
    recorder.put_elsewhere(columns, scale)
    assert model(x, columns, scale).tolist() == [[0.0, 4.0], [8.0, 12.0]]
    assert recorder.num_recorded == 1
    columns.copy_(torch.tensor([3, 1]))
    assert model(x, columns, scale).tolist() == [[6.0, 2.0], [14.0, 10.0]]
    scale.fill_(-1.0)
    assert model(x, columns, scale).tolist() == [[-3.0, -1.0], [-7.0, -5.0]]
    others = torch.tensor([1, 1]), torch.tensor(10.0)
    recorder.put_elsewhere(*others)
    assert model(x, *others).tolist() == [[10.0, 10.0], [50.0, 50.0]]
    decision = graphed.decisions[0]
    assert (recorder.num_recorded, decision["captured"], decision["copied_bytes"]) == (1, True, 20)
    assert decision["placement_relative_l2"] == 0.0


def test_zero_with_another_sign_is_another_value(Rerun: Any) -> None:
    scalar, whole = torch.tensor(0.0), torch.tensor([1, 2])
    host = HostArguments(Rerun(), [scalar, whole], [0, 1])
    host.send([scalar, whole])
    scalar.copy_(torch.tensor(-0.0))
    host.send([scalar, whole])
    assert torch.signbit(host.buffers[0]).item()
    whole[1] = 7
    for _ in range(20):
        host.send([scalar, whole])
    assert host.buffers[1].tolist() == [1, 7]


class Reads(nn.Module):
    """Needs the value of an argument on the host, as a slice's length."""

    def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return x[: length.item()] + 1  # pyright: ignore[reportArgumentType]


def test_a_value_that_python_reads_gets_a_graph_of_its_own(wrap: Any, Rerun: Any) -> None:
    model, recorder = Reads(), Rerun()
    graphed, _ = wrap(model, recorder)
    x = torch.zeros(4)
    lengths = [torch.tensor(value) for value in (2, 3, 2)]
    recorder.put_elsewhere(*lengths)
    assert [model(x, length).tolist() for length in lengths] == [[1.0] * 2, [1.0] * 3, [1.0] * 2]
    assert recorder.num_recorded == 2
    lengths[0].fill_(4)
    assert model(x, lengths[0]).tolist() == [1.0] * 4
    assert [decision["captured"] for decision in graphed.decisions] == [True, True, False]


class Adds(nn.Module):
    def forward(self, x: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        far.add_(1)
        return x + far


def test_an_argument_on_the_host_that_is_written_to_is_never_stood_in_for(wrap: Any, Rerun: Any) -> None:
    model, recorder = Adds(), Rerun()
    wrap(model, recorder)
    x, far = torch.zeros(2), torch.zeros(2)
    recorder.put_elsewhere(far)
    assert [model(x, far).tolist() for _ in range(3)] == [[1.0] * 2, [2.0] * 2, [3.0] * 2]
    assert far.tolist() == [3.0, 3.0]


def test_a_large_argument_on_the_host_goes_straight_through(wrap: Any, Rerun: Any) -> None:
    class Plus(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model, recorder = Plus(), Rerun()
    graphed, _ = wrap(model, recorder)
    x = torch.zeros(2**15)
    recorder.put_elsewhere(x)
    assert model(x)[0].item() == 1.0
    assert (recorder.num_recorded, graphed.decisions[0]["reason"]) == (0, "an argument of 131072 bytes is on cpu")


def test_what_is_timed_after_a_move_is_a_replay_every_time(wrap: Any, Rerun: Any) -> None:
    class Often(Rerun):
        def compare(self, plain: Any, replay: Any, undo: Any, margin: float = 1.0) -> Any:
            for number in range(5):
                before = self.num_replays
                replay()
                undo()
                assert self.num_replays == before + 1, number
            return super().compare(plain, replay, undo, margin)

    class Counts(Pairs):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.shift.add_(1)
            return x[self.index] * self.scale

    for model in (Pairs(), Counts()):
        recorder = Often()
        recorder.put_elsewhere(model.index, model.scale)
        graphed, _ = wrap(model, recorder)
        for _ in range(3):
            model(torch.tensor([1.0, 2.0]))
        assert [decision["captured"] for decision in graphed.decisions] == [True, True], graphed.decisions


def test_a_view_of_an_argument_on_the_host_is_of_that_argument(wrap: Any, Rerun: Any) -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
            return x * a[0] * b[0], a[:1]

    recorder, model = Rerun(), Both()
    graphed, _ = wrap(model, recorder)
    x, table = torch.ones(2), torch.ones(64)
    a, b = table[4:6], table[40:42]
    recorder.put_elsewhere(table)
    for value in (1.0, 2.0, 3.0):
        a[0] = value
        assert [out[0].item() for out in model(x, a, b)] == [value] * 2
    assert graphed.manager.statistics["replays"] == 3


def test_what_is_timed_sends_arguments_on_the_host_every_time(wrap: Any, Rerun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []

    class Remembers(HostArguments):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            sent.append(self.device)

    class Spoils(Rerun):
        def compare(self, plain: Any, replay: Any, undo: Any, margin: float = 1.0) -> Any:
            for _ in range(3):
                sent[-1].zero_()
                assert replay().tolist() == [[0.0, 4.0], [8.0, 12.0]]
            return super().compare(plain, replay, undo, margin)

        def milliseconds(self, call: Any, num_calls: int = 1) -> float:
            sent[-1].zero_()
            call()
            assert sent[-1].any(), "what copying in takes is timed of a call that sends"
            return super().milliseconds(call, num_calls)

    monkeypatch.setattr(trial, "HostArguments", Remembers)
    recorder, model = Spoils(), Select()
    wrap(model, recorder)
    columns, scale = torch.tensor([0, 2]), torch.tensor(2.0)
    recorder.put_elsewhere(columns, scale)
    for _ in range(2):
        assert model(torch.arange(8.0).reshape(2, 4), columns, scale).tolist() == [[0.0, 4.0], [8.0, 12.0]]
    assert len(sent) == 2


class Pairs(nn.Module):
    """An index, a buffer and a scalar on the host, as a constructor leaves them."""

    def __init__(self) -> None:
        super().__init__()
        self.index = torch.tensor([1, 0])
        self.register_buffer("shift", torch.tensor([10.0, 20.0]))
        self.shift: torch.Tensor
        self.scale = torch.tensor(3.0)
        self.unread = torch.tensor(5.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.index] * self.scale + self.shift


def test_what_a_model_holds_on_the_host_is_moved_once(wrap: Any, Rerun: Any) -> None:
    model, recorder = Pairs(), Rerun()
    before = [model.index, model.shift, model.scale, model.unread]
    recorder.put_elsewhere(*before)
    graphed, _ = wrap(model, recorder)
    x = torch.tensor([1.0, 2.0])
    assert [model(x).tolist() for _ in range(2)] == [[16.0, 23.0]] * 2
    now = [model.index, model.shift, model.scale, model.unread]
    assert [old is new for old, new in zip(before, now, strict=True)] == [False, False, False, True]
    assert not any(recorder.is_elsewhere(tensor) for tensor in now[:3])
    assert list(model.state_dict()) == ["shift"]
    # What the caller may hold is what it was.
    assert [tensor.tolist() for tensor in before[:3]] == [[1, 0], [10.0, 20.0], 3.0]
    replays = recorder.num_replays
    model.scale.fill_(1.0)
    assert model(x).tolist() == [12.0, 21.0]
    assert (recorder.num_recorded, recorder.num_replays) == (1, replays + 1)
    assert [decision["captured"] for decision in graphed.decisions] == [True]


class Steps(nn.Module):
    """Python reads a number that the model holds on the host: it must stay there."""

    def __init__(self) -> None:
        super().__init__()
        self.num = torch.tensor(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(int(self.num)):
            x = x + 1
        return x


def test_a_number_that_python_reads_stays_and_its_value_is_watched(wrap: Any, Rerun: Any) -> None:
    model, recorder = Steps(), Rerun()
    number = model.num
    recorder.put_elsewhere(number)
    graphed, _ = wrap(model, recorder)
    x = torch.zeros(2)
    assert [model(x).tolist() for _ in range(2)] == [[2.0, 2.0]] * 2
    assert model.num is number
    assert recorder.num_recorded == 1
    number.fill_(5)
    assert model(x).tolist() == [5.0, 5.0]
    number.fill_(2)
    assert model(x).tolist() == [2.0, 2.0]
    # Back to a value that a graph is there for.
    assert recorder.num_recorded == 2
    assert graphed.decisions[1]["reason"] == "graphs set aside: a tensor that the model holds on the host has another value"


def test_other_outputs_than_before_put_everything_back(wrap: Any, Rerun: Any) -> None:
    class Wrong(Rerun):
        def place(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + 1

    model, recorder = Pairs(), Wrong()
    scale = model.scale
    recorder.put_elsewhere(scale)
    wrap(model, recorder)
    x = torch.tensor([1.0, 2.0])
    assert [model(x).tolist() for _ in range(3)] == [[16.0, 23.0]] * 3
    assert model.scale is scale


def test_outputs_may_differ_by_roundings_only() -> None:
    exact = torch.linspace(1, 2, 100)
    assert relative_l2([exact], [exact.clone()]) == 0.0
    by_one_rounding = relative_l2([exact * (1 + 2e-7)], [exact])
    assert by_one_rounding is not None
    assert 0 < by_one_rounding < 3e-7
    assert relative_l2([exact * 1.00001], [exact]) is None
    assert relative_l2([exact.bfloat16()], [exact]) is None
    assert relative_l2([torch.tensor([1, 2])], [torch.tensor([1, 3])]) is None
    assert relative_l2([exact * 1.001], [exact], allowed=1e-2) == pytest.approx(1e-3, rel=1e-3)
    assert relative_l2([exact * 1.02], [exact], allowed=1e-2) is None


def test_a_number_on_the_host_is_sent_when_any_bit_of_it_changed(Rerun: Any) -> None:
    nans = torch.tensor([0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)
    scalar = nans[0].clone()
    host = HostArguments(Rerun(), [scalar], [0])
    host.send([scalar])
    scalar.copy_(nans[1])
    host.send([scalar])
    assert torch.equal(host.buffers[0].view(torch.int32), scalar.view(torch.int32))
    # Packed numbers have no value that Python could look at.
    packed = torch.zeros(1, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    host = HostArguments(Rerun(), [packed], [0])
    for _ in range(2):
        host.send([packed])
    assert int(host.sent) == 0


@pytest.mark.parametrize(
    ("found", "expected"), [([0.0], [-0.0]), ([torch.inf, 0.0], [torch.inf, -0.0]), ([torch.nan, 0.0], [torch.nan, -0.0])]
)
def test_a_zero_of_another_sign_is_not_another_output(found: list[float], expected: list[float]) -> None:
    assert relative_l2([torch.tensor(found)], [torch.tensor(expected)]) == 0.0
    assert relative_l2([torch.tensor([*found, 1e-30])], [torch.tensor([*expected, 0.0])]) is None


def test_an_infinity_hides_no_difference() -> None:
    exact = torch.tensor([1.0, -torch.inf, torch.nan, 2.0])
    assert relative_l2([exact * (1 + 2e-7)], [exact]) == pytest.approx(2e-7, abs=1e-7)
    assert relative_l2([torch.tensor([9.0, -torch.inf, torch.nan, 2.0])], [exact]) is None
    assert relative_l2([torch.tensor([1.0, torch.inf, torch.nan, 2.0])], [exact]) is None
    assert relative_l2([torch.tensor([1.0, 5.0, torch.nan, 2.0])], [exact]) is None
    assert relative_l2([exact, 1], [exact]) is None
    nan = torch.tensor([1.0, float("nan")])
    assert relative_l2([nan], [nan.clone()]) == 0.0
    assert relative_l2([torch.tensor([1.0, 0.0])], [nan]) is None
