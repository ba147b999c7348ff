"""Redirected attention calls: which ones, from which modules, in eager and in compiled code; on a GPU with the kernel itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.attention import decode
from kernel_pytorch.attention.decode import DecodeAttention, refusal
from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.backends.detect import plan_backend
from kernel_pytorch.backends.nvidia import NvidiaBackend
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.kernels import decode_attention
from kernel_pytorch.models.llama import Llama, LlamaConfig
from kernel_pytorch.optimizer import Applied, Context, Level, Workload
from kernel_pytorch.schema import BackendConfig, OnMismatch
from kernel_pytorch.verify.module import ModuleValidator

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Attend(nn.Module):
    """One call with a mask, one is_causal, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 64, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = F.scaled_dot_product_attention(x, keys, keys, attn_mask=mask, scale=0.5)
        y = F.scaled_dot_product_attention(y, x, x, is_causal=True)
        return self.out(y)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.causal = Attend(), Attend(), Causal()

    def forward(self, x: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.causal(self.second(self.first(x, keys, mask), keys, mask))


class Causal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class Fixed(Workload):
    def __init__(self, *args: Any) -> None:
        self.args = args

    def call(self, model: nn.Module) -> Any:
        return model(*self.args)

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        yield self.call(model).flatten(1)[:num_rows]

    def probe(self, model: nn.Module) -> Any:
        return self.call(model)


def make(on: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, keys = (torch.randn(2, 4, n, 64, generator=rng).to(on, torch.bfloat16) for n in (3, 200))
    mask = torch.zeros(1, 1, 1, 200, dtype=torch.bfloat16, device=on)
    mask[..., 150:] = -float("inf")
    return x, keys, mask


def cpu(hardware: str = "any") -> CpuBackend:
    return CpuBackend(hardware=hardware, on_mismatch=OnMismatch.emulate)


def emulated(model: nn.Module, *args: torch.Tensor) -> Applied:
    with torch.no_grad():
        return DecodeAttention().apply(model, Context(cpu("h100"), Fixed(*args), emulate=True))


def traced(model: nn.Module, *args: torch.Tensor) -> list[Any]:
    """Functions that the graphs of torch.compile call; nothing is run."""
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes)
        return lambda *_: [node.meta["example_value"].new_zeros(()) for node in graph.graph.find_nodes(op="output")[0].args[0]]

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args)
    return seen


def test_modules_with_such_calls_change_and_the_others_are_skipped_with_a_reason() -> None:
    model = Nested()
    names = list(model.state_dict())
    applied = emulated(model, *make())
    assert [(change.name, change.kernel) for change in applied.changes] == [("first", "reference"), ("second", "reference")]
    assert [(skipped.module, skipped.reason) for skipped in applied.skipped] == [("causal", "is_causal")]
    assert applied.details == {
        "modules": ["first", "second"],
        "num_calls": 5,
        "num_redirected_calls": 2,
        "other_calls": {"is_causal": 3},
    }
    assert list(model.state_dict()) == names
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0


def test_redirected_calls_give_what_torch_gives_and_the_original_stays() -> None:
    model, inputs = Nested(), make()
    with torch.no_grad():
        expected = model(*inputs)
        applied = emulated(model, *inputs)
        torch.testing.assert_close(model(*inputs), expected, rtol=2e-2, atol=2e-2)
    assert [change.original is change.replacement for change in applied.changes] == [False, False]
    assert [change.original.forward.__func__ is Attend.forward for change in applied.changes] == [True, True]  # pyright: ignore
    assert next(applied.changes[0].original.parameters()) is next(model.first.parameters())


def test_the_implementation_gate_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make()

    def worst() -> float:
        model = Nested()
        applied = emulated(model, *inputs)
        with torch.no_grad():
            return max(check.ratio for check in ModuleValidator(budget=2).check(model, DecodeAttention(), applied.changes, Fixed(*inputs)))

    assert worst() <= 1
    wrong = decode._forward_with(lambda *args, **kwargs: decode_attention.reference(*args, **kwargs) * 1.05, False)
    monkeypatch.setitem(decode._FORWARDS, True, wrong)
    assert worst() > 1


def test_compiled_code_holds_the_operator_and_torchs_other_calls() -> None:
    model, inputs = Nested(), make()
    forward = decode._forward_with(decode_attention.attention, False)
    for module in (model.first, model.second):
        module.forward = MethodType(forward, module)
    seen = traced(model, *inputs)
    names = [str(target) for target in seen]
    assert sum("decode_attention" in name for name in names) == 2
    assert sum("scaled_dot_product_attention" in name for name in names) == 3
    plain = [str(target) for target in traced(Nested(), *inputs)]
    assert sum("decode_attention" in name for name in plain) == 0


@pytest.mark.parametrize("dynamic", [None, True])
def test_emulation_compiles_in_one_graph_for_each_kind_of_call(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    model, (x, keys, mask) = Nested(), make()
    emulated(model, x, keys, mask)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for rows, num_keys in ((3, 200), (5, 190), (17, 200), (3, 100)):
            given = x[:, :, :1].expand(-1, -1, rows, -1).contiguous(), keys[:, :, :num_keys].contiguous(), mask[..., :num_keys].contiguous()
            torch.testing.assert_close(compiled(*given), model(*given), rtol=2e-2, atol=2e-2)


def test_a_deep_copy_redirects_with_its_own_weights() -> None:
    model = Nested()
    emulated(model, *make())
    clone = copy.deepcopy(model)
    assert clone.first.forward.__self__ is clone.first


def test_a_model_without_attention_and_one_with_other_calls_only() -> None:
    applied = emulated(nn.Linear(8, 8), torch.ones(2, 8))
    assert applied.not_applicable == "the model never calls scaled_dot_product_attention"
    applied = emulated(Causal(), make()[0])
    assert (applied.changes, applied.skipped[0].module, applied.skipped[0].reason) == ([], "Causal", "is_causal")


def test_a_forward_of_the_instances_own_and_calls_outside_modules_are_skipped() -> None:
    model = Nested()
    model.first.forward = model.first.forward
    applied = emulated(model, *make())
    assert [skipped.reason for skipped in applied.skipped] == ["has a forward of its own that is not its class's", "is_causal"]
    assert applied.details["num_redirected_calls"] == 1


def test_calls_that_the_probe_showed_and_the_forward_does_not_reach_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode._FORWARDS, True, decode._forward_with(decode_attention.reference, True))
    with pytest.raises(UnsupportedOperationError, match="reaches 0 of the 2 calls of Nested"):
        emulated(Nested(), *make())


def test_what_torch_keeps_and_why() -> None:
    x, keys, mask = make()
    assert refusal(x, keys, keys, mask) == "not on a GPU"

    def why(query: torch.Tensor, key: torch.Tensor, **given: Any) -> str:
        return refusal(query, key, key, **given, on_gpu=False)

    assert why(x, keys, attn_mask=mask) == ""
    assert why(x, keys, dropout_p=0.1) == "dropout"
    assert why(x, keys, is_causal=True) == "is_causal"
    assert why(x.float(), keys.float()) == "not 16-bit"
    assert why(x, keys.half()) == "not 16-bit"
    assert why(x.clone().requires_grad_(), keys) == "needs gradients"
    with torch.no_grad():
        assert why(x.clone().requires_grad_(), keys) == ""
    assert why(x, keys[:, :2]) == "heads that do not match"
    assert why(x, keys[:, :2], enable_gqa=True) == ""
    assert why(x, keys[:, :3], enable_gqa=True) == "heads that do not match"
    assert why(keys[:, :, :17], keys) == "not 1 to 16 query rows"
    assert why(x, keys[:, :, :127]) == "fewer than 128 keys"
    assert why(x[0], keys[0]) == "not [B, heads, tokens, D] with one D and one B"
    assert why(x, keys.mT.contiguous().mT) == "a head dimension that is not contiguous or too wide"


@pytest.mark.parametrize(
    ("device", "level", "reason"),
    [
        ("h100", Level.native, ""),
        ("a100", Level.native, ""),
        ("mi300x", Level.native, ""),
        ("t4", Level.unsupported, "attention=decode needs sm_80 or newer, this is t4 (sm_75); use attention=sdpa"),
    ],
)
def test_support_of_a_planned_gpu(device: str, level: Level, reason: str) -> None:
    support = DecodeAttention().support(plan_backend(device, BackendConfig()))
    assert (support.level, support.reason) == (level, reason)


def test_a_cpu_has_nothing_to_change_and_emulates_a_gpus_recipe() -> None:
    assert DecodeAttention().support(cpu()).reason == "changes nothing on a CPU: the kernel is a GPU's"
    assert DecodeAttention().support(cpu("h100")).level is Level.emulated
    applied = DecodeAttention().apply(Nested(), Context(cpu(), Fixed(*make())))
    assert (applied.not_applicable, applied.changes) == ("no call of the model is on a GPU", ())


def decoder(on: str) -> tuple[Llama, Fixed]:
    """Two layers of the library's own decoder at position 150 of 200 slots."""
    config = LlamaConfig(2, 256, 8, 2, 512, 100, 32)
    model = Llama(config, dtype=torch.bfloat16, device=torch.device(on))
    model.init_weights(0)
    rng = torch.Generator().manual_seed(0)
    cache = tuple(tuple(torch.randn(3, 2, 200, 32, generator=rng).to(on, torch.bfloat16) for _ in range(2)) for _ in range(2))
    ids = torch.arange(3, device=on)[:, None]
    return model.eval(), Fixed(ids, cache, torch.tensor([150], device=on))


def test_each_layer_of_the_decoder_makes_one_redirected_call() -> None:
    model, workload = decoder("cpu")
    with torch.inference_mode():
        expected = model(*workload.args)
        applied = emulated(model, *workload.args)
        actual = model(*workload.args)
    assert applied.details["modules"] == ["layers.0.attention", "layers.1.attention"]
    assert (applied.details["num_calls"], applied.details["num_redirected_calls"]) == (2, 2)
    assert float((actual - expected).float().norm() / expected.float().norm()) < 2e-2


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("how", ["eager", "compiled", "captured"])
    def test_the_decoder_computes_the_same_with_the_kernel(self, how: str) -> None:
        torch._dynamo.reset()
        model, workload = decoder("cuda")
        with torch.inference_mode():
            expected = model(*workload.args)
            context = Context(NvidiaBackend(hardware="any", on_mismatch=OnMismatch.error), workload)
            applied = DecodeAttention().apply(model, context)
            assert applied.details["num_redirected_calls"] == 2
            checks = ModuleValidator(budget=2).check(model, DecodeAttention(), applied.changes, workload)
            assert [check.passed for check in checks] == [True, True]
            if how == "compiled":
                model.compile(fullgraph=True)
                # Compiling calls the operator too, on tensors without memory.
                model(*workload.args)
            with torch.profiler.profile() as profile:
                actual = model(*workload.args)
            if how == "captured":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    actual = model(*workload.args)
                actual.zero_()
                graph.replay()
        assert sum(event.count for event in profile.key_averages() if event.key == "kernel_pytorch::decode_attention") == 2
        assert float((actual - expected).float().norm() / expected.float().norm()) < 2e-2
