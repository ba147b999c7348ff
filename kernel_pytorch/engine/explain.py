"""What would happen, without a model: the plan for a machine or a named device, and what each shipped option can do here."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.detect import matches, plan_backend, resolve
from kernel_pytorch.engine.plan import make_plan, rows_for
from kernel_pytorch.engine.steps import build, build_steps
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.optimizer import Level, Support
from kernel_pytorch.paths import data_folder
from kernel_pytorch.report.result import StepResult
from kernel_pytorch.schema import OPTIMIZER_GROUPS, BackendConfig, RootConfig


def explain_plan(
    config: RootConfig, choices: dict[str, str], ignored: dict[str, list[str]], device: str | None
) -> tuple[list[StepResult], str]:
    """The plan's rows and one sentence on the outcome: native, emulated or unsupported, and why.

    device: a name from kernel_pytorch.devices, which need not be here; None plans for this machine."""
    if device is None:
        resolution = resolve(config.backend)
        backend, native, reason = resolution.backend, resolution.native, resolution.reason
    else:
        backend = plan_backend(device, config.backend)
        native, reason = matches(config.backend, backend)
    steps = build_steps(config, choices)
    try:
        plan = make_plan(steps, backend, config, matches=native, mismatch=reason, ignored=ignored)
    except UnsupportedOperationError as error:
        return rows_for(steps, backend, config, ignored), f"unsupported: {error}"
    return plan.rows, f"emulated: {plan.reason}" if plan.emulated else f"native: {reason}"


def option_support(backend: Backend | None = None) -> list[tuple[str, str, Support]]:
    """(group, option, answer) for every shipped option that is a step, on `backend` or on this machine."""
    backend = backend or resolve(BackendConfig()).backend
    root = OmegaConf.structured(RootConfig)
    answers = []
    for group in OPTIMIZER_GROUPS:
        for file in sorted(Path(data_folder("conf"), group).glob("*.yaml")):
            node = OmegaConf.to_object(OmegaConf.merge(root[group], OmegaConf.load(file)))
            if getattr(node, "_target_", None) is None:
                answers.append((group, file.stem, Support(Level.native, "leaves the model as it is")))
            else:
                answers.append((group, file.stem, build(group, node).support(backend)))
    return answers
