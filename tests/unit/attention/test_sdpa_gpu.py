"""The attention step on CUDA: PyTorch's own reason when a backend refuses a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.attention.sdpa import SdpaBackendChoice
from kernel_pytorch.backends.nvidia import NvidiaBackend
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.optimizer import Context, Workload
from kernel_pytorch.schema import OnMismatch, SdpaBackend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Masked(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(x.shape[2], x.shape[2], device=x.device, dtype=x.dtype)
        return scaled_dot_product_attention(x, x, x, attn_mask=mask)


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(x, x, x)


class Fixed(Workload):
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def call(self, model: nn.Module) -> Any:
        return model(self.x)

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        yield self.call(model).float().cpu()

    def probe(self, model: nn.Module) -> Any:
        return self.call(model)


def apply(choice: str, model: nn.Module, x: torch.Tensor) -> None:
    backend = NvidiaBackend(hardware="any", on_mismatch=OnMismatch.error)
    SdpaBackendChoice(backend=SdpaBackend(choice)).apply(model, Context(backend, Fixed(x)))


def test_flash_with_a_mask_is_an_error_with_pytorchs_reason() -> None:
    x = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(UnsupportedOperationError, match="attn_mask") as caught:
        apply("flash", Masked(), x)
    print(caught.value)


@pytest.mark.parametrize(
    ("choice", "kernel"),
    [("flash", "flash"), ("efficient", "efficient"), ("cudnn", "cudnn"), ("math", "scaled_dot_product_attention_math")],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_chosen_kernel_runs(choice: str, kernel: str, compiled: bool) -> None:
    torch._dynamo.reset()
    model, x = Plain(), torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        if compiled:
            plain = Plain()
            plain.compile(fullgraph=True)
            plain(x)
        apply(choice, model, x)
        if compiled:
            model.compile(fullgraph=True)
        model(x)
        with torch.profiler.profile() as profile:
            model(x)
    names = [event.key for event in profile.key_averages() if "scaled_dot_product" in event.key]
    fused = [name for name in names if name.startswith("aten::_scaled_dot_product") and "math" not in name]
    if choice == "math":
        assert fused == []
    else:
        assert any(kernel in name for name in fused)
