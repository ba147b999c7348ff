"""What callers do to a model and to tensors around graphed calls, and what must then still be right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.graph.kinds import modes
from kernel_pytorch.graph.timing import Comparison


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.inference_mode():
        yield


class Scale(nn.Module):
    def __init__(self, weight: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_two_models_with_the_same_shapes_keep_apart(wrap: Any) -> None:
    models = [Scale(2.0), Scale(3.0)]
    for model in models:
        wrap(model)
    x = torch.ones(4)
    for _ in range(3):
        assert [model(x)[0].item() for model in models] == [2.0, 3.0]


def test_graphs_of_a_state_are_there_again_when_the_model_returns_to_it(wrap: Any) -> None:
    model = nn.Sequential(nn.Dropout(1.0), Scale()).eval()
    graphed, recorder = wrap(model)
    x = torch.ones(4)
    for _ in range(3):
        assert model.eval()(x)[0].item() == 2.0
        assert model.train()(x)[0].item() == 0.0
    assert recorder.num_recorded == 2
    assert [d["reason"] for d in graphed.decisions if not d["captured"]] == [
        "graphs set aside: a module went from training to eval or back"
    ]


def test_two_sets_of_weights_that_are_swapped_have_graphs_each(wrap: Any) -> None:
    model = Scale()
    _, recorder = wrap(model)
    x = torch.ones(4)
    sets = [torch.full((4,), 2.0), torch.full((4,), 5.0)]
    for _ in range(3):
        for values in sets:
            model.weight.data = values
            assert model(x)[0].item() == values[0].item()
    assert recorder.num_recorded == 2


def test_new_weights_in_every_call_are_right(wrap: Any) -> None:
    model = Scale()
    wrap(model)
    x = torch.ones(4)
    for value in range(12):
        model.weight = nn.Parameter(torch.full((4,), float(value)))
        assert [model(x)[0].item() for _ in range(2)] == [float(value)] * 2


class Writes(nn.Module):
    """Repeatable: writes its argument's memory, the same in every call with the same arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 1.0))

    def forward(self, cache: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, position, self.weight[None] * 3)
        return cache.sum(0)


def test_a_cache_is_put_right_when_weights_were_replaced_between_calls(wrap: Any) -> None:
    model = Writes()
    wrap(model)
    cache, position = torch.zeros(3, 2), torch.tensor([1])
    for value in (1.0, 2.0, 3.0):
        model.weight = nn.Parameter(torch.full((2,), value))
        for _ in range(2):
            assert model(cache, position).tolist() == [value * 3] * 2
        assert cache.tolist() == [[0.0, 0.0], [value * 3] * 2, [0.0, 0.0]]


class Counts(nn.Module):
    """Not repeatable: a counter goes up by the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.register_buffer("total", torch.zeros(1))
        self.total: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(self.weight)
        return x + self.total


def test_a_counter_counts_every_call_once_though_weights_are_replaced(wrap: Any) -> None:
    model = Counts()
    wrap(model)
    x, total = torch.zeros(1), 0.0
    for value in (1.0, 10.0, 100.0):
        model.weight = nn.Parameter(torch.tensor([value]))
        for _ in range(3):
            total += value
            assert model(x).item() == total


def test_a_transform_around_a_captured_model_computes_what_it_did(wrap: Any) -> None:
    model = nn.Linear(3, 3)
    rows = torch.randn(5, 3)
    with torch.no_grad():
        expected = torch.vmap(model)(rows)
        graphed, _ = wrap(model)
        for _ in range(4):
            model(rows[0])
        assert torch.equal(torch.vmap(model)(rows), expected)
        assert torch.equal(torch.func.vmap(torch.func.vmap(model))(rows[None])[0], expected)
    assert any("torch.vmap" in decision["reason"] for decision in graphed.decisions)


def test_autocast_is_part_of_the_modes() -> None:
    before = modes()
    torch.set_autocast_enabled("cuda", True)
    try:
        within = modes()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert before != within
    assert modes() == before


def test_outputs_that_alias_an_argument_alias_the_callers_own(wrap: Any) -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return x[1:, :2], x.t(), x + 1

    model = Views()
    _, recorder = wrap(model)
    for value in (0.0, 1.0, 2.0):
        x = torch.full((3, 4), value)
        part, turned, new = model(x)
        part.fill_(9.0)
        assert x[1:, :2].tolist() == [[9.0, 9.0]] * 2
        assert turned.shape == (4, 3)
        assert turned[0].tolist() == [value, 9.0, 9.0]
        assert new[0, 0].item() == value + 1
    assert recorder.num_replays > 0


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), RuntimeError("no")])
def test_what_is_raised_while_recording_leaves_the_plain_call(wrap: Any, Rerun: Any, error: Exception) -> None:
    class Raises(Rerun):
        def record(self, call: Callable[[], Any]) -> Any:
            call()
            raise error

    model = Writes()
    graphed, _ = wrap(model, Raises())
    cache = torch.zeros(2, 2)
    assert [model(cache, torch.tensor([0])).tolist() for _ in range(3)] == [[3.0, 3.0]] * 3
    assert cache.tolist() == [[3.0, 3.0], [0.0, 0.0]]
    assert graphed.decisions[0]["reason"].startswith("capture failed: ")
    assert not graphed.manager.lock.locked()


def test_threads_that_call_at_the_same_time_get_their_own_answers(wrap: Any) -> None:
    model = Scale()
    _, recorder = wrap(model)
    wrong: list[tuple[float, float]] = []

    def work(number: int) -> None:
        with torch.inference_mode():
            for step in range(200):
                value = float(number * 1000 + step)
                found = model(torch.full((4,), value))[0].item()
                if found != 2 * value:
                    wrong.append((value, found))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert recorder.num_replays > 0


class NoCopies:
    """Replays that copy something in take 3 ms, plain calls 2 ms, replays in place 1 ms."""

    def __init__(self, recorder: Any) -> None:
        self.recorder = recorder

    def __call__(self, plain: Callable[[], Any], replay: Callable[[], Any], undo: Callable[[], None], margin: float = 1.0) -> Comparison:
        replay()
        return Comparison(2.0, 1.0 if self.recorder.in_place else 3.0, 20)


def test_callers_that_take_turns_between_buffers_get_a_graph_each_where_copies_do_not_pay(wrap: Any, Rerun: Any) -> None:
    class Costly(Rerun):
        in_place = True

    recorder = Costly()
    recorder.compare = NoCopies(recorder)
    model = Scale()
    graphed, _ = wrap(model, recorder)
    buffers = [torch.full((4,), float(i)) for i in range(3)]
    assert model(buffers[0])[0].item() == 0.0
    recorder.in_place = False
    assert model(buffers[1])[0].item() == 2.0
    recorder.in_place = True
    for _ in range(4):
        assert [model(x)[0].item() for x in buffers] == [0.0, 2.0, 4.0]
    reasons = [(d["captured"], d.get("copied_bytes")) for d in graphed.decisions]
    assert reasons[:2] == [(True, 0), (False, 16)]
    assert [row for row in reasons if row[0]] == [(True, 0)] * 3
    replays, recorded = recorder.num_replays, recorder.num_recorded
    assert [model(x)[0].item() for x in buffers] == [0.0, 2.0, 4.0]
    assert (recorder.num_replays, recorder.num_recorded) == (replays + 3, recorded)
    # Addresses that never come back are not worth one.
    for value in range(10):
        assert model(torch.full((4,), float(value)))[0].item() == 2.0 * value


def test_buffers_in_turns_get_a_graph_each_also_where_copies_pay_but_cost(wrap: Any, Rerun: Any) -> None:
    class Costly(Rerun):
        in_place = True

    recorder = Costly()

    def compare(plain: Any, replay: Any, undo: Any, margin: float = 1.0) -> Comparison:
        replay()
        return Comparison(2.0, 1.0 if recorder.in_place else 1.5, 20)

    recorder.compare = compare
    model = Scale()
    graphed, _ = wrap(model, recorder)
    buffers = [torch.full((4,), float(i)) for i in range(3)]
    model(buffers[0])
    recorder.in_place = False
    model(buffers[1])
    recorder.in_place = True
    for _ in range(4):
        assert [model(x)[0].item() for x in buffers] == [0.0, 2.0, 4.0]
    copied = graphed.manager.statistics["copied_bytes"]
    assert [model(x)[0].item() for x in buffers] == [0.0, 2.0, 4.0]
    assert graphed.manager.statistics["copied_bytes"] == copied
    # Others are still copied in, and after a while nobody counts where they are.
    for value in range(100):
        assert model(torch.full((4,), float(value)))[0].item() == 2.0 * value
    assert recorder.num_recorded <= 6


def test_an_argument_of_the_caller_is_not_kept_alive(wrap: Any) -> None:
    import gc
    import weakref

    class Plus(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model = Plus()
    graphed, recorder = wrap(model)
    # Rerun itself holds what it runs again; a graph does not.
    record = recorder.record
    recorder.record = lambda call: type(record(call))(torch.zeros(4), lambda: None)
    recorder.compare = lambda *_: recorder.comparison
    x = torch.zeros(4)
    storage = weakref.ref(x)
    model(x)
    del x
    gc.collect()
    assert storage() is None
    assert graphed.decisions[0]["captured"]


def test_conservative_waits_for_five_calls_and_asks_for_a_tenth(wrap: Any, Rerun: Any) -> None:
    model = Scale()
    _, recorder = wrap(model, strategy=GraphDeploymentStrategy.conservative, min_speedup=None)
    x = torch.ones(4)
    counts = []
    for _ in range(6):
        model(x)
        counts.append(recorder.num_recorded)
    assert counts == [0, 0, 0, 0, 1, 1]
    other = Scale()
    graphed, _ = wrap(other, Rerun(plain_ms=1.09), strategy=GraphDeploymentStrategy.conservative, min_speedup=None)
    for _ in range(6):
        other(x)
    assert [d["captured"] for d in graphed.decisions] == [False]


def test_balanced_makes_graphs_for_sizes_that_come_back_only(wrap: Any) -> None:
    model = nn.ReLU()
    _, recorder = wrap(model, strategy=GraphDeploymentStrategy.balanced)
    for size in range(1, 40):
        model(torch.ones(size))
    assert recorder.num_recorded == 1
    for _ in range(10):
        for size in range(1, 13):
            model(torch.ones(size))
    assert recorder.num_recorded >= 12
    _, greedy = wrap(nn.Sequential(model), strategy=GraphDeploymentStrategy.aggressive)
    assert greedy.num_recorded == 0


def test_statistics_count_what_callers_did(wrap: Any) -> None:
    model = Scale()
    graphed, _ = wrap(model)
    for _ in range(5):
        model(torch.ones(4))
    with torch.inference_mode(False), torch.enable_grad():
        model(torch.ones(4))
    counts = graphed.manager.statistics
    assert (counts["captures"], counts["replays"] >= 4, counts["straight_calls"], counts["guard_misses"]) == (2, True, 1, 0)
    assert graphed.manager.workload[0]["num_calls"] == 5


def test_a_model_whose_calls_are_all_refused_is_looked_at_less_and_taken_up_again(wrap: Any, Rerun: Any) -> None:
    model = Scale()
    recorder = Rerun(plain_ms=1.0)
    graphed, _ = wrap(model, recorder)
    x = torch.ones(4)
    for _ in range(200):
        assert model(x)[0].item() == 2.0
    # The first call decides; of the others, 65 are looked at, then one in sixteen.
    assert graphed.manager.workload[0]["num_calls"] == 1 + 65 + (200 - 1 - 65) // 16
    recorder.comparison = Comparison(2.0, 1.0, 20)
    y = torch.ones(2, 4)
    for _ in range(40):
        assert model(y)[0, 0].item() == 2.0
    assert graphed.manager.workload[1]["num_replays"] >= 24
