"""Replaces nn.Linear by QuantizedLinear: every quantized scheme is this step with other facts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.errors import ConfigError, NoEffectError
from kernel_pytorch.kernels import int8_linear
from kernel_pytorch.optimizer import (
    Applied,
    Change,
    Context,
    Level,
    Optimizer,
    Portable,
    Skipped,
    Support,
    names_of,
    replace_module,
    select_modules,
)
from kernel_pytorch.precision.allocation import allocate
from kernel_pytorch.precision.calibration import observe_ranges
from kernel_pytorch.precision.portable import from_portable, to_portable
from kernel_pytorch.precision.quantized_linear import InputRange, QuantizedLinear
from kernel_pytorch.precision.reference import FakeQuantLinear
from kernel_pytorch.precision.storage import LARGEST
from kernel_pytorch.precision.support import linear_support, unread_settings
from kernel_pytorch.schema import KEEP, ActivationConfig, ActivationMode, AllocationConfig, WeightConfig


@dataclass(frozen=True)
class _Choice:
    """How one layer is stored, and what calibration saw of its inputs when its activations are static."""

    weight: WeightConfig
    calibrated: InputRange | None = None


class QuantizeLinears(Optimizer):
    """Stores Linear weights in low-bit formats and, when `activation` says so, quantizes their inputs."""

    def __init__(
        self,
        *,
        include: list[str],
        exclude: list[str],
        dtype: str | None,
        weight: WeightConfig,
        activation: ActivationConfig,
        min_features: int,
        allocation: AllocationConfig | None = None,
        num_calibration_calls: int = 32,
    ) -> None:
        self.include = include
        self.exclude = exclude
        self.dtype = None if dtype is None else getattr(torch, dtype)
        self.weight = weight
        self.activation = activation
        self.min_features = min_features
        self.allocation = allocation or AllocationConfig()
        self.num_calibration_calls = num_calibration_calls
        self._device: torch.device | None = None
        # What `apply` chose for each layer that it replaced: `reference` must imitate the same.
        self._chosen: WeakKeyDictionary[nn.Module, _Choice] = WeakKeyDictionary()

    def support(self, backend: Backend) -> Support:
        if self.weight.format is None:
            return Support(Level.unsupported, "precision.weight.format is null: nothing says what weights are stored in")
        wanted = [self.weight.format, *(text.rpartition("=")[2] for text in self.weight.assign), *self.allocation.formats]
        formats = [name for name in dict.fromkeys(wanted) if name != KEEP]
        answer = linear_support(formats, self.activation, self.dtype, backend)
        unread = unread_settings(formats, self.weight, self.activation, self.allocation, self.num_calibration_calls)
        return Support(answer.level, "; ".join(filter(None, [answer.reason, *unread])))

    def apply(self, model: nn.Module, context: Context) -> Applied:
        if context.restored is not None:
            return self._restore(model, context, context.restored)
        selection = select_modules(model, lambda _, module: isinstance(module, nn.Linear), self.include, self.exclude)
        skipped = list(selection.skipped)
        shared = shared_weights(model)
        linears: dict[str, nn.Linear] = {}
        for name, module in selection.matched.items():
            assert isinstance(module, nn.Linear)
            reason = self._why_not(model, name, module, shared)
            if reason is None:
                linears[name] = module
            else:
                skipped.append(Skipped(name, reason))
        formats, details = self._formats(model, linears, context)
        ranges: dict[str, InputRange] = {}
        if self.activation.mode is ActivationMode.static:
            ranges = observe_ranges(model, linears, context.workload, self.num_calibration_calls)
        emulate = context.emulate or self.support(context.backend).level is not Level.native
        self._device = context.backend.device
        changes: list[Change] = []
        for name, linear in linears.items():
            if formats[name] == KEEP:
                skipped.append(Skipped(name, "weight.assign keeps it"))
                continue
            if self.activation.mode is ActivationMode.static and name not in ranges:
                skipped.append(Skipped(name, "calibration saw no finite input of it, so it has no static scale"))
                continue
            choice = _Choice(replace(self.weight, format=formats[name], assign=[]), ranges.get(name))
            self._chosen[linear] = choice
            replacement = QuantizedLinear.from_linear(
                self._on_device(linear),
                choice.weight,
                self.activation,
                dtype=self.dtype,
                emulate=emulate,
                isa=context.backend.facts.isa,
                input_range=choice.calibrated,
            )
            # Where the model does not fit, its layers are packed on the device one by one, and go back.
            changes.append(Change(name, linear, replacement.to(linear.weight.device), replacement.kernel))
        for change in changes:
            replace_module(model, change.name, change.replacement)
        if selection.unmatched:
            details["exclude_matched_nothing"] = selection.unmatched
        return Applied(model, changes, skipped, details={**details, **self._details(changes, context)})

    def portable(self, model: nn.Module) -> dict[str, Portable]:
        return {name: to_portable(module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}

    def _restore(self, model: nn.Module, context: Context, restored: Mapping[str, Portable]) -> Applied:
        emulate = context.emulate or self.support(context.backend).level is not Level.native
        changes: list[Change] = []
        modules, shared = dict(model.named_modules()), shared_weights(model)
        for name, saved in restored.items():
            original = modules.get(name)
            lost = what_is_lost(model, name, original, shared) if isinstance(original, nn.Linear) else None
            if lost is not None:
                raise ConfigError(
                    f"{name}: found a layer in this model that cannot be replaced: {lost}; build it as before it was optimized"
                )
            layer = from_portable(
                name,
                saved,
                original,
                self.weight,
                self.activation,
                dtype=self.dtype,
                emulate=emulate,
                isa=context.backend.facts.isa,
            )
            changes.append(Change(name, modules[name], layer, layer.kernel))
            replace_module(model, name, layer)
        return Applied(model, changes, details=self._details(changes, context))

    def _formats(self, model: nn.Module, linears: dict[str, nn.Linear], context: Context) -> tuple[dict[str, str], dict[str, Any]]:
        """The format of each layer - the scheme's own, what `weight.assign` says, or what fits the budget best - and facts for the
        receipt."""
        # Without a layer there is nothing to allocate: why each was skipped is the engine's to say.
        if self.allocation.strategy is None or not linears:
            return assigned_formats(model, linears, self.weight), {}
        found = allocate(model, linears, self.weight, self.allocation, context.workload, context.seed)
        return found.formats, found.details()

    def _details(self, changes: list[Change], context: Context) -> dict[str, str]:
        if any(change.kernel == "int8_mm" for change in changes) and context.backend.vendor == "cpu":
            return {"kernel_choice": f"torch._int_mm: {int8_linear.choose(context.backend.facts.isa)[1]}"}
        return {}

    def _why_not(self, model: nn.Module, name: str, linear: nn.Linear, shared: dict[int, list[str]]) -> str | None:
        lost = what_is_lost(model, name, linear, shared)
        if lost is not None:
            return lost
        if not linear.weight.is_floating_point() or linear.weight.is_meta:
            return f"its weight is {linear.weight.dtype} on {linear.weight.device}"
        narrow = min(linear.in_features, linear.out_features)
        if narrow < self.min_features:
            return f"{narrow} features are fewer than min_features={self.min_features}"
        if self.weight.format == "int8" and self.activation.mode is not ActivationMode.none and linear.in_features > int8_linear.MAX_K:
            return f"{linear.in_features} inputs overflow the int32 sums of an int8 matmul"
        # NaN fails this comparison too.
        if not (linear.weight.abs() <= LARGEST).all():
            return "its weight has non-finite values or magnitudes above 2**126: no scale can store them"
        return None

    def reference(self, original: nn.Module) -> nn.Module:
        assert isinstance(original, nn.Linear)
        choice = self._chosen.get(original, _Choice(self.weight))
        calibrated = None if choice.calibrated is None else (choice.calibrated.low, choice.calibrated.high)
        return FakeQuantLinear(self._on_device(original), choice.weight, self.activation, self.dtype, calibrated)

    def _on_device(self, linear: nn.Linear) -> nn.Linear:
        """The layer, or a copy of it on the device, for one of a model that stays on the host."""
        if self._device is None or self._device.type == "cpu" or linear.weight.device.type != "cpu":
            return linear
        return copy.deepcopy(linear).to(self._device)


def assigned_formats(model: nn.Module, linears: Mapping[str, nn.Module], weight: WeightConfig) -> dict[str, str]:
    """Format by layer: the first pattern of `weight.assign` that matches it, else `weight.format`.

    A layer answers to its names and to those that were merged into it. Raises NoEffectError for a pattern that decides
    for no layer, and ConfigError where patterns want different formats for layers that were merged into one."""
    rules = [(pattern, name) for pattern, _, name in (text.rpartition("=") for text in weight.assign)]
    used: set[str] = set()
    found: dict[str, str] = {}
    names = names_of(model)
    for layer, module in linears.items():
        wanted: dict[str, str] = {}
        for own in names[id(module)]:
            rule = next((rule for rule in rules if fnmatchcase(own, rule[0])), None)
            if rule is not None:
                used.add(rule[0])
                wanted[own] = rule[1]
        if len(set(wanted.values())) > 1:
            shown = ", ".join(f"{own}={name}" for own, name in wanted.items())
            merged = f"were merged into {layer}; give them one format, or use fusion=none"
            why = merged if hasattr(module, "original_names") else f"are names of one layer, {layer}; give them one format"
            raise ConfigError(f"precision.weight.assign: {shown}, which {why}")
        found[layer] = next(iter(wanted.values()), str(weight.format))
    dead = [pattern for pattern, _ in rules if pattern not in used]
    if dead:
        shown = ", ".join(sorted(linears)[:3]) or "none"
        raise NoEffectError(
            f"precision.weight.assign: {', '.join(map(repr, dead))} decides for no layer: none matches, or an earlier pattern does;"
            f" layers are, for example, {shown}"
        )
    return found


def what_is_lost(model: nn.Module, name: str, linear: nn.Linear, shared: Mapping[int, list[str]]) -> str | None:
    """Why the model would miss this layer, whatever its weight and the scheme, or None. shared: as `shared_weights` has it."""
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is a subclass of nn.Linear: what it adds would be lost"
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "it has forward hooks, which may read its weight"
    if "forward" in vars(linear):
        return "its forward was replaced on the object: what that adds would be lost"
    if type(linear._parameters.get("weight")) is not nn.Parameter:
        return f"its weight is a {type(linear.weight).__name__} and no plain parameter"
    owners = [owner for owner in shared[id(linear.weight)] if owner != f"{name}.weight"]
    if owners:
        return f"its weight is shared with {owners[0]}"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
        return f"nn.{type(parent).__name__} reads its weight without calling it"
    return None


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each distinct parameter is registered; the same module under two names counts once."""
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{module_name}.{name}" if module_name else name)
    return owners
