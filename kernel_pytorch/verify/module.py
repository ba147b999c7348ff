"""The implementation gate: every replaced module against a plain-torch reference of the same scheme, on real inputs.

The reference is built from the untouched original by code that the replacement does not share, so a dropped bias, a scale
that is off or one wrong weight shows here, whatever the quality gate would have let through.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from kernel_pytorch.optimizer import Change, Optimizer, Workload
from kernel_pytorch.verify.rows import relative_l2

# Relative L2 error that any implementation may have: a few roundings of the output's element type, and for quantized
# activations the few values that float32 and float64 round to different sides.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
_QUANTIZED_ROUNDING = 1e-3
# A stored weight may differ from the reference's by this part of the row's largest weight.
_WEIGHT_TOLERANCE = 1e-5


# Calls of one module that are compared in one probe: a shared module may work on several inputs.
MAX_CALLS = 8


@dataclass(frozen=True)
class ModuleCheck:
    """ratio: our error over the error allowed; above 1 is a failure. message: what is wrong, or an empty string.
    reached: False when the workload never calls the module, so that nothing was compared."""

    name: str
    ratio: float
    message: str = ""
    reached: bool = True

    @property
    def passed(self) -> bool:
        return self.ratio <= 1


def first_tensor(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return next((tensor for tensor in map(first_tensor, output) if tensor is not None), None)
    if isinstance(output, dict):
        return first_tensor(list(output.values()))
    return None


def _cast(value: Any, to: torch.dtype, only: torch.dtype | None = None) -> Any:
    """Floating tensors in a type; only: those of that one."""
    if isinstance(value, torch.Tensor):
        return value.to(to) if value.is_floating_point() and only in (None, value.dtype) else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, to, only) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, to, only) for key, item in value.items()}
    return value


class ModuleValidator:
    """Compares replaced modules with their references while the model works on held-out inputs."""

    def __init__(self, *, budget: float) -> None:
        self.budget = budget

    def check(self, model: nn.Module, optimizer: Optimizer, changes: Sequence[Change], workload: Workload) -> list[ModuleCheck]:
        """One ModuleCheck for every change that the workload reaches, and one for every one it does not.

        model: with the replacements in place, not compiled. Runs one probe call of the workload.
        """
        checks: dict[str, ModuleCheck] = {}
        calls: dict[str, int] = {}
        handles = []
        for change in changes:
            weights = None if optimizer.keeps_arithmetic else self._check_weights(change, optimizer)
            if weights is not None:
                checks[change.name] = weights
                continue

            def compare(module: nn.Module, args: Any, kwargs: Any, output: Any, change: Change = change) -> None:
                calls[change.name] = calls.get(change.name, 0) + 1
                if calls[change.name] <= MAX_CALLS:
                    found = self._compare(change, optimizer, args, kwargs, output)
                    before = checks.get(change.name)
                    checks[change.name] = found if before is None or not found.ratio <= before.ratio else before

            handles.append(change.replacement.register_forward_hook(compare, with_kwargs=True))
        try:
            workload.probe(model)
        finally:
            for handle in handles:
                handle.remove()
        missing = [
            ModuleCheck(change.name, 0.0, "the workload never calls it", reached=False) for change in changes if change.name not in checks
        ]
        return [*checks.values(), *missing]

    def _check_weights(self, change: Change, optimizer: Optimizer) -> ModuleCheck | None:
        """Stored weights, value by value: the reference quantizes the original's weights itself."""
        dequantize = getattr(change.replacement, "dequantize", None)
        if dequantize is None:
            return None
        expected = getattr(optimizer.reference(change.original), "weight", None)
        if not isinstance(expected, torch.Tensor):
            return None
        # A layer of a model that does not fit lies on the host, where unpacking takes long.
        stored, expected = _beside(change.replacement, expected).dequantize().double(), expected.detach().double()
        if stored.shape != expected.shape:
            return ModuleCheck(change.name, float("inf"), f"stored weights have shape {tuple(stored.shape)}, not {tuple(expected.shape)}")
        largest = expected.abs().amax(dim=-1, keepdim=True).clamp_min(1e-300)
        worst = ((stored - expected).abs() / largest).max().item()
        if not worst <= _WEIGHT_TOLERANCE:
            return ModuleCheck(
                change.name,
                worst / _WEIGHT_TOLERANCE,
                f"a stored weight is off by {worst:.2%} of its row's largest; {_WEIGHT_TOLERANCE:.0e} is allowed",
            )
        return None

    def _compare(self, change: Change, optimizer: Optimizer, args: Any, kwargs: Any, output: Any) -> ModuleCheck:
        actual = first_tensor(output)
        if actual is None:
            return ModuleCheck(change.name, float("inf"), "the module returned no tensor")
        with torch.no_grad():
            low_module = _beside(optimizer.reference(change.original), (args, kwargs))
            exact = low = None
            if optimizer.keeps_arithmetic:
                exact = low = first_tensor(low_module(*args, **kwargs))
            else:
                # A reference takes float64 as a wish for exact arithmetic; a scheme computes a float64 model in what it always does.
                low = first_tensor(low_module(*_cast(args, torch.float32, torch.float64), **_cast(kwargs, torch.float32, torch.float64)))
                exact_module = _beside(optimizer.reference(change.original), (args, kwargs))
                exact = first_tensor(_as_double(exact_module)(*_cast(args, torch.float64), **_cast(kwargs, torch.float64)))
        assert low is not None
        assert exact is not None
        if actual.shape != exact.shape:
            return ModuleCheck(change.name, float("inf"), f"the output has shape {tuple(actual.shape)}, not {tuple(exact.shape)}")
        quantized = getattr(low_module, "quantizes_activations", False)
        # Scales are float32, in a float64 model too.
        dtype = torch.float32 if actual.dtype is torch.float64 and not optimizer.keeps_arithmetic else actual.dtype
        floor = max(_ROUNDING.get(dtype, 2e-6), _QUANTIZED_ROUNDING if quantized else 0.0)
        allowed = max(self.budget * relative_l2(low, exact), floor)
        error = relative_l2(actual, exact)
        ratio = error / allowed
        message = "" if ratio <= 1 else f"error {error:.2e} against the reference exceeds the budget {allowed:.2e}"
        return ModuleCheck(change.name, ratio, message)


def _beside(module: Any, inputs: Any) -> Any:
    """The module; or a copy of it on the device of the inputs, where it belongs to a model that stays on the host."""
    device = next((leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)), None)
    on_host = any(tensor.device.type == "cpu" for tensor in (*module.parameters(), *module.buffers()))
    return copy.deepcopy(module).to(device) if on_host and device is not None and device.type != "cpu" else module


def _as_double(module: nn.Module) -> nn.Module:
    """A float64 copy: the reference may be the original itself, whose parameters must stay as they are."""

    return copy.deepcopy(module).double()
