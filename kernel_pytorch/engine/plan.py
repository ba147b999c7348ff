"""The plan: what each step will be on a backend, and whether the run may go on. Needs no model and no device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.engine.steps import Step, active
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.optimizer import Level, Support
from kernel_pytorch.report.result import StepResult
from kernel_pytorch.schema import ActivationMode, CompileMode, OnMismatch, RootConfig


@dataclass(frozen=True)
class Rule:
    """Two groups that affect each other. applies: to a config on a vendor. group: whose row carries the reason."""

    group: str
    applies: Callable[[RootConfig, str], bool]
    reason: str


# What one step means for another, as data; each with the reason that the plan prints.
RULES: tuple[Rule, ...] = (
    Rule(
        "precision",
        lambda config, vendor: (
            vendor == "cpu" and config.precision.activation.mode is not ActivationMode.none and config.compile._target_ is None
        ),
        "slowdown: without compile the activations are quantized in passes of their own; use compile=default",
    ),
    Rule(
        "precision",
        lambda config, vendor: (
            config.precision.weight.format is not None
            and config.precision.activation.mode is ActivationMode.none
            and config.compile._target_ is None
        ),
        "slowdown: without compile the weights are expanded at every call; use compile=default",
    ),
    Rule(
        "compile",
        lambda config, vendor: vendor == "cpu" and config.compile.mode is CompileMode.max_autotune and config.compile._target_ is not None,
        "searches for kernels at the first call",
    ),
)


@dataclass(frozen=True)
class Plan:
    """rows: one a group, in order. emulated: the run computes with plain-torch references and times nothing.
    reason: why it is emulated."""

    rows: list[StepResult]
    emulated: bool
    reason: str = ""


def step_support(step: Step, backend: Backend) -> Support:
    """The optimizer's answer; a group without one is native by doing nothing."""
    return Support(Level.native) if step.optimizer is None else step.optimizer.support(backend)


def rows_for(steps: list[Step], backend: Backend, config: RootConfig, ignored: dict[str, list[str]]) -> list[StepResult]:
    """One StepResult a group, as planned on `backend`."""
    rows = []
    for step in steps:
        support = step_support(step, backend)
        rules = [rule.reason for rule in RULES if rule.group == step.group and rule.applies(config, backend.facts.vendor)]
        reasons = [text for text in (support.reason, *(rules if step.optimizer is not None else [])) if text]
        rows.append(
            StepResult(
                group=step.group,
                option=step.option,
                optimizer=None if step.target is None else step.target.rsplit(".", 1)[-1],
                support=support.level.value,
                reason="; ".join(reasons),
                ignored=list(ignored.get(step.group, [])),
            )
        )
    return rows


def make_plan(
    steps: list[Step], backend: Backend, config: RootConfig, *, matches: bool, mismatch: str, ignored: dict[str, list[str]]
) -> Plan:
    """Decides native, emulated or unsupported for the whole run.

    matches: this machine is of the recipe's vendor. mismatch: the sentence that says how it is not.
    Raises UnsupportedOperationError when a step can be neither, or when `backend.on_mismatch` is error.
    """
    rows = rows_for(steps, backend, config, ignored)
    foreign = [] if matches else [mismatch]
    if matches:
        for row in rows:
            if row.support == Level.unsupported.value:
                raise UnsupportedOperationError(f"{row.group}={row.option}: {row.reason}")
    short = [f"{row.group}={row.option}: {row.reason}" for row in rows if row.support == Level.emulated.value]
    reasons = [*foreign, *short]
    if reasons and config.backend.on_mismatch is OnMismatch.error:
        raise UnsupportedOperationError(f"{reasons[0]}; backend.on_mismatch=emulate runs plain-torch references instead")
    if not matches:
        for row, (step, _) in zip([row for row in rows if row.optimizer], active(steps), strict=True):
            assert row.group == step.group
            row.support = Level.emulated.value
    return Plan(rows, bool(reasons), "; ".join(reasons))
