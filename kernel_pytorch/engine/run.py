"""One run: plan, baseline, apply, verify, measure, verdict. Fills in a Report as it goes, so that what was done survives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.engine.apply import CALL_GROUPS, Built, apply_all, apply_calls, apply_modules, require_effect, settle_receipts
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.engine.gates import Evidence, Gates
from kernel_pytorch.engine.ladder import FirstCall, first_call, make_arm, time_ladder
from kernel_pytorch.engine.plan import Plan, make_plan, without_left_out
from kernel_pytorch.engine.steps import Step, active, build_steps
from kernel_pytorch.errors import OutOfMemoryError, PerformanceError, UnsupportedOperationError
from kernel_pytorch.measure.graphs import error_on_recompile_limit
from kernel_pytorch.measure.ladder import MOST_ALLOWANCE, Arm, judge
from kernel_pytorch.optimizer import Context, Workload, tensor_bytes
from kernel_pytorch.report.progress import Progress
from kernel_pytorch.report.result import EAGER, RECIPE, ModelResult, Report, StepResult, WorkloadResult
from kernel_pytorch.schema import RootConfig


@dataclass(frozen=True)
class Job:
    """What to run. matches, mismatch: whether this machine is of the recipe's vendor, and the sentence if it is not."""

    config: RootConfig
    choices: dict[str, str]
    ignored: dict[str, list[str]]
    backend: Backend
    matches: bool
    mismatch: str


class Run:
    """One model through one recipe. `report` is complete after `execute`, and as far as it got when that raises."""

    def __init__(self, job: Job, report: Report, progress: Progress) -> None:
        self.job, self.report, self.config = job, report, job.config
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with self._progress.stage(name):
                yield
        finally:
            self.report.seconds[name] = round(time.perf_counter() - started, 3)

    def plan(self) -> tuple[list[Step], Plan]:
        """Steps and plan; raises UnsupportedOperationError. Needs no model."""
        steps = build_steps(self.config, self.job.choices)
        plan = make_plan(
            steps, self.job.backend, self.config, matches=self.job.matches, mismatch=self.job.mismatch, ignored=self.job.ignored
        )
        self.report.steps = plan.rows
        return without_left_out(steps, plan), plan

    def fits(self, required_bytes: int) -> bool:
        """Whether the device has room for so many bytes; where it does not tell, it has."""
        available = self.job.backend.available_memory_bytes()
        return available is None or required_bytes <= available

    def preflight(self, required_bytes: int | None, what: str = "the model does not fit; memory=offload_weights needs less") -> None:
        """Raises OutOfMemoryError when the weights alone do not fit."""
        if required_bytes is not None and not self.fits(required_bytes):
            available = self.job.backend.available_memory_bytes() or 0
            raise OutOfMemoryError(what, required_bytes=required_bytes, available_bytes=available)

    def execute(self, steps: list[Step], plan: Plan, model: nn.Module, workload: Workload, *, name: str, inplace: bool) -> nn.Module:
        """Returns the optimized model. Raises our errors after writing what was found into the report."""
        report, config = self.report, self.config
        baseline = structural_clone(model)
        report.model = ModelResult(name, str(_dtype_of(baseline)).removeprefix("torch."), tensor_bytes(baseline))
        report.workload = WorkloadResult(workload.phase, workload.batch, workload.length, workload.tokens_per_call)
        context = Context(self.job.backend, workload, emulate=plan.emulated, seed=config.seed)
        rows = {row.group: row for row in report.steps}
        built = Built(model if inplace else structural_clone(model))
        gates = Gates(config.verify, config.precision, workload, report, seed=config.seed, inference=self.job.backend.inference)
        with self.stage("baseline"):
            eager = first_call(baseline, workload, self.job.backend)
            expected = gates.baseline_rows(baseline)
        halves = _Halves(self, steps, plan, context, rows, built, gates, baseline, expected, model if inplace else None)
        apply_all(built, steps, context, report.hooks, replace=halves.replace, wrap=halves.wrap)
        evidence, first = halves.evidence, halves.first
        assert first is not None
        require_effect(steps, built, report.steps)
        # A held-out shape that the compiler gave up on would run eagerly and pass for compiled.
        with self.stage("verify"), error_on_recompile_limit():
            gates.judge_model(built.model, evidence)
        timed = config.verify.enabled and config.measure.enabled and not plan.emulated
        held_bytes = settle_receipts(rows, compilations=first[1].compilations, with_speed=timed)
        if timed:
            backend = self.job.backend
            recipe = make_arm(RECIPE, built.model, workload, backend, first, held_bytes)
            arms = [make_arm(EAGER, baseline, workload, backend, eager), recipe]
            with self.stage("measure"):
                self._measure(steps, baseline, arms, context)
        self._say_what_is_missing(plan)
        self._verdict(plan)
        return built.model

    def _measure(self, steps: list[Step], baseline: nn.Module, arms: list[Arm], context: Context) -> None:
        # Eager, compiled, the recipe, and one arm a step when ablating.
        with error_on_recompile_limit(num_arms=3 + len(active(steps))):
            ladder = time_ladder(baseline, arms, steps, context, self.config.measure, self._note_round)
        self.report.ladder, self.report.noise = ladder.rungs, ladder.noise

    def _note_round(self, done: int, total: int) -> None:
        self._progress.note(f"round {done}/{total}")

    def _say_what_is_missing(self, plan: Plan) -> None:
        """No speed figure without a passing verification on the machine itself; and no gate that is passed by being skipped."""
        report, measure = self.report, self.config.measure
        if plan.emulated:
            report.warnings.append(f"emulated, so no speed: {plan.reason}")
        elif measure.enabled and not self.config.verify.enabled:
            report.warnings.append("verify=off: no speed figure without a passing verification")
        if measure.min_speedup is not None and not report.ladder:
            report.warnings.append("measure.min_speedup was not judged: nothing was timed")
        if report.noise is not None and abs(1 - report.noise) > MOST_ALLOWANCE:
            report.warnings.append(f"a noisy machine: eager timed twice differs by {abs(1 - report.noise):.0%}; measure again")

    def _verdict(self, plan: Plan) -> None:
        report = self.report
        missed = judge(report, self.config.measure)
        if missed:
            raise PerformanceError(missed)
        if plan.emulated:
            report.verdict = "emulated"
        else:
            report.verdict = "pass" if self.config.verify.enabled else "unverified"
        report.exit_code = 0


@dataclass
class _Halves:
    """The two halves of applying a recipe, each with what is verified right after it. inplace: the caller's model, when that is
    the one that changes. evidence, first: what the halves found, for the gates and the ladder."""

    run: Run
    steps: list[Step]
    plan: Plan
    context: Context
    rows: dict[str, StepResult]
    built: Built
    gates: Gates
    baseline: nn.Module
    expected: torch.Tensor | None
    inplace: nn.Module | None
    evidence: Evidence | None = None
    first: FirstCall | None = None

    def replace(self) -> None:
        """Steps that replace modules, judged one by one and as a whole before anything is compiled."""
        run, built = self.run, self.built
        with run.stage("apply"), torch.no_grad():
            apply_modules(built, self.steps, self.context, self.rows, self.gates.checker())
        if self.inplace is not None and built.model is not self.inplace:
            raise UnsupportedOperationError("a step makes a new model of another element type; leave out inplace")
        run.report.model.bytes_after = tensor_bytes(built.model, run.job.backend.device.type)
        self.gates.judge_modules()
        with run.stage("verify steps"), _entered(built):
            wraps = any(step.group in CALL_GROUPS for step, _ in active(self.steps)) and not self.plan.emulated
            quantized = self.rows["precision"].changed > 0
            dtype = _dtype_of(self.baseline)
            self.evidence = self.gates.evidence(self.baseline, built.model, self.expected, dtype, wraps=wraps, quantized=quantized)

    def wrap(self) -> None:
        """Steps that wrap the call, and the first call, in which they compile and capture."""
        with self.run.stage("compile"), error_on_recompile_limit():
            self.run.report.model.bytes_after = tensor_bytes(self.built.model, self.run.job.backend.device.type)
            apply_calls(self.built, self.steps, self.context, self.rows)
            self.first = first_call(self.built.model, self.context.workload, self.context.backend)


@contextmanager
def _entered(built: Built) -> Iterator[None]:
    with ExitStack() as stack:
        for make in built.contexts:
            stack.enter_context(make())
        yield


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The element type of most of the model's bytes; float32 when it has no floating parameters."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32
