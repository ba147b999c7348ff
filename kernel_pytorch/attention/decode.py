"""Sends calls of scaled_dot_product_attention with few query rows to a kernel that shares the keys among programs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from kernel_pytorch.backends import capabilities
from kernel_pytorch.backends.base import Backend
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.kernels import decode_attention
from kernel_pytorch.optimizer import Applied, Change, Context, Level, Optimizer, Skipped, Support
from kernel_pytorch.stance import eager_code

MAX_QUERY_ROWS = 16
# Two blocks: of fewer keys there is nothing to share.
MIN_KEYS = 128


class DecodeAttention(Optimizer):
    """Gives each module whose forward makes such calls a forward that redirects them around its class's own.

    The redirection is a torch function mode, which torch.compile traces: the graph holds our operator, and no function of torch is
    replaced. Calls with dropout, gradients, is_causal, 32-bit inputs or more query rows go to torch as before. The probe call
    finds the modules."""

    def support(self, backend: Backend) -> Support:
        if backend.vendor == "cpu":
            if backend.wanted_vendor not in (None, "cpu"):
                return Support(Level.emulated, "plain torch stands in for the GPU's kernel")
            return Support(Level.native, "changes nothing on a CPU: the kernel is a GPU's")
        facts = backend.facts
        if not facts.has_triton:
            return Support(Level.unsupported, f"attention=decode needs triton, which {facts.name} does not have; use attention=sdpa")
        if capabilities.has(facts.arch, "bf16_matmul"):
            return Support(Level.native)
        needed = capabilities.needs("bf16_matmul", facts.arch)
        found = f"this is {facts.name} ({facts.arch or 'unknown'})"
        return Support(Level.unsupported, f"attention=decode needs {needed}, {found}; use attention=sdpa")

    def apply(self, model: nn.Module, context: Context) -> Applied:
        if context.backend.vendor == "cpu" and not context.emulate:
            return Applied(model, not_applicable="no call of the model is on a GPU")
        before = _watch(model, context)
        if not before.calls:
            return Applied(model, not_applicable="the model never calls scaled_dot_product_attention")
        changes, skipped, expected = [], [], 0
        kernel = "reference" if context.emulate else "decode_attention"
        for name, reasons in before.calls.items():
            reason = "makes calls outside the forward of its modules" if name is None else _why_not(model, name, reasons)
            if name is None or reason:
                skipped.append(Skipped(name or type(model).__name__, reason))
                continue
            assert name is not None
            module = model.get_submodule(name)
            changes.append(Change(name, _as_it_is(module), module, kernel))
            expected += reasons[""]
        for change in changes:
            change.replacement.forward = MethodType(_FORWARDS[context.emulate], change.replacement)
        reached = before.total() - _watch(model, context).total() if changes else 0
        if reached < expected:
            raise UnsupportedOperationError(
                f"attention=decode reaches {reached} of the {expected} calls of {type(model).__name__} that it is made for"
            )
        others = sum(before.calls.values(), Counter())
        num_calls = others.total()
        del others[""]
        details = {
            "modules": sorted(change.name for change in changes),
            "num_calls": num_calls,
            "num_redirected_calls": reached,
            "other_calls": dict(sorted(others.items())),
        }
        return Applied(model, changes, skipped, details=details)


def refusal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    on_gpu: bool = True,
) -> str:
    """Why torch keeps a call with these arguments of scaled_dot_product_attention; empty where the kernel takes it.
    on_gpu: as the kernel must be; its plain-torch reference need not."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if on_gpu and not query.is_cuda:
        return "not on a GPU"
    if dropout_p or is_causal:
        return "dropout" if dropout_p else "is_causal"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "needs gradients"
    if any(tensor.dtype != query.dtype for tensor in (key, value)) or query.dtype not in decode_attention.DTYPES:
        return "not 16-bit"
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return "not [B, heads, tokens, D] with one D and one B"
    if query.shape[1] != key.shape[1] and not (enable_gqa and query.shape[1] % key.shape[1] == 0):
        return "heads that do not match"
    if query.shape[3] > decode_attention.MAX_HEAD_DIM or any(tensor.stride(3) != 1 for tensor in (query, key, value)):
        return "a head dimension that is not contiguous or too wide"
    if not 0 < query.shape[2] <= MAX_QUERY_ROWS or query.shape[0] == 0:
        return f"not 1 to {MAX_QUERY_ROWS} query rows"
    return "" if key.shape[2] >= MIN_KEYS else f"fewer than {MIN_KEYS} keys"


class _Redirect(TorchFunctionMode):
    """The calls that the kernel takes go to `attend`, all others where they went before."""

    def __init__(self, attend: Callable[..., torch.Tensor], on_gpu: bool) -> None:
        super().__init__()
        self.attend, self.on_gpu = attend, on_gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or refusal(*args, **kwargs, on_gpu=self.on_gpu):
            return func(*args, **kwargs)
        return _redirected(self.attend, *args, **kwargs)


def _redirected(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    return attend(query, key, value, attn_mask, scale=scale)


def _forward_with(attend: Callable[..., torch.Tensor], on_gpu: bool) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Redirect(attend, on_gpu):
            return type(self).forward(self, *args, **kwargs)

    return forward


# By whether plain torch emulates the kernel.
_FORWARDS = {False: _forward_with(decode_attention.attention, True), True: _forward_with(decode_attention.reference, False)}


class _SdpaCalls(TorchFunctionMode):
    """Calls of scaled_dot_product_attention that reach torch, by the module whose forward makes them: how many the kernel takes,
    under an empty reason, and how many it leaves for which reason. None: outside the forward of any module."""

    def __init__(self, model: nn.Module, on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu
        self.calls: dict[str | None, Counter[str]] = {}
        self._running: list[str | None] = [None]
        self._hooks = [
            hook
            for name, module in model.named_modules()
            for hook in (
                module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)),
                module.register_forward_hook(lambda *_: self._leave(), always_call=True),
            )
        ]

    def _leave(self) -> None:
        self._running.pop()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def total(self) -> int:
        return sum(reasons.total() for reasons in self.calls.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self.calls.setdefault(self._running[-1], Counter())[refusal(*args, **kwargs, on_gpu=self.on_gpu)] += 1
        return func(*args, **kwargs)


def _watch(model: nn.Module, context: Context) -> _SdpaCalls:
    """What one probe call, which runs uncompiled, does with scaled_dot_product_attention."""
    watch = _SdpaCalls(model, on_gpu=not context.emulate)
    try:
        with torch.inference_mode(), eager_code(), watch:
            context.workload.probe(model)
    finally:
        watch.close()
    return watch


def _why_not(model: nn.Module, name: str, reasons: Counter[str]) -> str:
    """Why all calls of one module, `reasons` as the probe counted them, stay torch's; empty where some are redirected."""
    if not reasons[""]:
        return ", ".join(sorted(reasons))
    return "has a forward of its own that is not its class's" if "forward" in model.get_submodule(name).__dict__ else ""


def _as_it_is(module: nn.Module) -> nn.Module:
    """A module of its own with the same parameters and children, which keeps the forward that `module` has now."""
    twin = copy.copy(module)
    for key, value in module.__dict__.items():
        # Hooks and children that one gets later are not the other's.
        if key.startswith("_") and isinstance(value, dict):
            twin.__dict__[key] = value.copy()
    return twin
