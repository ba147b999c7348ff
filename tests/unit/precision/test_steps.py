"""The precision steps on models with branches, ties, odd widths and integer inputs; the caller's tensors never change."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.backends.nvidia import NvidiaBackend
from kernel_pytorch.devices import DEVICES
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.errors import NoEffectError
from kernel_pytorch.optimizer import Context, Level, Workload
from kernel_pytorch.precision.cast import Cast
from kernel_pytorch.precision.quantize import QuantizeLinears
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.precision.tf32 import Tf32Matmul, tf32_matmul
from kernel_pytorch.schema import ActivationConfig, ActivationMode, OnMismatch, WeightConfig
from kernel_pytorch.verify.module import ModuleValidator


class Tied(nn.Module):
    """An embedding whose weight is the head's, a branch, an odd width, a buffer, integer input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.up = nn.Linear(32, 65)
        self.down = nn.Linear(65, 32, bias=False)
        self.narrow = nn.Linear(32, 2)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(32))
        self.register_buffer("steps", torch.arange(3))

    def forward(self, ids: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(ids) + self.shift
        x = x + (self.down(torch.relu(self.up(x))) if ids.shape[-1] > 1 else x)
        x = x * self.narrow(x).softmax(-1)[..., :1]
        return self.head(x if extra is None else x + extra)


class Ids(Workload):
    def call(self, model: nn.Module) -> Any:
        return model(torch.arange(12).view(2, 6))

    def probe(self, model: nn.Module) -> Any:
        return model(torch.arange(20, 32).view(2, 6))

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        yield self.probe(model).flatten(0, 1).float()


def cpu(*isa: str) -> CpuBackend:
    backend = CpuBackend(hardware="cpu", on_mismatch=OnMismatch.emulate)
    if isa:
        backend._facts = replace(backend.facts, isa=isa)
    return backend


def nvidia(device: str) -> NvidiaBackend:
    backend = NvidiaBackend(hardware=device, on_mismatch=OnMismatch.emulate)
    backend.plan_for(DEVICES[device])
    return backend


def quantize(weight: str = "int8", dynamic: bool = True, **changes: Any) -> QuantizeLinears:
    mode = ActivationMode.dynamic if dynamic else ActivationMode.none
    activation = ActivationConfig(mode=mode, format=weight if dynamic else None, symmetric=weight != "int8" or not dynamic)
    settings: dict[str, Any] = {"include": [], "exclude": [], "dtype": None, "min_features": 16, **changes}
    return QuantizeLinears(weight=WeightConfig(format=weight), activation=activation, **settings)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("optimizer", [quantize(), quantize("float8_e4m3fn"), quantize(dynamic=False), Cast(dtype="bfloat16")])
def test_the_callers_model_is_bit_identical(optimizer: Any) -> None:
    model = Tied().eval()
    before = snapshot(model)
    clone = structural_clone(model)
    applied = optimizer.apply(clone, Context(cpu(), Ids()))
    Ids().call(applied.model)
    assert_untouched(model, before)
    assert type(model.up) is nn.Linear


def test_receipt_names_what_changed_and_why_the_rest_did_not() -> None:
    applied = quantize(exclude=["down"]).apply(structural_clone(Tied()), Context(cpu(), Ids()))
    assert [change.name for change in applied.changes] == ["up"]
    assert {skipped.module: skipped.reason for skipped in applied.skipped} == {
        "down": "excluded by pattern 'down'",
        "narrow": "2 features are fewer than min_features=16",
        "head": "its weight is shared with embed.weight",
    }
    assert isinstance(applied.model.up, QuantizedLinear)
    assert (applied.model.up.in_features, applied.model.up.out_features) == (32, 65)


def test_patterns_that_match_nothing_are_errors() -> None:
    with pytest.raises(NoEffectError, match=r"'layer\.9\.\*' matches no eligible module of Tied"):
        quantize(include=["layer.9.*"]).apply(structural_clone(Tied()), Context(cpu(), Ids()))


def test_hooked_subclassed_and_directly_read_linears_are_left_alone() -> None:
    class Scaled(nn.Linear):
        pass

    model = nn.ModuleDict({"sub": Scaled(32, 32), "hooked": nn.Linear(32, 32), "layer": nn.TransformerEncoderLayer(32, 2, 64)})
    model["hooked"].register_forward_hook(lambda *_: None)
    applied = quantize().apply(model, Context(cpu(), Ids()))
    assert applied.changes == []
    reasons = {skipped.module: skipped.reason for skipped in applied.skipped}
    assert reasons["sub"] == "Scaled is a subclass of nn.Linear: what it adds would be lost"
    assert reasons["hooked"] == "it has forward hooks, which may read its weight"
    assert reasons["layer.linear1"] == "nn.TransformerEncoderLayer reads its weight without calling it"


@pytest.mark.parametrize("optimizer", [quantize(), quantize("float8_e4m3fn"), quantize(dynamic=False), quantize(dtype="bfloat16")])
def test_the_implementation_gate_passes_and_catches_a_dropped_bias(optimizer: QuantizeLinears) -> None:
    context = Context(cpu(), Ids())
    applied = optimizer.apply(structural_clone(Tied()), context)
    checks = ModuleValidator(budget=2.0).check(applied.model, optimizer, applied.changes, context.workload)
    assert {check.name: check.passed for check in checks} == {"up": True, "down": True}
    applied.model.up.bias.zero_()
    checks = ModuleValidator(budget=2.0).check(applied.model, optimizer, applied.changes, context.workload)
    assert {check.name: check.passed for check in checks} == {"up": False, "down": True}


def test_kernels_follow_the_instruction_set() -> None:
    def kernels(*isa: str) -> set[str]:
        return {change.kernel for change in quantize().apply(structural_clone(Tied()), Context(cpu(*isa), Ids())).changes}

    assert kernels("avx2") == {"reference"}
    assert kernels("avx_vnni") == {"int8_mm"}
    if "avx512_vnni" in cpu().facts.isa:
        assert kernels("avx512_vnni") == {"int8_avx512_vnni"}
    emulated = quantize().apply(structural_clone(Tied()), Context(cpu(), Ids(), emulate=True))
    assert {change.kernel for change in emulated.changes} == {"reference"}


def test_support_answers_for_devices_that_are_not_here() -> None:
    assert quantize().support(cpu("avx512_vnni")).level is Level.native
    assert quantize().support(cpu("avx2")).level is Level.emulated
    assert quantize("float8_e4m3fn").support(cpu()).level is Level.emulated
    assert quantize("float8_e4m3fn").support(nvidia("h100")).level is Level.native
    refused = quantize("float8_e4m3fn").support(nvidia("a100"))
    assert refused.level is Level.emulated
    assert refused.reason == (
        "float8_e4m3fn matmul needs sm_89 or newer, or gfx950, gfx1200, gfx1201, this is a100 (sm_80); use precision=fp8_weight_only"
    )
    assert quantize("float8_e4m3fn", dynamic=False).support(nvidia("a100")).level is Level.native
    assert quantize().support(nvidia("t4")).level is Level.emulated


def test_cast_keeps_ties_integers_and_casts_inputs() -> None:
    model = Tied().eval()
    applied = Cast(dtype="bfloat16").apply(structural_clone(model), Context(cpu(), Ids()))
    cast = applied.model
    assert cast.head.weight is cast.embed.weight
    assert {name: tensor.dtype for name, tensor in cast.state_dict().items() if tensor.dtype != torch.bfloat16} == {"steps": torch.int64}
    assert applied.details["bytes_after"] * 2 == applied.details["bytes_before"] + cast.steps.nbytes
    ids, extra = torch.arange(6).view(1, 6), torch.randn(1, 6, 32)
    actual = cast(ids, extra=extra)
    assert actual.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(actual.float().flatten(), model(ids, extra).flatten(), dim=0) > 0.999
    torch._dynamo.reset()
    compiled = torch.compile(cast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, extra=extra), actual)


def test_cast_to_what_the_model_already_is_does_nothing() -> None:
    model = Tied()
    applied = Cast(dtype="float32").apply(model, Context(cpu(), Ids()))
    assert applied.model is model
    assert applied.not_applicable == "the model is already float32"


def test_bf16_on_a_cpu_without_amx_is_reported_as_a_slowdown() -> None:
    reason = Cast(dtype="bfloat16").support(cpu("avx512_vnni", "avx512_bf16")).reason
    assert reason.startswith("slowdown: ")
    assert "0.62-0.79x of fp32" in reason
    assert Cast(dtype="bfloat16").support(cpu("amx_bf16")).reason == ""


def test_tf32_restores_the_setting_also_after_an_error() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    inside: list[str] = []

    def fail() -> None:
        with tf32_matmul():
            inside.append(matmul.fp32_precision)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == ["tf32"]
    assert matmul.fp32_precision == before


def test_tf32_applies_where_it_exists() -> None:
    model = Tied()
    assert Tf32Matmul().apply(model, Context(cpu(), Ids())).not_applicable == "cpu has no TF32: float32 matmuls stay float32"
    assert Tf32Matmul().apply(model, Context(nvidia("a100"), Ids())).context is tf32_matmul
    assert Tf32Matmul().support(nvidia("t4")).level is Level.unsupported
    assert Tf32Matmul().support(nvidia("a100")).level is Level.native


def test_tf32_is_restored_when_the_last_of_overlapping_calls_leaves() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    first, second = tf32_matmul(), tf32_matmul()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert matmul.fp32_precision == "tf32"
    second.__exit__(None, None, None)
    assert matmul.fp32_precision == before
    with tf32_matmul():
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == before
