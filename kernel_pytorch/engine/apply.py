"""Applies steps to a clone in the one fixed order, checks each against its reference, and writes the receipts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from kernel_pytorch.backends.optimizer import HookReceipt
from kernel_pytorch.engine.steps import Step, active
from kernel_pytorch.errors import NoEffectError
from kernel_pytorch.optimizer import Applied, Context, Optimizer, tensor_bytes
from kernel_pytorch.report.result import StepResult

# Steps that wrap the call instead of replacing modules; they come last, and plain-torch emulation leaves them out.
CALL_GROUPS = ("compile", "graph")
# What a graph decision says of speed, which only a verified and timed run may show.
_SPEED = (
    *("plain_ms", "replay_ms", "plain_row_ms", "replay_row_ms", "launch_overhead_ms", "copy_ms", "speedup", "reason"),
    *("compiled_replay_ms", "eager_replay_ms", "code_reason"),
)
Contexts = list[Callable[[], AbstractContextManager[Any]]]


@dataclass
class Built:
    """A model with steps applied. contexts: to enter around its calls, outermost first."""

    model: nn.Module
    contexts: Contexts = field(default_factory=list)
    num_changed: int = 0


def apply_all(
    built: Built, steps: list[Step], context: Context, hooks: list[dict[str, Any]], *, replace: Callable[[], None], wrap: Callable[[], None]
) -> None:
    """Both halves of the engine's loop inside the backend's template, whose hooks stand before, between and after them.

    replace: applies the steps that replace modules to `built`. wrap: those that wrap its call. hooks: gets what each of the
    backend's hooks measured, as JSON types. A recipe without a step is the baseline, which no hook touches."""

    def half(work: Callable[[], None]) -> Callable[[nn.Module], nn.Module]:
        def run(model: nn.Module) -> nn.Module:
            built.model = model
            work()
            return built.model

        return run

    receipts: list[HookReceipt] = []
    template, model = context.backend.optimizer, built.model
    try:
        if not active(steps):
            half(wrap)(half(replace)(model.eval()))
        elif context.workload.phase == "train_step":
            template.optimize_for_training(model, context, replace=half(replace), wrap=half(wrap), receipts=receipts)
        else:
            template.optimize_for_inference(model, context, replace=half(replace), wrap=half(wrap), receipts=receipts)
    finally:
        hooks.extend(asdict(receipt) for receipt in receipts)


def apply_modules(
    built: Built,
    steps: Iterable[Step],
    context: Context,
    rows: dict[str, StepResult],
    check: Callable[[nn.Module, Optimizer, Applied], None] | None = None,
) -> None:
    """Applies the steps that replace modules. `check` judges each one right after it, while the originals are at hand."""
    for step, optimizer in active(list(steps)):
        if step.group in CALL_GROUPS:
            continue
        applied = optimizer.apply(built.model, context)
        _receive(built, applied, rows.get(step.group), context)
        if check is not None and (applied.changes or applied.num_changed):
            check(built.model, optimizer, applied)


def apply_calls(built: Built, steps: Iterable[Step], context: Context, rows: dict[str, StepResult]) -> None:
    """Applies the steps that wrap the call (compile, graph), then puts the contexts of all steps around it."""
    for step, optimizer in active(list(steps)):
        if step.group not in CALL_GROUPS:
            continue
        row = rows.get(step.group)
        if context.emulate:
            if row is not None:
                row.status = "not_applicable"
                row.reason = "; ".join(filter(None, [row.reason, "an emulated run measures no speed"]))
            continue
        _receive(built, optimizer.apply(built.model, context), row, context)
    enter_contexts(built)


def settle_receipts(rows: dict[str, StepResult], *, compilations: int, with_speed: bool) -> int:
    """Says in the rows of compile and graph what came of them once calls were made; returns bytes that kept graphs hold.

    compilations: frames compiled in the first call. with_speed: False takes out the times that capture decided by."""
    compiled = rows.get("compile")
    if compiled is not None and compiled.status == "applied" and not compilations:
        note = "the first call compiled nothing: this process had compiled the same code before, or compilation is disabled"
        compiled.reason = "; ".join(filter(None, [compiled.reason, note]))
    row = rows.get("graph")
    decisions = row.details.get("decisions", []) if row is not None else []
    if row is None or not decisions:
        return 0
    kept = [decision for decision in decisions if decision["captured"]]
    if not kept:
        row.status, row.changed, row.kernels = "not_applicable", 0, []
    held_bytes = row.details.get("statistics", {}).get("held_bytes", sum(decision.get("pool_bytes", 0) for decision in kept))
    if with_speed:
        row.reason = "; ".join(filter(None, [row.reason, (kept or decisions)[-1]["reason"]]))
    else:
        row.details["decisions"] = [{key: value for key, value in decision.items() if key not in _SPEED} for decision in decisions]
    return held_bytes


def enter_contexts(built: Built) -> None:
    """Makes every call of the model run inside the steps' contexts; names in state_dict stay."""
    if not built.contexts:
        return
    call = built.model._compiled_call_impl or built.model._call_impl
    for make in reversed(built.contexts):
        call = _inside(make, call)
    built.model._compiled_call_impl = call


def _inside(make: Callable[[], AbstractContextManager[Any]], inner: Callable[..., Any]) -> Callable[..., Any]:
    """`inner`, called in a context. What is here is paid in every call of an optimized model."""
    made = make()
    # What torch.inference_mode enters, in a third of the time.
    fast: Any = getattr(torch._C, "_InferenceMode", None) if type(made) is torch.inference_mode and made.mode else None

    def call(*args: Any, **kwargs: Any) -> Any:
        if fast is not None and torch.is_inference_mode_enabled() and not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        # A caller's own torch.compile knows the public name only.
        with make() if fast is None or torch.compiler.is_compiling() else fast(True):
            return inner(*args, **kwargs)

    return call


def _receive(built: Built, applied: Applied, row: StepResult | None, context: Context) -> None:
    built.model = applied.model
    if applied.context is not None:
        built.contexts.append(applied.context)
    changed = applied.num_changed or len(applied.changes)
    built.num_changed += changed
    if row is None:
        return
    row.changed = changed
    row.matched = changed + len(applied.skipped)
    row.skipped = [{"module": skipped.module, "reason": skipped.reason} for skipped in applied.skipped]
    row.bytes_before = _distinct_bytes(change.original for change in applied.changes)
    # What the group memory takes off the device is not counted; other steps may change what lies on the host and stays there.
    counted = context.backend.device.type if row.group == "memory" else None
    row.bytes_after = _distinct_bytes((change.replacement for change in applied.changes), counted)
    if not applied.changes:
        # A step that changes the model as a whole says its bytes itself.
        row.bytes_before, row.bytes_after = applied.details.get("bytes_before", 0), applied.details.get("bytes_after", 0)
    row.kernels = sorted({*applied.kernels, *(change.kernel for change in applied.changes)})
    row.details.update(applied.details)
    row.status = "applied"
    if applied.not_applicable is not None:
        row.status = "not_applicable"
        row.reason = "; ".join(filter(None, [row.reason, applied.not_applicable]))
    elif not changed:
        row.status = "not_applicable"
        alone = "" if any(applied.model.children()) else ": it has no modules inside, and the model itself is not replaced"
        why = ", ".join(sorted({skipped.reason for skipped in applied.skipped})[:3]) or f"no module that it could change{alone}"
        row.reason = "; ".join(filter(None, [row.reason, f"changed nothing: {why}"]))
    elif row.support == "emulated":
        row.status = "emulated"


def _distinct_bytes(modules: Iterable[nn.Module], device_type: str | None = None) -> int:
    return tensor_bytes(nn.ModuleList(list(modules)), device_type)


def require_effect(steps: list[Step], built: Built, rows: list[StepResult]) -> None:
    """Raises NoEffectError when the recipe has steps and none of them changed anything."""
    if not active(steps) or built.num_changed:
        return
    why = "; ".join(f"{row.group}={row.option}: {row.reason or 'changed nothing'}" for row in rows if row.optimizer)
    raise NoEffectError(f"no step of the recipe changed anything ({why})")
