"""Chooses what computes scaled_dot_product_attention around the model's own calls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from kernel_pytorch.backends import capabilities
from kernel_pytorch.backends.base import Backend
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.optimizer import Applied, Context, Level, Optimizer, Support
from kernel_pytorch.schema import SdpaBackend
from kernel_pytorch.stance import eager_code

_TORCH_NAMES = {
    SdpaBackend.math: SDPBackend.MATH,
    SdpaBackend.efficient: SDPBackend.EFFICIENT_ATTENTION,
    SdpaBackend.flash: SDPBackend.FLASH_ATTENTION,
    SdpaBackend.cudnn: SDPBackend.CUDNN_ATTENTION,
}
_CPU_BACKENDS = (SdpaBackend.auto, SdpaBackend.math, SdpaBackend.flash)
_CPU_REASON = "PyTorch's CPU has the attention backends flash and math only"
# What PyTorch says when every backend that is allowed refuses a call.
_REFUSALS = ("No available kernel", "No viable backend", "Invalid backend")


class SdpaBackendChoice(Optimizer):
    """Makes the modules that call scaled_dot_product_attention use one backend for those calls.

    Each such module gets a forward that enters `sdpa_kernel` around its class's own: torch.compile traces the choice into the
    graph. A context around compiled calls would not do: neither Dynamo's guards nor Inductor's cache keys know the choice.
    A transformers model that computes attention by itself is switched to scaled_dot_product_attention first; with
    backend=auto that switch is all there is to do. A backend that cannot run the model's calls is an
    UnsupportedOperationError with PyTorch's reason, never another backend."""

    def __init__(self, *, backend: SdpaBackend) -> None:
        self.backend = SdpaBackend(backend)

    def support(self, backend: Backend) -> Support:
        chosen = self.backend
        if backend.vendor == "cpu":
            if chosen in _CPU_BACKENDS:
                return Support(Level.native)
            # A recipe for a GPU is planned on this CPU: its numerics can be computed here, its kernel cannot.
            if backend.wanted_vendor not in (None, "cpu"):
                return Support(Level.emulated, f"{_CPU_REASON}; math stands in for {chosen.value}")
            return Support(Level.unsupported, f"attention.backend={chosen.value}: {_CPU_REASON}")
        feature = f"{chosen.value}_sdpa"
        if feature not in capabilities.NVIDIA:
            return Support(Level.native)
        facts = backend.facts
        arch = facts.arch
        if capabilities.has(arch, feature):
            return Support(Level.native)
        return Support(
            Level.unsupported,
            f"attention.backend={chosen.value} needs {capabilities.needs(feature, arch)}, this is {facts.name} ({arch or 'unknown'});"
            " use attention.backend=auto",
        )

    def apply(self, model: nn.Module, context: Context) -> Applied:
        callers = _watch(model, context, self.backend).callers
        switched = None
        if not callers:
            switched, reason = _switch_to_sdpa(model)
            if switched is None:
                return Applied(model, not_applicable=reason)
            callers = _watch(model, context, self.backend).callers
            if not callers:
                raise UnsupportedOperationError(
                    f"attention: {type(model).__name__} accepted attention implementation sdpa instead of {switched!r},"
                    " and still never calls scaled_dot_product_attention"
                )
        elif self.backend is SdpaBackend.auto:
            return Applied(model, not_applicable="already scaled_dot_product_attention; the backend is PyTorch's choice")
        details: dict[str, Any] = {"modules": sorted(callers), "replaced_implementation": switched}
        if self.backend is SdpaBackend.auto:
            return Applied(model, num_changed=len(callers), kernels=["scaled_dot_product_attention"], details=details)
        chosen = SdpaBackend.math if context.emulate else self.backend
        for name in callers:
            _override_forward(model, name, chosen)
        watch = _watch(model, context, chosen)
        if watch.num_elsewhere:
            raise UnsupportedOperationError(
                f"attention.backend={chosen.value} does not reach {watch.num_elsewhere} of {watch.num_calls} attention calls:"
                f" {type(model).__name__} makes them outside the forward of its modules; use attention.backend=auto"
            )
        kernel = "reference" if context.emulate else f"scaled_dot_product_attention[{chosen.value}]"
        return Applied(model, num_changed=len(callers), kernels=[kernel], details=details)


class _SdpaCalls(TorchFunctionMode):
    """Watches calls of scaled_dot_product_attention: how many, from which module's forward, how many of them without the
    chosen backend. Turns PyTorch's refusal of a call into our error with the reason."""

    def __init__(self, model: nn.Module, chosen: SdpaBackend) -> None:
        super().__init__()
        self.chosen = chosen
        self.num_calls = 0
        self.num_elsewhere = 0
        self.callers: dict[str, None] = {}
        self._running: list[str] = []
        self._hooks = [
            hook
            for name, module in model.named_modules()
            for hook in (
                module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)),
                module.register_forward_hook(lambda *_: _drop_last(self._running), always_call=True),
            )
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.num_calls += 1
        if self._running:
            self.callers[self._running[-1]] = None
        if self.chosen is not SdpaBackend.auto and not _only(self.chosen):
            self.num_elsewhere += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = func(*args, **kwargs)
            except RuntimeError as error:
                if not any(refusal in str(error) for refusal in _REFUSALS):
                    raise
                # PyTorch says why in warnings, one a backend that it tried.
                said = [str(warning.message).split(" (Triggered internally")[0].strip() for warning in caught]
                raise UnsupportedOperationError(
                    f"attention.backend={self.chosen.value} cannot run a call of the model with {_shapes(*args, **kwargs)}:"
                    f" {' '.join(said) or _without_words(args[0], self.chosen)}; use attention.backend=auto"
                ) from error
        for warning in caught:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result


def _watch(model: nn.Module, context: Context, chosen: SdpaBackend) -> _SdpaCalls:
    """What one probe call, which runs uncompiled, does with scaled_dot_product_attention."""
    watch = _SdpaCalls(model, chosen)
    try:
        with torch.inference_mode(), eager_code(), watch:
            context.workload.probe(model)
    finally:
        watch.close()
    return watch


def _override_forward(model: nn.Module, name: str, chosen: SdpaBackend) -> None:
    """Gives one module a forward that enters the backend around its class's own. A bound method of the instance, so that
    deepcopy of the model binds it to the copy, and the module's class and its names in state_dict stay."""
    module = model.get_submodule(name)
    if "forward" in module.__dict__:
        raise UnsupportedOperationError(
            f"attention.backend={chosen.value}: {name or type(model).__name__} has a forward of its own that is not its class's;"
            " use attention.backend=auto"
        )
    module.forward = MethodType(_FORWARDS[chosen], module)


def _forward_with(backend: SDPBackend) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel([backend]):
            return type(self).forward(self, *args, **kwargs)

    return forward


_FORWARDS = {choice: _forward_with(backend) for choice, backend in _TORCH_NAMES.items()}


def _only(chosen: SdpaBackend) -> bool:
    """Whether `chosen` is the one backend that PyTorch may use now."""
    enabled = {
        SdpaBackend.math: torch.backends.cuda.math_sdp_enabled(),
        SdpaBackend.efficient: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SdpaBackend.flash: torch.backends.cuda.flash_sdp_enabled(),
        SdpaBackend.cudnn: torch.backends.cuda.cudnn_sdp_enabled(),
    }
    return [choice for choice, is_on in enabled.items() if is_on] == [chosen]


def _drop_last(names: list[str]) -> None:
    names.pop()


def _shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, *_: Any, **__: Any) -> str:
    mask = "no mask" if attn_mask is None else f"a {str(attn_mask.dtype).removeprefix('torch.')} mask {tuple(attn_mask.shape)}"
    return f"query {tuple(query.shape)} {str(query.dtype).removeprefix('torch.')}, key {tuple(key.shape)}, {mask}"


def _without_words(query: torch.Tensor, chosen: SdpaBackend) -> str:
    if query.device.type == "cpu" and chosen not in _CPU_BACKENDS:
        return _CPU_REASON
    return "PyTorch has no kernel of that backend for it, and gives no reason"


def _switch_to_sdpa(model: nn.Module) -> tuple[str | None, str]:
    """The attention implementation that was replaced by sdpa, or None and the reason why there was nothing to switch."""
    never = "the model never calls scaled_dot_product_attention"
    switch = getattr(model, "set_attn_implementation", None)
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if switch is None or not isinstance(before, str):
        return None, never
    if before == "sdpa":
        return None, f"{never}, though its attention implementation is sdpa"
    # The switch writes to the configuration, which the clone may share with the caller's model.
    shared = _own_configs(model)
    try:
        switch("sdpa")
    except (ValueError, ImportError) as error:
        _restore_configs(shared)
        return None, f"{never}, and refuses to: {str(error).splitlines()[0]}"
    if model.config._attn_implementation != "sdpa":  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        _restore_configs(shared)
        return None, f"{never}; its attention implementation {before!r} cannot be changed"
    return before, ""


def _own_configs(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Gives the model's modules a configuration of their own, shared among them as before; returns what they had."""
    before = [(module, module.__dict__["config"]) for module in model.modules() if "config" in module.__dict__]
    memo: dict[int, Any] = {}
    for module, config in before:
        module.__dict__["config"] = copy.deepcopy(config, memo)
    return before


def _restore_configs(before: list[tuple[nn.Module, Any]]) -> None:
    for module, config in before:
        module.__dict__["config"] = config
