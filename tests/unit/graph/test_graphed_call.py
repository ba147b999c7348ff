"""Everything about graph capture but the CUDA graph: keys, copies, mutation, fallbacks and decisions.

`Rerun` is a recorder for any device: it records a call by keeping its output tensors and replays it by running it again
into them. Like a CUDA graph it reads and writes fixed memory, and like one it must not be handed moved tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.backends.detect import plan_backend
from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.graph.capture import CaptureWholeCall
from kernel_pytorch.graph.graphed_call import GraphedCall
from kernel_pytorch.optimizer import Context, Level, Workload
from kernel_pytorch.schema import BackendConfig, BucketingConfig, OnMismatch

pytestmark = pytest.mark.usefixtures("both_ways")


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x * self.weight * scale


class Cached(nn.Module):
    """Writes its input into a cache at a position and returns the cache's sum: a decoder in small."""

    def forward(self, x: torch.Tensor, cache: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, position, x)
        return cache.sum(0)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.inference_mode():
        yield


def reasons(graphed: GraphedCall) -> list[str]:
    return [decision["reason"] for decision in graphed.decisions]


def test_a_key_is_recorded_once_and_replayed(wrap: Any) -> None:
    model = Double()
    graphed, recorder = wrap(model)
    x = torch.arange(4.0)
    assert [model(x).tolist() for _ in range(3)] == [[0.0, 2.0, 4.0, 6.0]] * 3
    assert (recorder.num_recorded, len(graphed.decisions)) == (1, 1)
    decision = graphed.decisions[0]
    assert (decision["inputs"], decision["captured"], decision["speedup"], decision["copied_bytes"]) == ("float32[4]", True, 2.0, 0)


def test_class_and_state_names_stay(wrap: Any) -> None:
    model = Double()
    wrap(model)
    assert type(model) is Double
    assert list(model.state_dict()) == ["weight"]


def test_an_input_elsewhere_is_copied_in_and_the_first_one_is_left_alone(wrap: Any) -> None:
    model = Double()
    graphed, recorder = wrap(model)
    first, second, third = torch.ones(4), torch.full((4,), 3.0), torch.full((4,), 5.0)
    assert [model(x)[0].item() for x in (first, second, third, first)] == [2.0, 6.0, 10.0, 2.0]
    assert first.tolist() == [1.0] * 4
    assert recorder.num_recorded == 2
    assert [decision["copied_bytes"] for decision in graphed.decisions] == [0, 16]


def test_returned_tensors_are_not_overwritten_by_the_next_call(wrap: Any) -> None:
    model = Double()
    wrap(model)
    x = torch.ones(4)
    kept = model(x)
    x.fill_(7.0)
    assert (model(x)[0].item(), kept[0].item()) == (14.0, 2.0)


@pytest.mark.parametrize(
    "other",
    [lambda: ((torch.ones(5),), {}), lambda: ((torch.ones(4, dtype=torch.float64),), {}), lambda: ((torch.ones(4),), {"scale": 3.0})],
)
def test_other_shapes_types_and_values_get_a_graph_of_their_own(other: Callable[[], Any], wrap: Any) -> None:
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return x * scale

    model = Scale()
    _, recorder = wrap(model)
    x = torch.ones(4)
    model(x)
    args, kwargs = other()
    assert model(*args, **kwargs).sum().item() == args[0].numel() * kwargs.get("scale", 1.0)
    model(x)
    assert recorder.num_recorded == 2


def test_modes_are_part_of_the_key(wrap: Any) -> None:
    model = Double()
    _, recorder = wrap(model)
    x = torch.ones(4)
    model(x)
    with torch.inference_mode(False), torch.no_grad():
        model(torch.ones(4))
    assert recorder.num_recorded == 2


def test_slow_replays_are_not_kept_and_both_figures_are_recorded(wrap: Any, Rerun: Any) -> None:
    model = Double()
    graphed, recorder = wrap(model, Rerun(plain_ms=1.01, replay_ms=1.0))
    x = torch.ones(4)
    before = model(x)
    replays = recorder.num_replays
    assert torch.equal(model(x), before)
    assert recorder.num_replays == replays
    decision = graphed.decisions[0]
    assert (decision["captured"], decision["plain_ms"], decision["replay_ms"]) == (False, 1.01, 1.0)
    assert decision["reason"] == "replay is not kept: 1.010 times the plain call's speed; 1.02 asked for"


def test_a_tensor_that_the_call_writes_to_is_written_in_place(wrap: Any) -> None:
    model = Cached()
    graphed, recorder = wrap(model)
    cache = torch.zeros(3, 2)
    for step in range(3):
        out = model(torch.full((1, 2), step + 1.0), cache, torch.tensor([step, step][:1]))
    assert cache.tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert out.tolist() == [6.0, 6.0]
    assert graphed.decisions[0]["num_written"] == 1
    assert recorder.num_replays > 0


def test_another_cache_is_written_itself_not_the_first_one(wrap: Any) -> None:
    model = Cached()
    wrap(model)
    x, position = torch.ones(1, 2), torch.tensor([0, 0])[:1]
    first, second = torch.zeros(2, 2), torch.full((2, 2), 5.0)
    model(x, first, position)
    model(x, second, position)
    model(x * 9, second, position)
    assert first.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert second.tolist() == [[9.0, 9.0], [5.0, 5.0]]


def test_a_new_cache_in_every_call_ends_capture(wrap: Any) -> None:
    model = Cached()
    graphed, _ = wrap(model)
    caches = [torch.zeros(2, 2) for _ in range(4)]
    for cache in caches:
        model(torch.ones(1, 2), cache, torch.zeros(2, dtype=torch.int64)[:1])
    assert all(cache.tolist() == [[1.0, 1.0], [0.0, 0.0]] for cache in caches)
    assert reasons(graphed)[-1] == (
        "an argument that cannot be copied in (written to, expanded, or inside an object) is a new one in every call"
    )


def test_the_first_call_counts_once_though_it_runs_many_times(wrap: Any) -> None:
    class Count(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)  # pyright: ignore[reportCallIssue]
            return x + self.calls

    model = Count()
    wrap(model)
    x = torch.zeros(2)
    assert [model(x)[0].item() for _ in range(3)] == [1.0, 2.0, 3.0]


def test_running_statistics_are_updated_once_a_call(wrap: Any) -> None:
    model = nn.BatchNorm1d(2, momentum=0.5).train()
    wrap(model)
    x = torch.tensor([[0.0, 2.0], [4.0, 2.0]])
    for _ in range(2):
        model(x)
    assert model.running_mean is not None
    assert model.running_mean.tolist() == [1.5, 1.5]
    assert model.num_batches_tracked is not None
    assert int(model.num_batches_tracked) == 2


def test_random_numbers_go_on_as_without_capture(wrap: Any) -> None:
    model = nn.Dropout(0.5)
    wrap(model)
    x = torch.ones(32)
    torch.manual_seed(0)
    expected = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(model(x), expected)


def test_a_call_that_changes_python_state_is_never_captured(wrap: Any) -> None:
    class Counter(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x + self.calls

    model = Counter()
    graphed, recorder = wrap(model)
    x = torch.zeros(2)
    assert [model(x)[0].item() for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]
    assert recorder.num_recorded == 0
    assert reasons(graphed) == ["the call changes Python attributes, which a replay would not"]


def test_a_model_that_fills_a_cache_in_its_first_call_is_captured_in_the_second(wrap: Any) -> None:
    class Lazy(nn.Module):
        table: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.table is None:
                self.table = torch.arange(4.0)
            return x + self.table

    model = Lazy()
    _, recorder = wrap(model)
    x = torch.zeros(4)
    assert [model(x).tolist() for _ in range(3)] == [[0.0, 1.0, 2.0, 3.0]] * 3
    assert recorder.num_recorded == 1
    model.table = torch.ones(4)
    assert model(x).tolist() == [1.0] * 4


def test_weights_updated_in_place_are_seen_and_replaced_ones_drop_the_graph(wrap: Any) -> None:
    model = Double()
    graphed, recorder = wrap(model)
    x = torch.ones(4)
    model(x)
    model.weight.data.fill_(5.0)
    assert model(x).tolist() == [5.0] * 4
    assert recorder.num_recorded == 1
    model.weight.data = torch.full((4,), 6.0)
    assert model(x).tolist() == [6.0] * 4
    model.weight = nn.Parameter(torch.full((4,), 7.0))
    assert model(x).tolist() == [7.0] * 4
    assert [reason for reason in reasons(graphed) if "set aside" in reason] == [
        "graphs set aside: a parameter or buffer has other memory",
        "graphs set aside: a parameter or buffer was replaced",
    ]


def test_a_replaced_submodule_and_a_changed_mode_drop_the_graph(wrap: Any) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Dropout(1.0)).eval()
    wrap(model)
    x = torch.ones(2)
    assert model(x).tolist() == [1.0, 1.0]
    model.train()
    assert model(x).tolist() == [0.0, 0.0]
    model[1] = nn.Identity()
    assert model(x).tolist() == [1.0, 1.0]


def test_hooks_are_run_and_stop_capture(wrap: Any) -> None:
    model = nn.Sequential(nn.ReLU())
    graphed, recorder = wrap(model)
    x = torch.ones(2)
    model(x)
    seen: list[int] = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    model(x)
    # The first call after a change may replay once for nothing; Rerun's replay runs hooks, a graph's does not.
    seen.clear()
    model(x)
    assert seen == [1]
    assert reasons(graphed)[-1] == "a module has a forward hook, which a replay would not run"
    handle.remove()
    replays = recorder.num_replays
    model(x)
    assert recorder.num_replays == replays + 1


def test_gradients_go_straight_through_and_are_right(wrap: Any) -> None:
    with torch.inference_mode(False):
        model = Double()
        graphed, recorder = wrap(model)
        model(torch.ones(4)).sum().backward()
        assert model.weight.grad is not None
        assert model.weight.grad.tolist() == [1.0] * 4
        assert recorder.num_recorded == 0
        assert reasons(graphed) == ["gradients are enabled: capture is for no_grad and inference_mode"]


def test_a_failed_capture_falls_back_with_its_reason_and_undoes_what_it_did(wrap: Any, Rerun: Any) -> None:
    model = Cached()
    recorder = Rerun()
    recorder.failure = "operation not permitted when stream is capturing\nmore"
    graphed, _ = wrap(model, recorder)
    cache = torch.zeros(2, 2)
    for _ in range(2):
        assert model(torch.ones(1, 2), cache, torch.zeros(2, dtype=torch.int64)[:1]).tolist() == [1.0, 1.0]
    assert reasons(graphed) == ["capture failed: operation not permitted when stream is capturing"]


@pytest.mark.parametrize("index", ["item", "mask"])
def test_a_call_that_needs_a_value_on_the_host_is_not_recorded(index: str, wrap: Any) -> None:
    class Value(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.sum().item() if index == "item" else x[x > 0] * 2

    model = Value()
    graphed, recorder = wrap(model)
    x = torch.ones(2)
    assert [model(x).tolist() for _ in range(2)] == [[2.0, 2.0]] * 2
    name = "aten.item.default" if index == "item" else "aten.index.Tensor"
    assert (recorder.num_recorded, reasons(graphed)) == (0, [f"the call waits for a value of the device: {name} in Value"])


def test_an_error_of_the_call_itself_reaches_the_caller(wrap: Any) -> None:
    model = Double()
    graphed, _ = wrap(model)
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(torch.ones(3))
    assert "the call cannot be watched" in reasons(graphed)[0]
    assert model(torch.ones(4)).tolist() == [2.0] * 4


def test_structures_go_in_and_come_out(wrap: Any) -> None:
    class Pair(nn.Module):
        def forward(self, x: dict[str, torch.Tensor], *, names: list[str]) -> dict[str, Any]:
            return {"sum": x["a"] + x["b"], "same": x["a"], "names": names, "view": x["b"][:1]}

    model = Pair()
    _, recorder = wrap(model)
    for value in (1.0, 2.0, 3.0):
        x = {"a": torch.full((2,), value), "b": torch.ones(2)}
        out = model(x, names=["n"])
        assert out["sum"].tolist() == [value + 1.0] * 2
        assert out["same"] is x["a"]
        assert (out["names"], out["view"].tolist()) == (["n"], [1.0])
    assert recorder.num_replays > 0


def test_an_output_object_with_tensors_of_its_own_is_refused(wrap: Any) -> None:
    class Box:
        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

    class Boxing(nn.Module):
        def forward(self, x: torch.Tensor) -> Box:
            return Box(x + 1)

    model = Boxing()
    graphed, _ = wrap(model)
    assert model(torch.zeros(2)).value.tolist() == [1.0, 1.0]
    assert reasons(graphed) == ["capture failed: the output holds a Box, whose tensors the next replay would overwrite"]


def test_a_cache_object_is_compared_by_what_it_holds(wrap: Any) -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys = [torch.zeros(2)]
            self.length = 0

    class Append(nn.Module):
        def forward(self, x: torch.Tensor, cache: Cache, step: int = 0) -> torch.Tensor:
            cache.keys[0].add_(x)
            cache.length += step
            return cache.keys[0] * 2

    model = Append()
    _, recorder = wrap(model)
    cache, other, x = Cache(), Cache(), torch.ones(2)
    assert [model(x, cache)[0].item() for _ in range(3)] == [2.0, 4.0, 6.0]
    assert model(x, other).tolist() == [2.0, 2.0]
    assert (cache.keys[0].tolist(), recorder.num_recorded) == ([3.0, 3.0], 2)
    assert [model(x, cache, step=1)[0].item() for _ in range(3)] == [8.0, 10.0, 12.0]
    assert (cache.length, recorder.num_recorded) == (3, 2)


def test_expanded_inputs_are_never_copied_into(wrap: Any) -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x + mask

    model = Add()
    wrap(model)
    x = torch.zeros(2, 2)
    for value in (1.0, 2.0, 3.0, 4.0):
        assert model(x, torch.full((1, 2), value).expand(2, 2)).tolist() == [[value] * 2] * 2


def test_a_second_thread_goes_straight_through(wrap: Any) -> None:
    inside, leave = threading.Event(), threading.Event()

    class Wait(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if threading.current_thread() is not threading.main_thread() and not inside.is_set():
                inside.set()
                leave.wait(30)
            return x + 1

    model = Wait()
    graphed, _ = wrap(model)

    def work() -> None:
        with torch.inference_mode():
            model(torch.zeros(2))

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(30)
    assert model(torch.ones(3)).tolist() == [2.0] * 3
    assert graphed.decisions == []
    leave.set()
    thread.join()
    assert [decision["inputs"] for decision in graphed.decisions] == ["float32[2]"]


def test_kinds_of_arguments_beyond_the_budget_push_out_those_not_used_lately(wrap: Any, Rerun: Any) -> None:
    model = Double()
    graphed, recorder = wrap(model, Rerun(held_bytes=100), memory_budget_bytes=350)
    x = torch.ones(4)
    for scale in range(5):
        assert model(x, float(scale)).tolist() == [2.0 * scale] * 4
    assert graphed.manager.statistics["evictions"] == 2
    assert graphed.manager.statistics["held_bytes"] == 300
    replays = recorder.num_replays
    assert [model(x, float(scale))[0].item() for scale in (0, 4, 3, 2)] == [0.0, 8.0, 6.0, 4.0]
    assert recorder.num_replays == replays + 3
    assert [d["reason"] for d in graphed.decisions if "evicted" in d["reason"]] == ["evicted: over the budget of 350 bytes"] * 2


def test_a_graph_over_the_budget_by_itself_is_not_kept(wrap: Any, Rerun: Any) -> None:
    model = Double()
    graphed, recorder = wrap(model, Rerun(held_bytes=100), memory_budget_bytes=99)
    x = torch.ones(4)
    assert [model(x).tolist() for _ in range(3)] == [[2.0] * 4] * 3
    assert (recorder.num_recorded, reasons(graphed)) == (1, ["the graph needs 100 bytes, the budget is 99"])
    assert graphed.manager.statistics["held_bytes"] == 0


def test_an_evicted_kind_is_recorded_again_only_after_twice_its_calls(wrap: Any, Rerun: Any) -> None:
    model = Double()
    graphed, recorder = wrap(model, Rerun(held_bytes=100), memory_budget_bytes=100)
    x = torch.ones(4)
    model(x, 1.0)
    model(x, 2.0)
    assert (recorder.num_recorded, graphed.manager.statistics["evictions"]) == (2, 1)
    assert [model(x, 1.0)[0].item() for _ in range(2)] == [2.0, 2.0]
    assert recorder.num_recorded == 3


def test_it_wraps_a_compiled_call(wrap: Any, Rerun: Any) -> None:
    model = Double()
    model.compile(backend="eager", fullgraph=True)
    recorder = Rerun()
    wrap(model, recorder)
    x = torch.ones(4)
    assert [model(x).tolist() for _ in range(2)] == [[2.0] * 4] * 2
    assert (recorder.num_recorded, recorder.num_eager) == (2, 1)


def test_tracing_by_an_outer_compile_sees_the_plain_call(wrap: Any) -> None:
    model = Double()
    graphed, recorder = wrap(model)
    outer = torch.compile(lambda x: model(x) + 1, backend="eager", fullgraph=True)
    assert outer(torch.ones(4)).tolist() == [3.0] * 4
    assert (recorder.num_recorded, graphed.decisions) == (0, [])


STEP = CaptureWholeCall(
    strategy=GraphDeploymentStrategy.balanced,
    num_warmup_calls=3,
    min_speedup=None,
    memory_budget_bytes=None,
    dynamic_dims=[],
    bucketing=BucketingConfig(),
)


def test_settings_of_buckets_without_dims_are_said_to_be_unread() -> None:
    backend = plan_backend("h100", BackendConfig())
    assert (STEP.support(backend).level, STEP.support(backend).reason) == (Level.native, "")
    settings = {**vars(STEP), "bucketing": BucketingConfig(step=32)}
    assert CaptureWholeCall(**settings).support(backend).reason == "graph.bucketing is not read: graph.dynamic_dims names no dims"
    assert CaptureWholeCall(**{**settings, "dynamic_dims": ["x:0"]}).support(backend).reason == ""


class Nothing(Workload):
    def call(self, model: nn.Module) -> Any: ...

    def held_out(self, model: nn.Module, num_rows: int) -> Any: ...

    def probe(self, model: nn.Module) -> Any: ...


def test_the_step_is_not_applicable_on_a_cpu() -> None:
    backend = CpuBackend(hardware="a100", on_mismatch=OnMismatch.emulate)
    assert (STEP.support(backend).level, STEP.support(backend).reason) == (Level.native, "not applicable on cpu")
    model = Double()
    applied = STEP.apply(model, Context(backend, Nothing()))
    assert applied.not_applicable == "CUDA graphs need a CUDA device; this is cpu"
    assert model._compiled_call_impl is None


def test_the_step_is_native_for_a_planned_gpu() -> None:
    assert STEP.support(plan_backend("t4", BackendConfig())).level is Level.native
