"""BackendOptimizer: in which order a vendor's hooks and the engine's steps change a model, with evidence for every hook.

The engine owns the steps and their receipts (`StepResult`): it hands the template two callables, one that replaces modules
and one that wraps the call. What a vendor adds around them are hooks: named, measured before and after, and listed as skipped
with a reason when they changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.optimizer import Context, replace_module

if TYPE_CHECKING:
    from kernel_pytorch.backends.base import Backend

Work = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Hook:
    """measure: figures of what the hook changes, JSON types with the unit in the name. act: changes the model or the device, and
    returns None, or the reason why there is nothing to do."""

    name: str
    measure: Callable[[nn.Module], dict[str, Any]]
    act: Callable[[nn.Module], str | None]


@dataclass(frozen=True)
class HookReceipt:
    """when: before, between (modules are replaced, the call is not yet wrapped) or after. before, after: what the hook
    measured around itself. skipped: why it changed nothing, or an empty string."""

    when: str
    name: str
    before: dict[str, Any]
    after: dict[str, Any]
    skipped: str = ""


class BackendOptimizer:
    """The template. A vendor overrides `before`, `between` and `after`, each the hooks of that moment in order, or only the
    facts that the hooks here ask its backend for."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def optimize_for_inference(
        self, model: nn.Module, context: Context, *, replace: Work, wrap: Work, receipts: list[HookReceipt]
    ) -> nn.Module:
        """The model in eval mode, with the engine's steps and the vendor's hooks applied.

        replace, wrap: the steps that replace modules, and those that wrap the call. receipts: gets one HookReceipt a hook, also
        of a run that raises."""
        return self._optimize(model, context, replace, wrap, receipts, training=False)

    def optimize_for_training(
        self, model: nn.Module, context: Context, *, replace: Work, wrap: Work, receipts: list[HookReceipt]
    ) -> nn.Module:
        """The same in train mode. Raises UnsupportedOperationError when the steps leave fewer trainable values than there were:
        what is stored quantized has no gradient."""
        trainable = _trainable(model)

        def checked(changed: nn.Module) -> nn.Module:
            changed = replace(changed)
            left = _trainable(changed)
            if sum(left.values()) < sum(trainable.values()):
                lost = next(name for name in trainable if name not in left)
                raise UnsupportedOperationError(
                    f"training: the steps leave {sum(left.values()):,} of {sum(trainable.values()):,} trainable values;"
                    f" {lost} is the first that has no gradient any more"
                )
            return changed

        return self._optimize(model, context, checked, wrap, receipts, training=True)

    def before(self, context: Context, *, training: bool) -> Iterable[Hook]:
        """Hooks before any step."""
        return [_mode_hook(training)]

    def between(self, context: Context, *, training: bool) -> Iterable[Hook]:
        """Hooks once modules are replaced, before the call is compiled or captured."""
        return [_layout_hook(self.backend, context, training)]

    def after(self, context: Context, *, training: bool) -> Iterable[Hook]:
        """Hooks once everything is built."""
        return [_release_hook(self.backend)]

    def _optimize(
        self, model: nn.Module, context: Context, replace: Work, wrap: Work, receipts: list[HookReceipt], *, training: bool
    ) -> nn.Module:
        self._run("before", self.before(context, training=training), model, receipts)
        model = replace(model)
        self._run("between", self.between(context, training=training), model, receipts)
        model = wrap(model)
        self._run("after", self.after(context, training=training), model, receipts)
        return model

    def _run(self, when: str, hooks: Iterable[Hook], model: nn.Module, receipts: list[HookReceipt]) -> None:
        for hook in hooks:
            before = hook.measure(model)
            reason = hook.act(model)
            after = hook.measure(model)
            # A hook's own word does not count: what it measures does.
            skipped = (reason or "it changed nothing that it measures") if before == after else ""
            receipts.append(HookReceipt(when, hook.name, before, after, skipped))


def _trainable(model: nn.Module) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _mode_hook(training: bool) -> Hook:
    def measure(model: nn.Module) -> dict[str, Any]:
        return {"num_modules_in_training": sum(module.training for module in model.modules())}

    def act(model: nn.Module) -> str | None:
        model.train(training)
        return f"the model was in {'train' if training else 'eval'} mode already"

    return Hook("mode", measure, act)


def _release_hook(backend: Backend) -> Hook:
    def measure(_: nn.Module) -> dict[str, Any]:
        stats = backend.memory.get_memory_stats()
        return {"cached_bytes": stats.cached_bytes, "pooled_bytes": stats.device.pooled_bytes + stats.pinned.pooled_bytes}

    def act(_: nn.Module) -> str | None:
        backend.memory.optimize_memory_usage()
        return "nothing is kept that could be given back"

    return Hook("release_memory", measure, act)


def _layout_hook(backend: Backend, context: Context, training: bool) -> Hook:
    """Convolutions whose weights lie as the vendor's kernels read them: else every call copies them."""
    layout = backend.conv_layout()

    def measure(model: nn.Module) -> dict[str, Any]:
        laid = sum(conv.weight.is_contiguous(memory_format=layout) for conv in _convolutions(model).values())
        return {"layout": str(layout).removeprefix("torch."), "num_convolutions": len(_convolutions(model)), "num_laid_out": laid}

    def act(model: nn.Module) -> str | None:
        if not _convolutions(model):
            return "the model has no nn.Conv2d below its root"
        if context.emulate:
            return "an emulated run keeps the model's own layout"
        if training:
            return "training updates the caller's own parameters, which a new layout would copy"
        lay_out_convolutions(model, layout)
        return "the weights lie like that already"

    return Hook("conv_layout", measure, act)


def _convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Plain ones: a subclass may do something else with its weight. Not those in modules that hold memory of their own for their
    weights: these are elsewhere between calls."""
    holders = [name for name, module in model.named_modules() if hasattr(module, "held_tensors")]
    return {
        name: module
        for name, module in model.named_modules()
        if name and type(module) is nn.Conv2d and not any(name == holder or name.startswith(f"{holder}.") for holder in holders)
    }


def lay_out_convolutions(model: nn.Module, layout: torch.memory_format) -> None:
    """Replaces plain convolutions by copies with weights in `layout`; the parameters that the caller holds stay as they are."""
    made: dict[int, nn.Parameter] = {}
    for name, conv in _convolutions(model).items():
        weight = conv.weight
        if weight.is_contiguous(memory_format=layout):
            continue
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(weight.detach().contiguous(memory_format=layout), weight.requires_grad)
        clone = copy(conv)
        clone._parameters = {**conv._parameters, "weight": made[id(weight)]}
        replace_module(model, name, clone)
