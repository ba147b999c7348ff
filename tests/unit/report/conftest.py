"""A report that the tests of this folder print and write."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kernel_pytorch.report.result import Implementation, ModelResult, Report, Rung, StepResult, Verification, WorkloadResult


def samples(median: float) -> list[float]:
    return [median * factor for factor in (0.98, 0.99, 1.0, 1.0, 1.01, 1.02, 1.05)]


def _full_report() -> Report:
    return Report(
        verdict="pass",
        exit_code=0,
        recipe={"name": "cpu_int8", "digest": "1a2b3c4d5e6f7890abcd", "effective_digest": "99aabbccddeeff00", "overrides": ["graph=none"]},
        environment={"device": "A CPU @ 2.80GHz", "threads": 2, "torch": "2.13.0", "python": "3.11.7", "triton": None, "driver": None},
        steps=[
            StepResult("attention", "none", None, "native"),
            StepResult(
                group="fusion",
                option="qkv",
                optimizer="FuseProjections",
                support="native",
                status="applied",
                matched=6,
                changed=6,
                bytes_before=10_630_000,
                bytes_after=10_630_000,
                kernels=["linear"] * 6,
            ),
            StepResult(
                group="precision",
                option="int8_dynamic",
                optimizer="QuantizeLinears",
                support="native",
                reason="AVX512-VNNI",
                status="applied",
                matched=37,
                changed=36,
                skipped=[{"module": "pooler.dense", "reason": "not reached"}],
                ignored=["weight.granularity"],
                bytes_before=42_500_000,
                bytes_after=10_700_000,
                kernels=["onednn_int8_linear"] * 36,
                details={"num_prepacked": 36, "layout": "blocked", "shapes": [1, 2]},
            ),
            StepResult("compile", "default", "InductorCompile", "native", status="applied", matched=1, changed=1, kernels=["inductor"]),
            StepResult("graph", "auto", "CaptureWholeCall", "native", status="not_applicable", reason="CUDA graphs need a CUDA device"),
        ],
        model=ModelResult("minilm", "float32", 90_900_000, 58_700_000),
        workload=WorkloadResult("forward", 8, 32, 256),
        verification=Verification(
            passed=True,
            sqnr_db=23.14,
            cosine_min=0.99621,
            max_abs=0.0871,
            rows=256,
            floors={"cosine_min": 0.995, "sqnr_db": 20.0},
            implementation=Implementation(True, 36, "encoder.layer.3.dense", 0.6123, 48.21),
        ),
        ladder=[
            Rung("eager", 23.4, samples(23.4), 1.0, 0.8423, 10940.2, 96_400_000, 0.061),
            Rung("compiled", 19.71, samples(19.71), 1.1872, 1.0, 12988.3, 93_200_000, 14.2, 1, 0),
            Rung("recipe", 8.4123, samples(8.4123), 2.7817, 2.343, 30431.6, 61_800_000, 41.7, 2, 1),
        ],
        noise=1.0042,
        warnings=["bf16 is slow here"],
    )


@pytest.fixture
def full_report() -> Callable[[], Report]:
    """Makes a new report with something in every field."""
    return _full_report
