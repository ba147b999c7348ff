"""The whole model in another element type: new parameters in new modules, the originals untouched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.capabilities import cpu_has, nvidia_has
from kernel_pytorch.optimizer import Applied, Context, Level, Optimizer, Support, tensor_bytes


class CastInputs:
    """Forward pre-hook: floating-point tensors in the arguments become `dtype`, everything else passes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def _cast(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return value

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tree_map(self._cast, args), tree_map(self._cast, kwargs)


class Cast(Optimizer):
    """Parameters and floating-point buffers become `dtype`, and so do the floating-point inputs of each call."""

    def __init__(self, *, dtype: str | None) -> None:
        self.dtype_name = dtype

    def support(self, backend: Backend) -> Support:
        if self.dtype_name is None:
            return Support(Level.unsupported, "precision.dtype is null: nothing says what to cast to")
        if self.dtype_name == "float32":
            return Support(Level.native)
        facts = backend.facts
        if backend.vendor == "cpu":
            return _on_cpu(self.dtype_name, facts.isa, facts.name)
        if backend.vendor == "nvidia" and self.dtype_name == "bfloat16" and nvidia_has(facts.arch, "bf16_matmul") is False:
            return Support(Level.native, f"slowdown: bf16 matrix units need sm_80 or newer, this is {facts.name} ({facts.arch})")
        return Support(Level.native)

    def apply(self, model: nn.Module, context: Context) -> Applied:
        assert self.dtype_name is not None
        dtype = getattr(torch, self.dtype_name)
        memo: dict[int, Any] = {}
        num_cast = 0
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.dtype != dtype:
                cast = tensor.detach().to(dtype)
                memo[id(tensor)] = nn.Parameter(cast, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cast
                num_cast += 1
            else:
                memo[id(tensor)] = tensor
        if not num_cast:
            return Applied(model, not_applicable=f"the model is already {self.dtype_name}")
        # deepcopy with the casts as memo: tied tensors stay tied, and attributes that point to modules follow.
        clone = copy.deepcopy(model, memo)
        clone.register_forward_pre_hook(CastInputs(dtype), prepend=True, with_kwargs=True)
        details = {"bytes_before": tensor_bytes(model), "bytes_after": tensor_bytes(clone)}
        return Applied(clone, num_changed=num_cast, kernels=(self.dtype_name,), details=details)


def _on_cpu(dtype: str, isa: tuple[str, ...], name: str) -> Support:
    if dtype == "bfloat16" and not cpu_has(isa, "bf16_speedup"):
        return Support(
            Level.native,
            f"slowdown: {name} has no amx_bf16; bf16 ran at 0.62-0.79x of fp32 on AVX512-VNNI without AMX (MiniLM, eager and compiled)",
        )
    if dtype == "float16" and "amx_fp16" not in isa:
        return Support(
            Level.native,
            f"{name} has no float16 matrix unit (amx_fp16): memory halves, speed does not"
            " (matmuls of MiniLM's sizes ran at 0.91-1.16x of fp32 on AVX512-FP16)",
        )
    return Support(Level.native)
