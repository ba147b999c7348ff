"""Compile steps: names stay, graphs stay off, equal blocks compile once, a missing compiler is an answer."""

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.backends.detect import plan_backend
from kernel_pytorch.compile.inductor import InductorCompile
from kernel_pytorch.compile.options import CompileSettings, compile_keywords, compile_support
from kernel_pytorch.compile.regional import RegionalCompile, repeated_blocks
from kernel_pytorch.optimizer import Context, Level, Support
from kernel_pytorch.schema import BackendConfig, CompileMode, OnMismatch
from kernel_pytorch.stance import eager_code


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.linear(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index) for index in range(4))
        self.heads = nn.ModuleList([nn.Linear(16, 2), nn.Linear(16, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.heads[0](x) + self.heads[1](x)


def backend(**facts: Any) -> CpuBackend:
    made = CpuBackend(hardware="cpu", on_mismatch=OnMismatch.emulate)
    made._facts = replace(made.facts, **facts)
    return made


def context(**facts: Any) -> Context:
    return Context(backend(**facts), None)  # type: ignore[arg-type]


needs_compiler = pytest.mark.skipif(not backend().facts.has_cxx_compiler, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("mode", list(CompileMode))
def test_whole_model(mode: CompileMode) -> None:
    torch._dynamo.reset()
    model = Stack().eval()
    names, x = list(model.state_dict()), torch.randn(3, 16)
    with torch.inference_mode():
        expected = model(x)
        applied = InductorCompile(mode=mode, fullgraph=True, dynamic=None).apply(model, context())
        torch.testing.assert_close(applied.model(x), expected)
    assert applied.model is model
    assert list(model.state_dict()) == names
    assert applied.details["options"]["triton.cudagraphs"] is False
    assert applied.num_changed == 1


@needs_compiler
def test_many_models_of_one_class_do_not_use_up_the_recompile_limit() -> None:
    torch._dynamo.reset()
    step = InductorCompile(mode=CompileMode.default, fullgraph=True, dynamic=None)
    x = torch.randn(3, 16)
    for width in range(10):
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(1 + width)]).eval()
        with torch.inference_mode():
            expected = model(x)
            torch.testing.assert_close(step.apply(model, context()).model(x), expected)


def test_repeated_blocks_are_found() -> None:
    assert repeated_blocks(Stack()) == {f"layers.{index}" for index in range(4)}
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == set()


@needs_compiler
def test_equal_blocks_compile_once() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = Stack().eval()
    with torch.inference_mode():
        x = torch.randn(3, 16)
        expected = model(x)
    step = RegionalCompile(include=[], exclude=[], mode=CompileMode.default, fullgraph=True, dynamic=None)
    applied = step.apply(model, context())
    with torch.inference_mode():
        torch.testing.assert_close(applied.model(x), expected)
    assert applied.num_changed == 4
    assert counters["stats"]["unique_graphs"] == 1


def test_a_model_without_repeats_is_not_applicable() -> None:
    step = RegionalCompile(include=[], exclude=[], mode=CompileMode.default, fullgraph=False, dynamic=None)
    assert step.apply(nn.Linear(2, 2), context()).not_applicable == "the model has no ModuleList that repeats a class"


def test_no_compiler_is_unsupported_with_the_way_out() -> None:
    support = InductorCompile(mode=CompileMode.default, fullgraph=False, dynamic=None).support(backend(has_cxx_compiler=False))
    assert support.level is Level.unsupported
    assert support.reason == "torch.compile on a CPU needs a C++ compiler (g++ or clang++), none was found; use compile=none"


def test_a_backend_cannot_turn_cuda_graphs_on() -> None:
    class Graphs(CpuBackend):
        def compile_options(self, mode: str) -> dict[str, Any]:
            return {"triton.cudagraphs": True}

    with pytest.raises(AssertionError, match="CUDA graphs belong to the group graph"):
        compile_keywords(Graphs(hardware="cpu", on_mismatch=OnMismatch.emulate), CompileSettings(), isolate=True)


BOTH = CompileSettings(combo_kernels=True, programmatic_dependent_launch=True)
JOINS = "compile.combo_kernels=true changes nothing: Inductor joins kernels of Triton, on GPUs"
STARTS = "compile.programmatic_dependent_launch=true changes nothing: "
DEVICES = [
    ("h100", {"combo_kernels": True, "triton.enable_pdl": True}, ""),
    ("b200", {"combo_kernels": True, "triton.enable_pdl": True}, ""),
    ("a100", {"combo_kernels": True}, f"{STARTS}it needs NVIDIA's sm_90 or newer, this is a100 (sm_80)"),
    ("mi300x", {"combo_kernels": True}, f"{STARTS}it needs NVIDIA's sm_90 or newer, this is mi300x (gfx942)"),
    ("tpu_v5e", {}, f"{JOINS}; {STARTS}it needs NVIDIA's sm_90 or newer, this is tpu_v5e (v5e)"),
]


@pytest.mark.parametrize(("device", "options", "reason"), DEVICES)
def test_a_setting_that_a_device_does_not_follow_is_not_passed_and_says_so(device: str, options: dict[str, bool], reason: str) -> None:
    on = plan_backend(device, BackendConfig())
    assert compile_support(on, BOTH) == Support(Level.native, reason)
    passed = compile_keywords(on, BOTH, isolate=False).get("options", {})
    assert {name: passed[name] for name in ("combo_kernels", "triton.enable_pdl") if name in passed} == options


@pytest.mark.parametrize(
    ("arch", "starts"), [("sm_89", False), ("sm_90a", True), ("sm_100a", True), ("sm_120f", True), ("sm_", False), (None, False)]
)
def test_dependent_launches_are_for_architectures_of_any_spelling(arch: str | None, starts: bool) -> None:
    on = plan_backend("h100", BackendConfig())
    on._facts = replace(on.facts, arch=arch)
    assert compile_keywords(on, BOTH, isolate=False)["options"].get("triton.enable_pdl", False) is starts


def test_on_a_cpu_both_are_left_out_and_the_model_compiles() -> None:
    on = backend(has_cxx_compiler=True)
    assert compile_support(on, CompileSettings(combo_kernels=True)) == Support(Level.native, JOINS)
    assert compile_support(on, BOTH).reason.startswith(f"{JOINS}; {STARTS}it needs")
    assert set(compile_keywords(on, BOTH, isolate=False)["options"]) == {"triton.cudagraphs", "pre_grad_custom_pass"}


def test_a_torch_without_dependent_launches_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [name for name in torch._inductor.list_options() if name != "triton.enable_pdl"]
    monkeypatch.setattr(torch._inductor, "list_options", lambda: options)
    on = plan_backend("h100", BackendConfig())
    assert compile_support(on, BOTH).reason == f"{STARTS}Inductor of torch {torch.__version__} does not know it"
    assert "triton.enable_pdl" not in compile_keywords(on, BOTH, isolate=False)["options"]


def test_threads_that_switch_compiled_code_off_take_turns() -> None:
    inside, leave, order = threading.Event(), threading.Event(), []

    def first() -> None:
        with eager_code():
            inside.set()
            leave.wait(10)
            order.append("first leaves")

    def second() -> None:
        with eager_code():
            order.append("second enters")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    time.sleep(0.05)
    leave.set()
    for thread in threads:
        thread.join()
    assert order == ["first leaves", "second enters"]
    assert torch._dynamo.eval_frame._stance.stance == "default"
