"""One run: plan, baseline, apply, verify, measure, verdict. Fills in a Report as it goes, so that what was done survives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.engine.apply import CALL_GROUPS, Built, apply_calls, apply_modules, require_effect, settle_receipts
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.engine.ladder import first_call, make_arm, time_ladder
from kernel_pytorch.engine.plan import Plan, make_plan
from kernel_pytorch.engine.steps import Step, active, build_steps
from kernel_pytorch.errors import OutOfMemoryError, PerformanceError, VerificationError
from kernel_pytorch.measure.graphs import error_on_recompile_limit
from kernel_pytorch.measure.ladder import Arm, judge
from kernel_pytorch.optimizer import Applied, Context, Optimizer, Workload, tensor_bytes
from kernel_pytorch.report.progress import Progress
from kernel_pytorch.report.result import RECIPE, ModelResult, Report, WorkloadResult
from kernel_pytorch.schema import RootConfig
from kernel_pytorch.verify.model import (
    END_TO_END_MARGIN_DB,
    ModelValidator,
    collect_rows,
    first_divergence,
    floors,
    rounding_floor,
    rounding_noise,
)
from kernel_pytorch.verify.module import ModuleCheck, ModuleValidator
from kernel_pytorch.verify.rows import agreement


@dataclass(frozen=True)
class Job:
    """What to run. matches, mismatch: whether this machine is of the recipe's vendor, and the sentence if it is not."""

    config: RootConfig
    choices: dict[str, str]
    ignored: dict[str, list[str]]
    backend: Backend
    matches: bool
    mismatch: str


@dataclass(frozen=True)
class Evidence:
    """What the finished model is judged by. expected: the baseline's rows. stepped: the uncompiled steps' rows.
    end_to_end_db: how near the finished model must be to those. floors: quality against the baseline. diverged: the
    first module that left it."""

    expected: torch.Tensor
    stepped: torch.Tensor
    end_to_end_db: float
    floors: dict[str, float]
    diverged: str | None


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
        return steps, plan

    def preflight(self, required_bytes: int | None) -> None:
        """Raises OutOfMemoryError when the weights alone do not fit."""
        available = self.job.backend.available_memory_bytes()
        if required_bytes is not None and available is not None and required_bytes > available:
            raise OutOfMemoryError("the model does not fit", required_bytes=required_bytes, available_bytes=available)

    def execute(self, steps: list[Step], plan: Plan, model: nn.Module, workload: Workload, *, name: str, inplace: bool) -> nn.Module:
        """Returns the optimized model. Raises our errors after writing what was found into the report."""
        report, config = self.report, self.config
        baseline = structural_clone(model)
        dtype = _dtype_of(baseline)
        report.model = ModelResult(name, str(dtype).removeprefix("torch."), tensor_bytes(baseline))
        report.workload = WorkloadResult(workload.phase, workload.batch, workload.length, workload.tokens_per_call)
        context = Context(self.job.backend, workload, emulate=plan.emulated, seed=config.seed)
        rows = {row.group: row for row in report.steps}
        built = Built(model.eval() if inplace else structural_clone(model))
        checks: list[ModuleCheck] = []
        with self.stage("baseline"):
            expected = self._rows(baseline, workload)
        with self.stage("apply"), torch.no_grad():
            apply_modules(built, steps, context, rows, self._checker(workload, checks))
        report.model.bytes_after = tensor_bytes(built.model)
        self._judge_modules(checks)
        with self.stage("verify steps"), _entered(built):
            wraps = any(step.group in CALL_GROUPS for step, _ in active(steps)) and not plan.emulated
            evidence = self._evidence(baseline, built.model, workload, expected, dtype, wraps=wraps)
        with self.stage("compile"), error_on_recompile_limit():
            apply_calls(built, steps, context, rows)
            first = first_call(built.model, workload, self.job.backend)
        require_effect(steps, built, report.steps)
        with self.stage("verify"):
            self._judge_model(built.model, workload, evidence)
        held_bytes = settle_receipts(rows)
        if plan.emulated or not config.verify.enabled or not config.measure.enabled:
            self._say_why_untimed(plan)
        else:
            with self.stage("measure"):
                self._measure(steps, model, baseline, make_arm(RECIPE, built.model, workload, first, held_bytes), context)
        self._verdict(plan, changed=bool(active(steps)))
        return built.model

    def _rows(self, model: nn.Module, workload: Workload) -> torch.Tensor | None:
        if not self.config.verify.enabled:
            return None
        with torch.inference_mode():
            return collect_rows(model, workload, self.config.verify.num_rows)

    def _checker(self, workload: Workload, checks: list[ModuleCheck]) -> Callable[[nn.Module, Optimizer, Applied], None] | None:
        if not self.config.verify.enabled:
            return None
        validator = ModuleValidator(budget=self.config.verify.budget)

        def check(model: nn.Module, optimizer: Optimizer, applied: Applied) -> None:
            checks.extend(validator.check(model, optimizer, applied.changes, workload))

        return check

    def _judge_modules(self, checks: list[ModuleCheck]) -> None:
        """The implementation gate over modules; names the first one, in the order of the steps, that fails."""
        gate = self.report.verification.implementation
        reached = [check for check in checks if check.reached]
        gate.modules_checked = len(reached)
        if len(reached) < len(checks):
            missed = [check.name for check in checks if not check.reached]
            self.report.warnings.append(
                f"{len(missed)} changed modules are never called by the workload and were not verified: {', '.join(missed[:5])}"
            )
        if not reached:
            return
        worst = max(reached, key=lambda check: check.ratio)
        gate.worst_module, gate.worst_ratio = worst.name, worst.ratio if worst.ratio != float("inf") else None
        failed = [check for check in reached if not check.passed]
        gate.passed = not failed
        if failed:
            gate.message = failed[0].message
            verification = self.report.verification
            verification.passed, verification.first_divergence = False, failed[0].name
            raise VerificationError(f"{failed[0].name} is not what its scheme computes: {failed[0].message}")

    def _evidence(
        self,
        baseline: nn.Module,
        stepped_model: nn.Module,
        workload: Workload,
        expected: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        wraps: bool,
    ) -> Evidence | None:
        """Rows of the uncompiled steps, what rounding alone does to them, and the first module that left the baseline."""
        if expected is None:
            return None
        stepped = self._rows(stepped_model, workload)
        assert stepped is not None
        wanted = floors(self.config.precision.quality, self.config.verify, dtype)
        computed_in = getattr(torch, self.config.precision.dtype) if self.config.precision.dtype else dtype
        noise_db = math.inf
        if wraps:
            with rounding_noise(stepped_model, computed_in, self.config.seed):
                disturbed = self._rows(stepped_model, workload)
            assert disturbed is not None
            noise_db = agreement(stepped, disturbed).sqnr_db - END_TO_END_MARGIN_DB
        end_to_end_db = min(rounding_floor(computed_in).sqnr_db, noise_db)
        found = agreement(expected, stepped)
        diverged = None
        if workload.trained and not (found.sqnr_db >= wanted["sqnr_db"] and found.cosine_min >= wanted["cosine_min"]):
            # A row at cosine c from the baseline's has a noise of about 2 (1 - c) of its power.
            by_cosine = -10 * math.log10(max(2 * (1 - wanted["cosine_min"]), 1e-12))
            floor_db = wanted["sqnr_db"] if not found.sqnr_db >= wanted["sqnr_db"] else by_cosine
            with torch.inference_mode():
                diverged = first_divergence(baseline, stepped_model, workload, floor_db=floor_db)
        return Evidence(expected, stepped, end_to_end_db, wanted, diverged)

    def _judge_model(self, model: nn.Module, workload: Workload, evidence: Evidence | None) -> None:
        """The end-to-end part of the implementation gate, then the quality gate."""
        verification = self.report.verification
        if evidence is None:
            return
        actual = self._rows(model, workload)
        assert actual is not None
        gate, needed = verification.implementation, evidence.end_to_end_db
        same = agreement(evidence.stepped, actual)
        gate.end_to_end_sqnr_db, gate.end_to_end_floor_db = same.sqnr_db, needed
        validator = ModelValidator(floors=evidence.floors, gated=workload.trained)
        misses = validator.judge(evidence.expected, actual, logits=workload.logits, into=verification)
        verification.first_divergence = evidence.diverged
        verification.passed = gate.passed = bool(same.sqnr_db >= needed)
        if not gate.passed:
            gate.message = f"the finished model is {same.sqnr_db:.1f} dB from its own uncompiled steps; at least {needed:.1f} dB is needed"
            raise VerificationError(gate.message)
        if misses:
            verification.passed = False
            verification.message = "; ".join(misses)
            where = f"; first diverging module: {evidence.diverged}" if evidence.diverged else ""
            raise VerificationError(f"{verification.message}{where}")

    def _measure(self, steps: list[Step], model: nn.Module, baseline: nn.Module, arm: Arm, context: Context) -> None:
        # Eager, compiled, the recipe, and one arm a step when ablating.
        with error_on_recompile_limit(num_arms=3 + len(active(steps))):
            ladder = time_ladder(model, baseline, arm, steps, context, self.config.measure, self._note_round)
        self.report.ladder, self.report.noise = ladder.rungs, ladder.noise

    def _note_round(self, done: int, total: int) -> None:
        self._progress.note(f"round {done}/{total}")

    def _say_why_untimed(self, plan: Plan) -> None:
        if plan.emulated:
            self.report.warnings.append(f"emulated, so no speed: {plan.reason}")
        elif self.config.measure.enabled:
            self.report.warnings.append("verify=off: no speed figure without a passing verification")

    def _verdict(self, plan: Plan, *, changed: bool) -> None:
        report = self.report
        if plan.emulated:
            report.verdict, report.exit_code = "emulated", 0
            return
        if not self.config.verify.enabled:
            report.verdict, report.exit_code = "unverified", 0
            return
        missed = judge(report, self.config.measure) if report.ladder and changed else None
        if missed:
            raise PerformanceError(missed)
        report.verdict, report.exit_code = "pass", 0


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
