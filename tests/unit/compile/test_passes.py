"""A GELU is absorbed only where the graph proves that nothing else reads the linear layer."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.compile.inductor import InductorCompile
from kernel_pytorch.compile.passes import FuseEpilogues
from kernel_pytorch.kernels import int8_linear
from kernel_pytorch.optimizer import Context
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.schema import ActivationConfig, ActivationMode, CompileMode, OnMismatch, WeightConfig

BACKEND = CpuBackend(hardware="cpu", on_mismatch=OnMismatch.emulate)
KERNEL, REASON = int8_linear.choose(BACKEND.facts.isa)
pytestmark = pytest.mark.skipif(KERNEL is None, reason=REASON)
INT8 = ActivationConfig(mode=ActivationMode.dynamic, format="int8", symmetric=False)


class Layer(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.linear = QuantizedLinear.from_linear(nn.Linear(64, 48), WeightConfig(format="int8"), INT8, isa=BACKEND.facts.isa)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.form == "tanh":
            return F.gelu(y, approximate="tanh")
        if self.form == "read_twice":
            return F.gelu(y) + y
        if self.form == "relu":
            return F.relu(y)
        return F.gelu(y)


@pytest.mark.parametrize(("form", "absorbed"), [("erf", 1), ("tanh", 0), ("read_twice", 0), ("relu", 0)])
def test_only_a_gelu_that_alone_reads_it(form: str, absorbed: int) -> None:
    torch._dynamo.reset()
    counts: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        counts.append(int8_linear.absorb_gelu(graph.graph))
        graph.recompile()
        return graph.forward

    torch.manual_seed(0)
    model, x = Layer(form).eval(), torch.randn(5, 64)
    with torch.inference_mode():
        actual = torch.compile(model, backend=count, fullgraph=True)(x)
        torch.testing.assert_close(actual, model(x), rtol=1e-5, atol=2e-6)
    assert counts == [absorbed]


def test_the_compile_step_uses_it() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Layer("erf").eval(), torch.randn(5, 64)
    step = InductorCompile(mode=CompileMode.max_autotune, fullgraph=True, dynamic=None)
    with torch.inference_mode():
        expected = model(x)
        applied = step.apply(model, Context(BACKEND, None))  # type: ignore[arg-type]
        torch.testing.assert_close(applied.model(x), expected, rtol=1e-5, atol=2e-6)
    assert applied.details["options"]["pre_grad_custom_pass"] == "FuseEpilogues"


def test_passes_are_equal_and_name_their_sources() -> None:
    assert FuseEpilogues() == FuseEpilogues()
    assert len({FuseEpilogues(), FuseEpilogues()}) == 1
    assert FuseEpilogues().uuid() == FuseEpilogues().uuid()
    assert len(FuseEpilogues().uuid()) == 64
