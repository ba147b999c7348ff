"""The two gates of one run: collects the rows that they need, in the right order, and writes what they find into the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from kernel_pytorch.errors import VerificationError
from kernel_pytorch.optimizer import Applied, Change, Optimizer, Workload, replace_module
from kernel_pytorch.report.result import Report
from kernel_pytorch.schema import PrecisionConfig, QualityFloor, VerifyConfig
from kernel_pytorch.verify.model import (
    END_TO_END_MARGIN_DB,
    LEAST_END_TO_END_DB,
    ModelValidator,
    collect_rows,
    first_divergence,
    floors,
    rounding_floor,
    rounding_noise,
)
from kernel_pytorch.verify.module import ModuleCheck, ModuleValidator, first_tensor
from kernel_pytorch.verify.rows import agreement, relative_l2

Inference = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Evidence:
    """What the finished model is judged by. expected: the baseline's rows. stepped, call: rows and the timed call's output
    of the uncompiled steps. end_to_end_db: how near the finished model must be to those. floors: quality against the
    baseline. diverged: the first module that left it."""

    expected: torch.Tensor
    stepped: torch.Tensor
    call: torch.Tensor | None
    end_to_end_db: float
    floors: dict[str, float]
    diverged: str | None


class Gates:
    """Verification of one run. Every set of rows is collected from the same random state.

    inference: what calls that need no gradient run in, of the backend."""

    def __init__(
        self,
        verify: VerifyConfig,
        precision: PrecisionConfig,
        workload: Workload,
        report: Report,
        *,
        seed: int,
        inference: Inference = torch.inference_mode,
    ) -> None:
        self.verify, self.precision, self.workload, self.report = verify, precision, workload, report
        self._seed, self._inference = seed, inference
        self._checks: list[ModuleCheck] = []
        self._unchecked: list[str] = []

    def rows(self, model: nn.Module) -> torch.Tensor | None:
        """[rows, D] held-out outputs of `model`, or None when verification is off."""
        if not self.verify.enabled:
            return None
        with self._inference(), self._same_random_numbers():
            rows = collect_rows(model, self.workload, self.verify.num_rows)
        if not rows.numel():
            raise VerificationError(f"the workload's outputs have no values to compare: {len(rows)} rows; give it inputs that have some")
        return rows

    def baseline_rows(self, model: nn.Module) -> torch.Tensor | None:
        """Those of the untouched model, which must be numbers: infinities, as masks have them, are."""
        rows = self.rows(model)
        if rows is not None and bool(rows.isnan().any()):
            count = int(rows.isnan().any(dim=1).sum())
            raise VerificationError(f"the baseline's own outputs are NaN in {count} of {len(rows)} rows: nothing shows what is right there")
        return rows

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._seed)
            yield

    def _call(self, model: nn.Module) -> torch.Tensor | None:
        self.workload.reset()
        with self._inference(), self._same_random_numbers():
            output = first_tensor(self.workload.call(model))
        self.workload.reset()
        return None if output is None or not output.is_floating_point() else output.detach().float().cpu().clone()

    def checker(self) -> Callable[[nn.Module, Optimizer, Applied], None] | None:
        """Judges a step's replaced modules right after the step; None when verification is off."""
        if not self.verify.enabled:
            return None
        validator = ModuleValidator(budget=self.verify.budget)

        def check(model: nn.Module, optimizer: Optimizer, applied: Applied) -> None:
            if not applied.changes:
                self._unchecked.append(type(optimizer).__name__)
                return
            found = validator.check(model, optimizer, applied.changes, self.workload)
            self._checks.extend(found)
            if not any(item.reached for item in found):
                names = ", ".join(item.name for item in found[:3])
                raise VerificationError(
                    f"the workload calls none of the {len(found)} modules that {type(optimizer).__name__} changed ({names}):"
                    " nothing shows that they are right"
                )
            if not optimizer.keeps_arithmetic:
                self._require_unread(model, applied.changes, found)

        return check

    def _require_unread(self, model: nn.Module, changes: Sequence[Change], found: Sequence[ModuleCheck]) -> None:
        """Modules that are not called must not matter: a model that reads a weight of theirs would compute with codes."""
        silent = {item.name for item in found if not item.reached}
        if not silent:
            return
        uncalled = [change for change in changes if change.name in silent]
        replaced, again = self._probed(model), self._probed(model)
        for change in uncalled:
            replace_module(model, change.name, change.original)
        try:
            original = self._probed(model)
        finally:
            for change in uncalled:
                replace_module(model, change.name, change.replacement)
        # Where two runs of one model differ, by no more than those do.
        if not relative_l2(replaced, original) <= 4 * relative_l2(again, replaced):
            names = ", ".join(sorted(silent)[:3])
            raise VerificationError(
                f"{names}: the model does not call it and computes something else without its weight: a weight is read that is stored as"
                f" codes now; leave the module out with precision.exclude"
            )

    def _probed(self, model: nn.Module) -> torch.Tensor:
        """All values that the very call returns that showed what is called: other inputs may reach other modules."""
        with self._inference(), self._same_random_numbers():
            leaves = tree_leaves(self.workload.probe(model))
        values = [leaf.detach().double().cpu().reshape(-1) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return torch.cat(values) if values else torch.empty(0)

    def judge_modules(self) -> None:
        """The implementation gate over modules; names the first one, in the order of the steps, that fails."""
        gate = self.report.verification.implementation
        reached = [check for check in self._checks if check.reached]
        gate.modules_checked = len(reached)
        missed = [check.name for check in self._checks if not check.reached]
        if missed:
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
            self.report.verification.passed, self.report.verification.first_divergence = False, failed[0].name
            raise VerificationError(f"{failed[0].name} is not what its scheme computes: {failed[0].message}")

    def _noise_db(self, model: nn.Module, rows: torch.Tensor, dtype: torch.dtype) -> float:
        """How near a right result may be expected to be, when only roundings of `dtype` differ."""
        with rounding_noise(model, dtype, self._seed):
            disturbed = self.rows(model)
        assert disturbed is not None
        noise = agreement(rows, disturbed).sqnr_db
        return max(LEAST_END_TO_END_DB, min(rounding_floor(dtype).sqnr_db, noise - END_TO_END_MARGIN_DB))

    def evidence(
        self,
        baseline: nn.Module,
        stepped_model: nn.Module,
        expected: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        wraps: bool,
        quantized: bool,
    ) -> Evidence | None:
        """Rows of the uncompiled steps and what they must reach. wraps: compile or graph follow, whose arithmetic may round
        elsewhere. quantized: the precision step changed modules, so its own floors count."""
        if expected is None:
            return None
        stepped = self.rows(stepped_model)
        assert stepped is not None
        types = [dtype, *([getattr(torch, self.precision.dtype)] if self.precision.dtype else [])]
        # Outputs are rounded to the model's own type, whatever it is computed in.
        computed_in = min(types, key=lambda each: rounding_floor(each).sqnr_db)
        end_to_end_db = self._noise_db(stepped_model, stepped, computed_in) if wraps else rounding_floor(computed_in).sqnr_db
        scheme = self.precision.quality if quantized or self._unchecked else QualityFloor()
        wanted = floors(scheme, self.verify, computed_in)
        if self._unchecked and not self._checks:
            self._judge_whole_step(baseline, expected, stepped, computed_in)
        return Evidence(
            expected,
            stepped,
            self._call(stepped_model),
            end_to_end_db,
            wanted,
            self._diverged(baseline, stepped_model, expected, stepped, wanted),
        )

    def _judge_whole_step(self, baseline: nn.Module, expected: torch.Tensor, stepped: torch.Tensor, dtype: torch.dtype) -> None:
        """A step that changes the model as a whole (a cast) may move it by roundings of the dtype it computes in."""
        gate = self.report.verification.implementation
        needed = self._noise_db(baseline, expected, dtype)
        found = agreement(expected, stepped).sqnr_db
        gate.passed = bool(found >= needed)
        if not gate.passed:
            gate.message = f"{self._unchecked[0]} moves the model to {found:.1f} dB; rounding alone explains {needed:.1f} dB"
            self.report.verification.passed = False
            raise VerificationError(gate.message)

    def _diverged(
        self, baseline: nn.Module, stepped_model: nn.Module, expected: torch.Tensor, stepped: torch.Tensor, wanted: dict[str, float]
    ) -> str | None:
        """The first module that left the baseline, looked for only when the rows miss a floor."""
        found = agreement(expected, stepped)
        if not self.workload.trained or (found.sqnr_db >= wanted["sqnr_db"] and found.cosine_min >= wanted["cosine_min"]):
            return None
        # A row at cosine c from the baseline's has a noise of about 2 (1 - c) of its power.
        by_cosine = -10 * math.log10(max(2 * (1 - wanted["cosine_min"]), 1e-12))
        floor_db = wanted["sqnr_db"] if not found.sqnr_db >= wanted["sqnr_db"] else by_cosine
        with self._inference(), self._same_random_numbers():
            return first_divergence(baseline, stepped_model, self.workload, floor_db=floor_db)

    def judge_model(self, model: nn.Module, evidence: Evidence | None) -> None:
        """The end-to-end part of the implementation gate, on held-out rows and on the timed call itself; then quality."""
        verification, workload = self.report.verification, self.workload
        if evidence is None:
            return
        actual = self.rows(model)
        assert actual is not None
        gate, needed = verification.implementation, evidence.end_to_end_db
        found = [agreement(evidence.stepped, actual).sqnr_db]
        timed = self._call(model)
        if timed is not None and evidence.call is not None and timed.numel():
            found.append(agreement(_flat(evidence.call), _flat(timed)).sqnr_db)
        gate.end_to_end_sqnr_db, gate.end_to_end_floor_db = _least(found), needed
        misses = ModelValidator(floors=evidence.floors, gated=workload.trained).judge(
            evidence.expected, actual, logits=workload.logits, into=verification
        )
        verification.held_out = workload.has_held_out
        verification.first_divergence = evidence.diverged
        self._say_what_was_not_judged()
        verification.passed = gate.passed = all(value >= needed for value in found)
        if not gate.passed:
            gate.message = (
                f"the finished model is {_least(found):.1f} dB from its own uncompiled steps; at least {needed:.1f} dB is needed"
                " (does it draw random numbers or keep state between calls?)"
            )
            raise VerificationError(gate.message)
        if misses:
            verification.passed = False
            verification.message = "; ".join(misses)
            where = f"; first diverging module: {evidence.diverged}" if evidence.diverged else ""
            raise VerificationError(f"{verification.message}{where}")

    def _say_what_was_not_judged(self) -> None:
        rows, warnings = self.report.verification.rows, self.report.warnings
        if not self.workload.has_held_out:
            warnings.append("verified on the timed inputs: no held-out inputs were given")
        if rows < self.verify.num_rows:
            warnings.append(f"{rows} rows were compared; verify.num_rows asks for {self.verify.num_rows}")
        if self.verify.top1_agreement is not None and not self.workload.logits:
            warnings.append("verify.top1_agreement was not judged: the outputs are not logits")
        asked = [name for name in ("cosine_min", "sqnr_db", "max_abs") if getattr(self.verify, name) is not None]
        if asked and not self.workload.trained:
            warnings.append(f"verify.{', verify.'.join(asked)} not judged: the weights are random")


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(1, -1)


def _least(values: Sequence[float]) -> float:
    """The smallest; nan when one is."""
    return math.nan if any(math.isnan(value) for value in values) else min(values)
