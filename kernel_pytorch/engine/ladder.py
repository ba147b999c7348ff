"""Builds the arms of the ladder: eager, compiled, the full recipe and, when asked, the recipe less one step each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.compile.inductor import InductorCompile
from kernel_pytorch.engine.apply import Built, apply_all, apply_calls, apply_modules
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.engine.steps import Step, active
from kernel_pytorch.measure.graphs import CompileCounts, compile_counts
from kernel_pytorch.measure.ladder import Arm, Ladder, measure_ladder
from kernel_pytorch.optimizer import Context, Level, Workload
from kernel_pytorch.report.result import COMPILED, RECIPE
from kernel_pytorch.schema import CompileMode, MeasureConfig

# Seconds of a first call, and what torch.compile did in it.
FirstCall = tuple[float, CompileCounts]


def first_call(model: nn.Module, workload: Workload, backend: Backend) -> FirstCall:
    """Seconds of the first call (compilation, autotuning and capture included), and what was compiled in it."""
    workload.reset()
    started = time.perf_counter()
    with compile_counts() as counts, backend.inference():
        # Held until then: XLA does not run what nobody can read.
        output = workload.call(model)
        backend.synchronize()
        del output
    return time.perf_counter() - started, counts


def make_arm(name: str, model: nn.Module, workload: Workload, backend: Backend, first: FirstCall, held_bytes: int = 0) -> Arm:
    """An arm whose first call is behind it. Graph counts are left out for an arm that compiled nothing."""
    seconds, counts = first

    def call() -> Any:
        output = workload.call(model)
        backend.flush()
        return output

    compiled = counts.compilations > 0
    return Arm(
        name,
        model,
        call,
        backend.inference,
        workload.reset,
        held_bytes=held_bytes,
        first_call_s=seconds,
        graphs=counts.graphs if compiled else None,
        graph_breaks=counts.graph_breaks if compiled else None,
    )


def compiled_baseline(steps: list[Step], context: Context) -> Step | None:
    """The compile step of the fair baseline: the recipe's own whole-model compile, else torch.compile's defaults."""
    own = next((step for step in steps if step.group == "compile" and isinstance(step.optimizer, InductorCompile)), None)
    step = own or Step("compile", "default", None, InductorCompile(mode=CompileMode.default, fullgraph=False, dynamic=None))
    assert step.optimizer is not None
    return None if step.optimizer.support(context.backend).level is Level.unsupported else step


def _with_steps(model: nn.Module, steps: list[Step], context: Context, *, hooks: bool) -> nn.Module:
    built = Built(structural_clone(model))

    def replace() -> None:
        with torch.no_grad():
            apply_modules(built, steps, context, {})

    def wrap() -> None:
        apply_calls(built, steps, context, {})

    if hooks:
        apply_all(built, steps, context, [], replace=replace, wrap=wrap)
    else:
        replace()
        wrap()
    return built.model


def time_ladder(
    baseline: nn.Module,
    called: list[Arm],
    steps: list[Step],
    context: Context,
    config: MeasureConfig,
    on_progress: Callable[[int, int], Any],
) -> Ladder:
    """Times all arms interleaved on the workload of `context`. called: eager and the full recipe, which made their first calls."""
    workload, backend = context.workload, context.backend
    between: list[Arm] = []
    variants: dict[str, list[Step]] = {}
    fair = compiled_baseline(steps, context)
    if fair is not None:
        variants[COMPILED] = [fair]
    if config.ablate and len(active(steps)) > 1:
        for left_out, _ in active(steps):
            variants[f"{RECIPE} less {left_out.group}"] = [step for step in steps if step is not left_out]
    for name, some in variants.items():
        # The fair baseline is torch.compile's own: what the backend adds to a recipe is the recipe's gain.
        variant = _with_steps(baseline, some, context, hooks=name != COMPILED)
        between.append(make_arm(name, variant, workload, backend, first_call(variant, workload, backend)))
    eager, *rest = called
    return measure_ladder(
        [eager, *between, *rest],
        config,
        synchronize=backend.synchronize,
        cuda=backend.device.type == "cuda",
        tokens_per_call=workload.tokens_per_call,
        on_progress=on_progress,
    )
