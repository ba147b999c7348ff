"""Eager code against compiled code, each in a graph of its own: which is kept, what is said of it, and what is left of the other.

The compiler here is one whose code is off by a millionth, so that an output tells which code it is of."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame

from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.graph.rival import is_compiled
from kernel_pytorch.graph.timing import Comparison, Interval

pytestmark = pytest.mark.usefixtures("both_ways")

OFF = 1 + 1e-6


class Double(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * 2.0 * scale


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Cached(nn.Module):
    """Writes to a cache at a position that it counts up."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, self.position, x)  # pyright: ignore[reportArgumentType]
        self.position.add_(1)  # pyright: ignore[reportCallIssue]
        return cache.sum(0) * 3.0


def compiled(model: nn.Module, off: float = OFF) -> nn.Module:
    def compiler(traced: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        return lambda *inputs: tuple(out * off if out.is_floating_point() else out for out in traced(*inputs))

    model.compile(backend=compiler)
    return model


def code_of(decision: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(decision[name] for name in ("captured", "code", "compiled_replay_ms", "eager_replay_ms"))


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


def test_the_eager_code_is_kept_and_named_where_it_is_faster(wrap: Any, Rerun: Any) -> None:
    model = compiled(Double())
    graphed, recorder = wrap(model, Rerun(replay_ms=1.0, eager_ms=0.8, held_bytes=100))
    x = torch.ones(4)
    assert [model(x).tolist() for _ in range(3)] == [[2.0] * 4] * 3
    decision = graphed.decisions[0]
    assert code_of(decision) == (True, "eager", 1.0, 0.8)
    assert decision["eager_relative_l2"] == pytest.approx(1e-6, rel=0.1)
    assert decision["code_reason"] == "the eager code's replay has 1.250 times the speed of the compiled code's; 1.02 asked for"
    # The times against the plain call are of one code, the compiled one, on both sides.
    assert (decision["plain_ms"], decision["replay_ms"], decision["speedup"]) == (2.0, 1.0, 2.0)
    assert (recorder.num_recorded, recorder.num_eager, len(graphed.decisions)) == (2, 1, 1)
    counts = graphed.manager.statistics
    assert (counts["captures"], counts["replays"], counts["held_bytes"], graphed.manager.total_bytes()) == (2, 3, 100, 100)


def test_calls_that_no_graph_is_for_are_the_compiled_codes(wrap: Any, Rerun: Any) -> None:
    model = compiled(Double())
    graphed, _ = wrap(model, Rerun(eager_ms=0.5))
    x = torch.ones(4)
    model(x)
    assert torch.equal(graphed.plain(x), torch.full((4,), 2.0) * OFF)
    assert torch.equal(model(x), torch.full((4,), 2.0))


@pytest.mark.parametrize(("eager_ms", "min_speedup"), [(1.0, 1.02), (0.99, 0.0), (0.8, 1.5), (1.2, 1.02)])
def test_the_compiled_code_stays_where_the_eager_code_does_not_win_by_the_margin(
    eager_ms: float, min_speedup: float, wrap: Any, Rerun: Any
) -> None:
    model = compiled(Double())
    graphed, recorder = wrap(model, Rerun(eager_ms=eager_ms, held_bytes=100), min_speedup=min_speedup)
    x = torch.ones(4)
    assert all(torch.equal(model(x), torch.full((4,), 2.0) * OFF) for _ in range(3))
    assert code_of(graphed.decisions[0]) == (True, "compiled", 1.0, eager_ms)
    assert graphed.manager.statistics["held_bytes"] == 100
    # It was not clearly slower: another kind of call tries it again.
    model(torch.ones(5))
    assert (recorder.num_recorded, recorder.num_eager) == (4, 2)


@pytest.mark.parametrize(
    ("single", "row", "code", "but"),
    [
        (Interval(1.03, 1.1, 1.2), Interval(0.9, 1.0, 1.1), "eager", ""),
        (Interval(1.01, 1.1, 1.2), Interval(1.1, 1.1, 1.1), "compiled", "; not sure: 1.010 to 1.200"),
        (Interval(1.03, 1.1, 1.2), Interval(0.9, 0.95, 0.99), "compiled", "; slower in a row of calls: 0.950 times"),
    ],
)
def test_the_whole_interval_is_above_the_margin_and_calls_in_a_row_do_not_lose(
    single: Interval, row: Interval, code: str, but: str, wrap: Any, Rerun: Any
) -> None:
    recorder = Rerun()
    recorder.of_codes = Comparison(1.1, 1.0, 20, 1.0, 1.0, single, row)
    model = compiled(Double())
    graphed, _ = wrap(model, recorder)
    model(torch.ones(4))
    assert code_of(graphed.decisions[0]) == (True, code, 1.1, 1.0)
    said = "the eager code's replay has 1.100 times the speed of the compiled code's; 1.02 asked for"
    assert graphed.decisions[0]["code_reason"] == said + but


def test_code_that_is_clearly_slower_is_not_tried_again(wrap: Any, Rerun: Any) -> None:
    model = compiled(Double())
    graphed, recorder = wrap(model, Rerun(eager_ms=1.3))
    for size in (4, 5, 6):
        assert torch.equal(model(torch.ones(size)), torch.full((size,), 2.0) * OFF)
    assert (recorder.num_recorded, recorder.num_eager) == (4, 1)
    assert [code_of(row) for row in graphed.decisions] == [(True, "compiled", 1.0, 1.3), *[(True, "compiled", None, None)] * 2]
    assert graphed.decisions[2]["code_reason"] == (
        "not tried again: for float32[4] the eager code's replay has 0.769 times the speed of the compiled code's"
    )


def test_conservative_never_tries_it(wrap: Any, Rerun: Any) -> None:
    model = compiled(Double())
    graphed, recorder = wrap(model, Rerun(eager_ms=0.1), GraphDeploymentStrategy.conservative)
    x = torch.ones(4)
    for _ in range(6):
        model(x)
    assert (recorder.num_recorded, recorder.num_eager, graphed.decisions[0]["captured"]) == (1, 0, True)
    assert not [name for name in graphed.decisions[0] if "code" in name or "eager" in name]


def test_it_is_not_tried_where_there_is_no_graph_to_beat(wrap: Any, Rerun: Any) -> None:
    model = compiled(Double())
    graphed, recorder = wrap(model, Rerun(plain_ms=1.0, replay_ms=1.0, eager_ms=0.1))
    model(torch.ones(4))
    assert (recorder.num_eager, graphed.decisions[0]["captured"], "code" in graphed.decisions[0]) == (0, False, False)


def test_a_model_in_another_thread_is_not_recorded_as_the_code_that_is_tried_here(wrap: Any, Rerun: Any) -> None:
    other = compiled(Double())
    graphed, recorder = wrap(other, Rerun(eager_ms=2.0))

    def first_call() -> None:
        with torch.inference_mode():
            other(torch.ones(4))

    class Meanwhile(Rerun):
        def record(self, call: Any) -> Any:
            if eval_frame._stance.stance == "force_eager":
                thread = threading.Thread(target=first_call)
                thread.start()
                thread.join()
            return super().record(call)

    model = compiled(Double())
    wrap(model, Meanwhile(eager_ms=0.5))
    model(torch.ones(4))
    assert (recorder.num_recorded, eval_frame._stance.stance) == (0, "default")
    # The next call is recorded.
    assert torch.equal(other(torch.ones(4)), torch.full((4,), 2.0) * OFF)
    assert (recorder.num_recorded, recorder.num_eager, graphed.decisions[0]["code"]) == (2, 1, "compiled")


def test_models_that_are_not_compiled_have_one_code(wrap: Any, Rerun: Any) -> None:
    model = Double()
    graphed, recorder = wrap(model, Rerun(eager_ms=0.1))
    model(torch.ones(4))
    assert recorder.num_recorded == 1
    assert not [name for name in graphed.decisions[0] if "code" in name or "eager" in name]


def test_a_model_is_compiled_as_a_whole_or_in_part() -> None:
    parts = nn.Sequential(Double(), Double())
    assert not is_compiled(parts)
    assert is_compiled(torch.compile(parts, backend="eager"))  # pyright: ignore[reportArgumentType]
    compiled(parts[1])
    assert is_compiled(parts)


def test_code_that_cannot_be_recorded_leaves_the_compiled_code(wrap: Any, Rerun: Any) -> None:
    recorder = Rerun(eager_ms=0.1)
    recorder.eager_failure = "operation not permitted when stream is capturing\nmore"
    model = compiled(Cached())
    graphed, _ = wrap(model, recorder)
    for width in (2, 3):
        cache = torch.zeros(3, width)
        model.position.zero_()  # pyright: ignore[reportCallIssue]
        for step in range(3):
            out = model(torch.ones(1, width), cache)
            assert torch.equal(out, torch.full((width,), 3.0 * (step + 1)) * OFF)
        assert cache.tolist() == [[1.0] * width] * 3
    why = "the eager code cannot be recorded: operation not permitted when stream is capturing"
    timed = [row for row in graphed.decisions if "code" in row]
    assert [code_of(row) for row in timed] == [(True, "compiled", None, None)] * len(timed)
    assert timed[0]["code_reason"] == why
    assert {row["code_reason"] for row in timed[1:]} == {f"not tried again: {why}"}


@pytest.mark.parametrize("eager_ms", [0.5, 1.1, 2.0])
def test_what_a_call_writes_is_written_once_and_random_state_is_left_alone(eager_ms: float, wrap: Any, Rerun: Any) -> None:
    model = compiled(Cached())
    graphed, recorder = wrap(model, Rerun(eager_ms=eager_ms))
    cache, random = torch.zeros(4, 2), torch.get_rng_state()
    outs = [model(torch.full((1, 2), step + 1.0), cache) for step in range(4)]
    assert cache.tolist() == [[1.0] * 2, [2.0] * 2, [3.0] * 2, [4.0] * 2]
    assert (int(model.position), recorder.num_eager > 0) == (4, True)  # pyright: ignore[reportArgumentType]
    off = 1.0 if eager_ms < 1 else OFF
    expected = [torch.full((2,), value * 3.0) * off for value in (1.0, 3.0, 6.0, 10.0)]
    assert all(map(torch.equal, outs, expected)), outs
    assert torch.equal(torch.get_rng_state(), random)
    assert next(row["num_written"] for row in graphed.decisions if "code" in row) == 2


def test_a_position_that_is_counted_up_does_not_run_over_the_cache(wrap: Any, Rerun: Any) -> None:
    class RunsNothing(Rerun):
        """As a device does while it records."""

        def record(self, call: Any) -> Any:
            recording = super().record(call)
            model.position.zero_()  # pyright: ignore[reportCallIssue]
            return recording

    model = compiled(Cached())
    graphed, _ = wrap(model, RunsNothing(eager_ms=0.5))
    assert model(torch.ones(1, 2), torch.zeros(1, 2)).tolist() == [3.0, 3.0]
    assert code_of(graphed.decisions[0]) == (True, "eager", 1.0, 0.5), graphed.decisions


def test_a_call_that_draws_random_numbers_stays_compiled_and_draws_as_before(wrap: Any, Rerun: Any) -> None:
    model = nn.Dropout(0.5)
    x = torch.ones(32)
    torch.manual_seed(0)
    expected = [nn.functional.dropout(x, 0.5) for _ in range(2)]
    inner = model._call_impl
    model._compiled_call_impl = torch.compile(lambda given: inner(given), backend="eager")
    graphed, recorder = wrap(model, Rerun(eager_ms=0.1))
    torch.manual_seed(0)
    assert all(torch.equal(model(x), draw) for draw in expected)
    assert (recorder.num_eager, code_of(graphed.decisions[0])) == (0, (True, "compiled", None, None))
    assert "random numbers" in graphed.decisions[0]["code_reason"]


def test_other_outputs_than_roundings_explain_refuse_it(wrap: Any, Rerun: Any) -> None:
    model = compiled(Double(), off=1.001)
    graphed, _ = wrap(model, Rerun(eager_ms=0.1))
    x = torch.ones(4)
    assert all(torch.equal(model(x), torch.full((4,), 2.0) * 1.001) for _ in range(2))
    assert code_of(graphed.decisions[0]) == (True, "compiled", None, None)
    assert graphed.decisions[0]["code_reason"] == "the eager code's outputs are others than roundings explain"


def test_another_value_beside_the_outputs_refuses_it(wrap: Any, Rerun: Any) -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str, int]:
            return x * 2.0, "compiled" if torch.compiler.is_compiling() else "eager", 3

    model = compiled(Named())
    graphed, _ = wrap(model, Rerun(eager_ms=0.1))
    assert [model(torch.ones(4))[1:] for _ in range(2)] == [("compiled", 3)] * 2
    assert graphed.decisions[0]["code_reason"] == "the eager code's outputs are others than roundings explain"


def test_a_replay_that_is_not_the_eager_call_refuses_it(wrap: Any, Rerun: Any) -> None:
    class Forgets(Rerun):
        """Replays of the second recording write nothing."""

        def record(self, call: Any) -> Any:
            recording = super().record(call)
            if self.num_eager:
                recording.output.zero_()
                object.__setattr__(recording, "replay", lambda: None)
            return recording

    model = compiled(Double())
    graphed, _ = wrap(model, Forgets(eager_ms=0.1))
    assert torch.equal(model(torch.ones(4)), torch.full((4,), 2.0) * OFF)
    assert graphed.decisions[0]["code_reason"] == "a replay of the eager code is not what the eager call is: relative L2 error 1"


def test_outputs_that_are_laid_out_otherwise_refuse_it(wrap: Any, Rerun: Any) -> None:
    def compiler(traced: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        return lambda *inputs: tuple(out.t().contiguous().t() for out in traced(*inputs))

    model = Double()
    model.compile(backend=compiler)
    graphed, _ = wrap(model, Rerun(eager_ms=0.1))
    assert model(torch.ones(2, 3)).stride() == (1, 2)
    assert graphed.decisions[0]["code_reason"] == "the eager code's outputs are of other shapes, or laid out otherwise"


def test_a_budget_that_only_the_compiled_code_fits_into_keeps_it(wrap: Any, Rerun: Any) -> None:
    class Large(Rerun):
        def record(self, call: Any) -> Any:
            self.held_bytes = 100 if self.num_recorded == 0 else 400
            return super().record(call)

    model = compiled(Double())
    graphed, _ = wrap(model, Large(eager_ms=0.1), memory_budget_bytes=300)
    assert torch.equal(model(torch.ones(4)), torch.full((4,), 2.0) * OFF)
    assert (code_of(graphed.decisions[0]), graphed.decisions[0]["held_bytes"]) == ((True, "compiled", None, None), 100)
    assert graphed.decisions[0]["code_reason"] == "the budget of 300 bytes has no room for the eager code"
    assert (graphed.manager.statistics["held_bytes"], graphed.manager.statistics["evictions"]) == (100, 0)


@pytest.mark.parametrize(("eager_ms", "fails"), [(0.5, False), (1.1, False), (0.5, True)])
def test_the_graph_that_is_not_kept_is_let_go_with_its_c_plus_plus_half(eager_ms: float, fails: bool, wrap: Any, Rerun: Any) -> None:
    memory: list[Any] = []

    class Weak(Rerun):
        def record(self, call: Any) -> Any:
            recording = super().record(call)
            memory.append(weakref.ref(recording.output))
            return recording

        def compare(self, plain: Any, replay: Any, undo: Any, margin: float = 1.0) -> Any:
            timed = super().compare(plain, replay, undo, margin)
            if fails and timed is self.of_codes:
                raise RuntimeError("out of memory")
            return timed

    model = compiled(Double())
    x = torch.ones(4)
    graphed, recorder = wrap(model, Weak(eager_ms=eager_ms))
    graphed.plain(x)
    gc.collect()
    gc.disable()
    try:
        model(x)
        kept = 1 if eager_ms < 1 and not fails else 0
        assert [output() is not None for output in memory] == [kept == 0, kept == 1]
        assert ("out of memory" in graphed.decisions[0]["code_reason"]) is fails
        replays = recorder.num_replays
        model(x)
        assert (recorder.num_replays, graphed.manager.statistics["replays"]) == (replays + 1, 2)
    finally:
        gc.enable()


def test_inputs_that_move_are_copied_into_either_code(wrap: Any, Rerun: Any) -> None:
    model = compiled(Double())
    graphed, recorder = wrap(model, Rerun(eager_ms=0.5))
    xs = [torch.full((4,), value) for value in (1.0, 3.0, 5.0, 7.0)]
    assert [model(x)[0].item() for x in xs] == [2.0, 6.0, 10.0, 14.0]
    assert [(row["code"], row["copied_bytes"]) for row in graphed.decisions] == [("eager", 0), ("eager", 16)]
    assert (recorder.num_recorded, [x[0].item() for x in xs]) == (4, [1.0, 3.0, 5.0, 7.0])


def test_arguments_on_the_host_are_sent_to_either_code(wrap: Any, Rerun: Any) -> None:
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x * scale

    # Its outputs must be the plain call's up to roundings.
    model, recorder = compiled(Scale(), off=1 + 2e-7), Rerun(eager_ms=0.5)
    graphed, _ = wrap(model, recorder)
    x, scale = torch.ones(4), torch.tensor(2.0)
    recorder.put_elsewhere(scale)
    assert model(x, scale).tolist() == [2.0] * 4
    scale.fill_(3.0)
    assert model(x, scale).tolist() == [3.0] * 4
    assert code_of(graphed.decisions[0]) == (True, "eager", 1.0, 0.5)


def test_a_piece_that_is_compiled_is_left_as_it_is(wrap: Any, Rerun: Any) -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = compiled(nn.Sequential(Double(), nn.Tanh(), nn.ReLU()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) * x.sum().item()

    model = Waits()
    graphed, recorder = wrap(model, Rerun(eager_ms=0.1))
    for _ in range(3):
        model(torch.ones(2))
    pieces = [row for row in graphed.decisions if row.get("module") == "first"]
    assert pieces[0]["captured"], graphed.decisions
    assert (recorder.num_eager, "code" in pieces[0]) == (0, False)


def test_updated_weights_are_seen_and_replaced_ones_are_not_replayed(wrap: Any, Rerun: Any) -> None:
    model = compiled(Weighted())
    graphed, recorder = wrap(model, Rerun(eager_ms=0.5))
    x = torch.ones(4)
    model(x)
    model.weight.data.fill_(5.0)  # pyright: ignore[reportCallIssue]
    assert model(x).tolist() == [5.0] * 4
    assert recorder.num_recorded == 2
    model.weight = nn.Parameter(torch.full((4,), 7.0))
    assert model(x).tolist() == [7.0] * 4
    assert [row.get("code") for row in graphed.decisions] == ["eager", None, "eager"]
