"""The attention step: what it counts, what it switches, what it refuses, and that compiled calls honour it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.attention.sdpa import SdpaBackendChoice
from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.backends.detect import plan_backend
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.optimizer import Applied, Context, Level, Workload
from kernel_pytorch.schema import BackendConfig, OnMismatch, SdpaBackend


class Attend(nn.Module):
    """Two attention calls over [B, N, T, H] inputs."""

    def __init__(self, mask: torch.Tensor | None = None, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.mask, self.dropout_p = mask, dropout_p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = scaled_dot_product_attention(x, x, x, attn_mask=self.mask, dropout_p=self.dropout_p)
        return nn.functional.scaled_dot_product_attention(y, x, x, is_causal=self.mask is None)


class Fixed(Workload):
    """One call with fixed positional arguments."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def call(self, model: nn.Module) -> Any:
        return model(*self.args)

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        yield self.call(model).flatten(1)[:num_rows]

    def probe(self, model: nn.Module) -> Any:
        return self.call(model)


def cpu(hardware: str = "any") -> CpuBackend:
    return CpuBackend(hardware=hardware, on_mismatch=OnMismatch.emulate)


def apply(choice: str, model: nn.Module, *args: Any, emulate: bool = False) -> Applied:
    return SdpaBackendChoice(backend=SdpaBackend(choice)).apply(model, Context(cpu(), Fixed(*args), emulate=emulate))


def heads() -> torch.Tensor:
    return torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))


def aten_ops(model: nn.Module, x: torch.Tensor) -> set[str]:
    """Names of the operations in the graphs that torch.compile traces."""
    seen: set[str] = set()

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    with torch.no_grad():
        compiled(x)
    return seen


def test_auto_has_nothing_to_do_on_a_model_that_already_calls_sdpa() -> None:
    applied = apply("auto", Attend(), heads())
    assert applied.not_applicable == "already scaled_dot_product_attention; the backend is PyTorch's choice"


def test_a_model_without_attention_is_not_applicable() -> None:
    applied = apply("math", nn.Linear(8, 8), torch.ones(2, 8))
    assert applied.not_applicable == "the model never calls scaled_dot_product_attention"


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = Attend(), Attend(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x)))


def used_backends(model: nn.Module, x: torch.Tensor) -> list[str]:
    with torch.profiler.profile() as profile, torch.inference_mode():
        model(x)
    return sorted({event.key for event in profile.key_averages() if event.key.startswith("aten::_scaled_dot_product")})


def test_the_modules_that_call_are_found_and_their_names_stay() -> None:
    model = Nested()
    names = list(model.state_dict())
    applied = apply("math", model, heads())
    assert (applied.num_changed, applied.kernels) == (2, ["scaled_dot_product_attention[math]"])
    assert applied.details["modules"] == ["first", "second"]
    assert list(model.state_dict()) == names
    assert used_backends(model, heads()) == ["aten::_scaled_dot_product_attention_math"]


def test_no_hook_is_left() -> None:
    model = Nested()
    apply("math", model, heads())
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0


def test_a_compiled_call_honours_the_choice() -> None:
    x = heads()
    flash = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert flash in aten_ops(apply("flash", Attend(), x).model, x)
    assert flash not in aten_ops(apply("math", Attend(), x).model, x)


@pytest.mark.parametrize("order", [("auto", "math", "flash"), ("math", "auto", "flash")])
def test_copies_compiled_in_one_process_do_not_share_the_choice(order: tuple[str, ...]) -> None:
    """With a context instead of a forward, the second copy ran what was compiled for the first."""
    torch._dynamo.reset()
    base, x = Nested(), heads()
    flash_calls = {}
    for choice in order:
        model = copy.deepcopy(base)
        apply(choice, model, x)
        model.compile(backend="aot_eager", fullgraph=True)
        model(x)
        flash_calls[choice] = any("flash" in name for name in used_backends(model, x))
    assert flash_calls == {"auto": True, "math": False, "flash": True}


def test_a_deep_copy_of_the_result_uses_its_own_weights() -> None:
    model = Nested()
    apply("math", model, heads())
    clone = copy.deepcopy(model)
    assert clone.first.forward.__self__ is clone.first
    assert model.first.forward.__self__ is model.first


def test_flags_are_back_after_apply_and_after_a_call() -> None:
    model = Attend()
    apply("math", model, heads())
    assert torch.backends.cuda.flash_sdp_enabled()
    model(heads())
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_call_outside_any_forward_is_an_error() -> None:
    class Method(Nested):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return scaled_dot_product_attention(self.first(x), x, x)

    class Encode(Fixed):
        def call(self, model: nn.Module) -> Any:
            return model.encode(*self.args)  # pyright: ignore[reportCallIssue]

    with pytest.raises(UnsupportedOperationError, match="does not reach 1 of 3 attention calls"):
        SdpaBackendChoice(backend=SdpaBackend.math).apply(Method(), Context(cpu(), Encode(heads())))


def test_a_forward_of_the_instances_own_is_an_error() -> None:
    model = Nested()
    model.first.forward = model.first.forward
    with pytest.raises(UnsupportedOperationError, match="first has a forward of its own"):
        apply("math", model, heads())


@pytest.mark.parametrize("choice", ["cudnn", "efficient"])
def test_a_backend_that_cannot_run_the_call_is_an_error_with_the_reason(choice: str) -> None:
    with pytest.raises(UnsupportedOperationError, match=rf"attention.backend={choice} cannot run .*\(2, 4, 6, 8\).*flash and math only"):
        apply(choice, Attend(), heads())
    assert torch.backends.cuda.math_sdp_enabled()


def test_flash_that_cannot_run_dropout_is_an_error() -> None:
    with pytest.raises(UnsupportedOperationError, match=r"attention.backend=flash cannot run .* non-zero dropout"):
        apply("flash", Attend(dropout_p=0.5), heads())


def test_errors_of_the_call_itself_pass_through() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        apply("math", Attend(mask=torch.ones(5, 5, dtype=torch.bool)), heads())


def test_emulation_uses_math_and_says_reference() -> None:
    applied = apply("cudnn", Attend(), heads(), emulate=True)
    assert applied.kernels == ["reference"]


@pytest.mark.parametrize(
    ("choice", "hardware", "level"),
    [
        ("auto", "any", Level.native),
        ("flash", "cpu", Level.native),
        ("cudnn", "cpu", Level.unsupported),
        ("efficient", "any", Level.unsupported),
        ("cudnn", "h100", Level.emulated),
    ],
)
def test_support_on_a_cpu(choice: str, hardware: str, level: Level) -> None:
    assert SdpaBackendChoice(backend=SdpaBackend(choice)).support(cpu(hardware)).level is level


@pytest.mark.parametrize(
    ("choice", "device", "level"),
    [
        ("flash", "a100", Level.native),
        ("flash", "t4", Level.unsupported),
        ("efficient", "t4", Level.native),
        ("math", "v100", Level.native),
    ],
)
def test_support_of_a_planned_gpu(choice: str, device: str, level: Level) -> None:
    support = SdpaBackendChoice(backend=SdpaBackend(choice)).support(plan_backend(device, BackendConfig()))
    assert support.level is level
    if level is Level.unsupported:
        assert support.reason == "attention.backend=flash needs sm_80 or newer, this is t4 (sm_75); use attention.backend=auto"


def test_a_transformers_model_is_switched_and_the_callers_config_is_untouched() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50, attn_implementation="eager"
    )
    model = transformers.BertModel(config).eval()
    shared = model.config
    ids = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        before = model(ids).last_hidden_state
    applied = apply("auto", model, ids)
    assert (applied.num_changed, applied.details["replaced_implementation"]) == (2, "eager")
    assert (shared._attn_implementation, model.config._attn_implementation) == ("eager", "sdpa")
    with torch.inference_mode():
        after = model(ids).last_hidden_state
    assert (after - before).norm() / before.norm() < 1e-6
