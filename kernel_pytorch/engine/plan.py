"""The plan: what each step will be on a backend, and whether the run may go on. Needs no model and no device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.engine.steps import Step, active
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.optimizer import Level, Support
from kernel_pytorch.report.result import StepResult
from kernel_pytorch.schema import ActivationMode, CompileMode, OnMismatch, RootConfig


class Effect(str, Enum):
    """What a rule does to its group's step: says something of it, leaves it out of the run, or ends the run."""

    note = "note"
    left_out = "left_out"
    excluded = "excluded"


@dataclass(frozen=True)
class Rule:
    """Two groups that affect each other. applies: to a config on a vendor. group: whose row carries the reason."""

    group: str
    applies: Callable[[RootConfig, str], bool]
    reason: str
    effect: Effect = Effect.note


_OFFLOAD = "kernel_pytorch.memory.offload.OffloadWeights"
_WHOLE_MODEL = "kernel_pytorch.compile.inductor.InductorCompile"


def _offloads(config: RootConfig, vendor: str) -> bool:
    return config.memory._target_ == _OFFLOAD and vendor not in ("cpu", "tpu")


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
    Rule(
        "graph",
        _offloads,
        "left out: a graph holds one call, and offloaded weights are fetched across calls; copies take longer than the launches it saves",
        Effect.left_out,
    ),
    Rule(
        "compile",
        lambda config, vendor: _offloads(config, vendor) and config.compile._target_ == _WHOLE_MODEL and config.compile.fullgraph,
        "compile.fullgraph=true: offloaded weights are fetched between the blocks, outside any graph; use compile=regional",
        Effect.excluded,
    ),
    Rule(
        "compile",
        lambda config, vendor: _offloads(config, vendor) and config.compile._target_ == _WHOLE_MODEL and not config.compile.fullgraph,
        "offloaded blocks are compiled one by one, as by compile=regional, and what is around them is not",
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
        rules = [rule for rule in RULES if rule.group == step.group and rule.applies(config, backend.facts.vendor)]
        rules = rules if step.optimizer is not None else []
        effects = {rule.effect for rule in rules}
        reasons = [text for text in (support.reason, *(rule.reason for rule in rules)) if text]
        rows.append(
            StepResult(
                group=step.group,
                option=step.option,
                optimizer=None if step.target is None else step.target.rsplit(".", 1)[-1],
                support=Level.unsupported.value if Effect.excluded in effects else support.level.value,
                reason="; ".join(reasons),
                status="not_applicable" if Effect.left_out in effects else "planned",
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


def without_left_out(steps: list[Step], plan: Plan) -> list[Step]:
    """The steps, with those that a rule leaves out doing nothing."""
    left_out = {row.group for row in plan.rows if row.status == "not_applicable"}
    return [replace(step, optimizer=None) if step.group in left_out else step for step in steps]
