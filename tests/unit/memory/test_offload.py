"""Offloaded models compute the same bits, whatever their blocks hold, and whoever calls, copies, compiles or writes to them."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.backends.memory import size_class_bytes
from kernel_pytorch.compile.inductor import InductorCompile
from kernel_pytorch.compile.regional import RegionalCompile, repeated_blocks
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.errors import NoEffectError, UnsupportedOperationError
from kernel_pytorch.measure.graphs import compile_counts, error_on_recompile_limit
from kernel_pytorch.memory.lanes import Lanes
from kernel_pytorch.memory.offload import OffloadWeights
from kernel_pytorch.memory.streamed import StreamedBlock
from kernel_pytorch.models.llama import Llama, LlamaConfig
from kernel_pytorch.optimizer import Applied, Context, Workload, tensor_bytes
from kernel_pytorch.precision.quantize import QuantizeLinears
from kernel_pytorch.schema import ActivationConfig, CompileMode, OnMismatch, WeightConfig
from kernel_pytorch.verify.module import ModuleValidator

CONFIG = LlamaConfig(6, 64, 4, 2, 128, 100, 16)


class Ids(Workload):
    """Eight tokens of two samples, after each of which the cache has grown when the model has one."""

    def call(self, model: nn.Module) -> Any:
        return model(torch.arange(16).view(2, 8) % 100)

    probe = call

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        yield self.call(model).flatten(0, 1)


def llama(**changes: Any) -> Llama:
    config = LlamaConfig(**{**CONFIG.__dict__, **changes})
    model = Llama(config, dtype=torch.float32, device=torch.device("cpu"))
    model.init_weights(0)
    return model.eval()


class Step(OffloadWeights):
    """The step on a device that is host memory."""

    def __init__(self, made: Lanes, **settings: Any) -> None:
        super().__init__(**{"include": [], "exclude": [], "prefetch_depth": 1, "num_resident_blocks": 0, **settings})
        self.made = made

    def lanes(self, backend: Backend) -> Lanes:
        return self.made


@pytest.fixture
def offload(lanes: Any, backend: Backend):
    def apply(model: nn.Module, workload: Workload | None = None, **settings: Any) -> Applied:
        with torch.no_grad():
            return Step(lanes, **settings).apply(structural_clone(model), Context(backend, workload or Ids()))

    return apply


def streamed(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, StreamedBlock)]


@torch.inference_mode()
def call(model: nn.Module, workload: Workload | None = None) -> torch.Tensor:
    return (workload or Ids()).call(model)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_outputs_are_bit_equal_call_after_call(offload, depth: int) -> None:
    model = llama()
    expected = call(model)
    applied = offload(model, prefetch_depth=depth)
    assert streamed(applied.model) == [f"layers.{index}" for index in range(6)]
    for _ in range(4):
        assert torch.equal(call(applied.model), expected)
    assert applied.details["copies"]["late"] == 0
    assert applied.details["copies"]["on_time"] == 24
    assert applied.details["num_slots"] == depth + 1


def test_the_callers_model_and_its_tensors_stay_as_they_were(offload) -> None:
    model = llama()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    applied = offload(model)
    call(applied.model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == address and torch.equal(after[name], value) for name, (address, value) in before.items())
    assert streamed(model) == []
    assert not any(isinstance(change.original, StreamedBlock) for change in applied.changes)


def test_names_classes_and_values_of_the_state_dict_stay(offload) -> None:
    model = llama()
    applied = offload(model)
    call(applied.model)
    mine, theirs = applied.model.state_dict(), model.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [name for name, _ in applied.model.named_modules()] == [name for name, _ in model.named_modules()]
    assert all(isinstance(layer, type(model.layers[0])) for layer in applied.model.layers)
    assert [parameter.requires_grad for parameter in applied.model.parameters()] == [True] * len(theirs)


def test_bytes_are_those_of_the_slots_and_of_the_pinned_memory(offload) -> None:
    model = llama()
    applied = offload(model, prefetch_depth=2)
    # The two norms of 256 bytes take the 512 of torch's own allocator.
    block = size_class_bytes(tensor_bytes(model.layers[0]) + 2 * 256)
    assert applied.details["slot_bytes"] == 3 * block
    assert applied.details["pinned_bytes"] == 6 * block
    resident = tensor_bytes(nn.ModuleList([model.embed_tokens, model.norm, model.lm_head]))
    # Host memory stands for the device here, so that both count: slots once for all blocks.
    assert tensor_bytes(applied.model, "cpu") == resident + 9 * block
    assert tensor_bytes(applied.model) == resident + 6 * block


def test_some_blocks_stay_evenly_spaced_or_excluded(offload) -> None:
    applied = offload(llama(num_layers=8), num_resident_blocks=2, exclude=["layers.7"])
    assert streamed(applied.model) == [f"layers.{index}" for index in (0, 2, 3, 4, 6)]
    assert {row.module: row.reason for row in applied.skipped} == {
        "layers.7": "excluded by pattern 'layers.7'",
        "layers.1": "one of memory.num_resident_blocks=2",
        "layers.5": "one of memory.num_resident_blocks=2",
    }
    assert torch.equal(call(applied.model), call(llama(num_layers=8)))


def test_too_few_blocks_to_stream_is_not_applicable(offload) -> None:
    applied = offload(llama(num_layers=2))
    assert applied.not_applicable == "2 blocks to stream, and the 2 slots of memory.prefetch_depth=1 would hold them all"
    assert streamed(applied.model) == []
    assert "0 blocks" in offload(nn.Linear(4, 4)).not_applicable


def test_a_pattern_that_matches_nothing_is_an_error(offload) -> None:
    with pytest.raises(NoEffectError, match="'blocks"):
        offload(llama(), include=["blocks.*"])


def test_a_cpu_has_no_memory_to_offload_to() -> None:
    backend = CpuBackend(hardware="any", on_mismatch=OnMismatch.emulate)
    step = OffloadWeights(include=[], exclude=[], prefetch_depth=1, num_resident_blocks=0)
    assert step.support(backend).reason == "not applicable on cpu"
    applied = step.apply(llama(), Context(backend, Ids()))
    assert applied.not_applicable == "offload moves weights off a CUDA device; this is cpu"


def test_training_is_not_for_it(offload) -> None:
    class Train(Ids):
        phase = "train_step"

    assert offload(llama(), Train()).not_applicable == "offloaded weights have no gradients"
    with pytest.raises(UnsupportedOperationError, match="gradients enabled"):
        Ids().call(offload(llama()).model)


class Row(Workload):
    def call(self, model: nn.Module) -> Any:
        return model(torch.linspace(-1, 1, 32).view(4, 8))

    probe = call

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        yield self.call(model)


class Part(nn.Module):
    """One block with everything at once: a tied weight, a shared one, state, a transposed weight, bytes, a scalar, nothing."""

    def __init__(self, shared: nn.Parameter) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.shared = shared
        self.turned = nn.Parameter(torch.randn(3, 8).t())
        self.codes = nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("table", torch.randn(8), persistent=False)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        assert self.turned.stride() == (1, 8)
        y = self.second(self.first(x)) @ self.turned @ self.turned.t() * self.scale + self.codes.float() * 0.01
        return self.norm(x + y @ self.shared + self.table)


class Parts(nn.Module):
    def __init__(self, num: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Parameter(torch.randn(8, 8))
        self.parts = nn.Sequential(*(Part(self.shared) for _ in range(num)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts(x) @ self.shared


def test_tied_shared_strided_integer_and_empty_tensors(offload) -> None:
    model = Parts().eval()
    expected = call(structural_clone(model), Row())
    applied = offload(model, Row())
    for _ in range(3):
        assert torch.equal(call(applied.model, Row()), expected)
    part = applied.model.parts[0]
    assert part.first.weight is part.second.weight
    assert all(part.shared is applied.model.shared for part in applied.model.parts)
    assert [row.module for row in applied.skipped] == [f"parts.{index}.shared" for index in range(5)]
    assert applied.skipped[0].reason == "shared with the rest of the model: it stays on the device"
    assert list(applied.model.state_dict()) == list(model.state_dict())


def test_what_a_block_writes_stays(offload) -> None:
    model = Parts().train()
    applied = offload(model, Row())
    plain, mine = copy.deepcopy(model).train(), applied.model.train()
    for _ in range(3):
        assert torch.equal(call(mine, Row()), call(plain, Row()))
    for name, value in plain.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value), name
    assert mine.parts[4].calls.item() == 3
    assert mine.parts[4].norm.num_batches_tracked.item() == 3


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() < 0:
            raise ArithmeticError("negative")
        if x.shape[0] == 1:
            self.weight.mul_(2)
        return x * self.weight


def test_a_block_that_writes_to_its_weights_is_an_error_and_the_write_is_undone(offload) -> None:
    model = nn.Sequential(*(Counting() for _ in range(4)))
    applied = offload(model, Row())
    with torch.inference_mode():
        with pytest.raises(UnsupportedOperationError, match=r"memory\.exclude"):
            applied.model(torch.ones(1, 8))
        assert torch.equal(applied.model(torch.ones(2, 8)), torch.ones(2, 8))


def test_an_exception_in_a_block_passes_and_the_next_call_is_right(offload) -> None:
    model = nn.Sequential(*(Counting() for _ in range(4)))
    applied = offload(model, Row())
    with torch.inference_mode():
        with pytest.raises(ArithmeticError, match="negative"):
            applied.model(-torch.ones(2, 8))
        assert torch.equal(applied.model(torch.ones(2, 8)), torch.ones(2, 8))
    assert all(torch.equal(value, torch.ones(8)) for value in applied.model.state_dict().values())


def test_weights_written_in_place_count_in_the_next_call(offload) -> None:
    model, other = llama(), llama()
    other.init_weights(1)
    applied = offload(model)
    call(applied.model)
    applied.model.load_state_dict(other.state_dict())
    assert torch.equal(call(applied.model), call(other))
    assert applied.details["copies"]["stale"] >= 1


def test_loading_a_state_dict_waits_for_copies_that_read_the_old_values(offload, lanes: Any, monkeypatch: Any) -> None:
    model, other = llama(), llama()
    other.init_weights(1)
    applied = offload(model)
    found: list[bool] = []
    names = dict(applied.model.named_parameters())

    def finish() -> None:
        found.append(all(torch.equal(names[name], value) for name, value in model.state_dict().items() if name.startswith("layers.")))

    monkeypatch.setattr(lanes, "finish", finish)
    applied.model.load_state_dict(other.state_dict())
    # The first of them before anything was written.
    assert found == [True] + [False] * 5


class Giving(nn.Module):
    """A block that returns its weight, as it is and as a view."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), value))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return x + 1, {"weight": self.weight, "prompt": self.weight.expand(2, 8)}


class Collecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Giving(10.0**index) for index in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = []
        for layer in self.layers:
            x, more = layer(x)
            given.append(more)
        return x[:2] + sum(more["weight"] + more["prompt"] for more in given)


def test_weights_that_a_block_returns_outlive_its_slot(offload) -> None:
    model = Collecting()
    assert torch.equal(call(offload(model).model, Row()), call(model, Row()))


class Holding(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.kept: Any = {"list": [self.weight], "dict": {"w": self.weight}}.get(how)
        if how == "alone":
            self.__dict__["kept"] = self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.kept[0] if isinstance(self.kept, list) else self.kept["w"] if isinstance(self.kept, dict) else self.kept
        return x @ kept.mean(0).expand(8, 8) + self.other


@pytest.mark.parametrize("how", ["alone", "list", "dict"])
def test_what_a_python_attribute_holds_too_stays_so_that_both_are_one(offload, how: str) -> None:
    applied = offload(nn.Sequential(*(Holding(how) for _ in range(5))))
    reason = "also held by the attribute 0.kept, which would not move: it stays on the device"
    assert [(row.module, row.reason) for row in applied.skipped][:1] == [("0.weight", reason)]
    assert len(streamed(applied.model)) == 5
    with torch.no_grad():
        for parameter in applied.model.parameters():
            parameter.zero_()
    assert call(applied.model, Row()).abs().max() == 0


def test_an_rnn_keeps_its_weights_and_torchscript_its_blocks(offload) -> None:
    applied = offload(nn.Sequential(*(nn.LSTM(8, 8) for _ in range(5))))
    assert "0 blocks" in applied.not_applicable
    assert applied.skipped[0].reason.startswith("also held by the attribute 0._flat_weights")
    applied = offload(nn.Sequential(*(torch.jit.script(nn.Linear(8, 8)) for _ in range(5))))
    assert {row.reason for row in applied.skipped} == {"TorchScript keeps its weights where they cannot be exchanged"}


def test_autocast_keeps_no_copies_of_weights(offload) -> None:
    model, other = (nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))) for _ in range(2))
    applied = offload(model)
    x = torch.linspace(-1, 1, 32).view(4, 8)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = other(x)
        with torch.autocast("cpu", torch.bfloat16):
            applied.model(x)
            applied.model(x)
            applied.model.load_state_dict(other.state_dict())
            assert torch.equal(applied.model(x), expected)


@pytest.mark.parametrize("how", ["replace", "move"])
def test_a_weight_that_is_replaced_or_moved_is_an_error(offload, how: str) -> None:
    applied = offload(llama())
    projection = applied.model.layers[2].mlp.up_proj
    if how == "replace":
        projection.weight = nn.Parameter(projection.weight.detach().clone())
    else:
        projection.weight.data = projection.weight.data.clone()
    with pytest.raises(UnsupportedOperationError, match=r"mlp\.up_proj\.weight of an offloaded block was replaced or moved"):
        call(applied.model)
    # The error freed the ring.
    assert call(nn.Sequential(applied.model.layers[0].mlp), Wide()).shape == (2, 64)


class Wide(Row):
    def call(self, model: nn.Module) -> Any:
        return model(torch.linspace(-1, 1, 128).view(2, 64))

    probe = call


def int8(exclude: list[str]) -> QuantizeLinears:
    return QuantizeLinears(
        include=[], exclude=exclude, dtype=None, weight=WeightConfig(format="int8"), activation=ActivationConfig(), min_features=16
    )


def test_packed_weights_of_quantized_layers_are_streamed(offload, backend: Backend) -> None:
    with torch.no_grad():
        packed = int8(["lm_head"]).apply(structural_clone(llama()), Context(backend, Ids())).model
    expected = call(packed)
    applied = offload(packed)
    assert applied.details["pinned_bytes"] < 0.4 * sum(tensor_bytes(layer) for layer in llama().layers)
    layer = applied.model.layers[0].mlp.up_proj
    assert layer.weight.data_ptr() != packed.layers[0].mlp.up_proj.weight.data_ptr()
    for _ in range(2):
        assert torch.equal(call(applied.model), expected)
    assert torch.equal(layer.dequantize(), packed.layers[0].mlp.up_proj.dequantize())


def test_threads_compute_what_one_does(offload) -> None:
    model = llama()
    applied = offload(model, prefetch_depth=2)
    expected = call(model)
    outputs: list[torch.Tensor] = []

    def loop() -> None:
        outputs.extend(call(applied.model) for _ in range(10))

    threads = [threading.Thread(target=loop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 30
    assert all(torch.equal(output, expected) for output in outputs)


def test_a_copy_has_memory_of_its_own(offload) -> None:
    applied = offload(llama())
    expected = call(applied.model)
    for copied in (copy.deepcopy(applied.model), structural_clone(applied.model)):
        assert streamed(copied) == streamed(applied.model)
        assert torch.equal(call(copied), expected)
        with torch.no_grad():
            for parameter in copied.layers.parameters():
                parameter.zero_()
        assert not torch.equal(call(copied), expected)
        assert torch.equal(call(applied.model), expected)


def test_pickle_is_refused_with_the_way_out_and_a_shallow_copy_shares_all(offload) -> None:
    applied = offload(llama())
    with pytest.raises(UnsupportedOperationError, match=r"cannot be pickled: .* save\(\), or the model's state_dict\(\)"):
        pickle.dumps(applied.model)
    expected = call(applied.model)
    applied.model.layers[2] = copy.copy(applied.model.layers[2])
    assert torch.equal(call(applied.model), expected)


def test_the_module_gate_sees_a_wrong_block(offload, lanes: Any, backend: Backend) -> None:
    model, step = llama(), Step(lanes)
    with torch.no_grad():
        applied = step.apply(structural_clone(model), Context(backend, Ids()))
        validator = ModuleValidator(budget=2.0)
        assert all(check.reached and check.passed for check in validator.check(applied.model, step, applied.changes, Ids()))
        applied.model.layers[3].mlp.up_proj.weight.mul_(1.02)
        checks = validator.check(applied.model, step, applied.changes, Ids())
    assert [check.name for check in checks if not check.passed] == ["layers.3"]


def test_the_module_gate_judges_quantized_layers_that_are_blocks_themselves(lanes: Any, backend: Backend) -> None:
    torch.manual_seed(0)
    model, step = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).eval(), Step(lanes)
    context = Context(backend, Wide())
    with torch.no_grad():
        packed = int8([]).apply(model, context).model
        applied = step.apply(structural_clone(packed), context)
        assert [change.name for change in applied.changes] == ["0", "1", "2", "3"]
        validator = ModuleValidator(budget=2.0)
        assert all(check.reached and check.passed for check in validator.check(applied.model, step, applied.changes, Wide()))
        applied.model[1].weight_scale.mul_(1.02)
        assert not all(check.passed for check in validator.check(applied.model, step, applied.changes, Wide()))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_blocks_compile_once_and_the_streaming_stays_outside(offload, backend: Backend, fullgraph: bool) -> None:
    torch.compiler.reset()
    model = llama()
    expected = call(model)
    applied = offload(model, num_resident_blocks=1)
    assert repeated_blocks(applied.model) == {f"layers.{index}" for index in range(6)}
    step = RegionalCompile(include=[], exclude=[], mode=CompileMode.default, fullgraph=fullgraph, dynamic=None)
    step.apply(applied.model, Context(backend, Ids()))
    with compile_counts() as counts:
        for _ in range(3):
            torch.testing.assert_close(call(applied.model), expected, rtol=1e-5, atol=1e-5)
    # One program for the streamed blocks, one for the block that stays.
    assert counts.compilations == 2
    assert applied.details["copies"]["late"] == 0


def test_the_whole_model_compiles_around_the_blocks(offload, backend: Backend) -> None:
    torch.compiler.reset()
    model = llama(num_layers=12)
    expected = call(model)
    applied = offload(model)
    InductorCompile(mode=CompileMode.default, fullgraph=False, dynamic=None).apply(applied.model, Context(backend, Ids()))
    with compile_counts() as counts, error_on_recompile_limit():
        for _ in range(2):
            torch.testing.assert_close(call(applied.model), expected, rtol=1e-5, atol=1e-5)
    assert counts.compilations
    assert not counts.recompilations
