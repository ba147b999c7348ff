"""The result of one run: what result.json holds, filled in by the engine as it goes.

Everything here is JSON types, so that an interrupted run is as readable as a finished one. None means not measured,
never zero.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kernel_pytorch.schema import SCHEMA_VERSION

# Names of the ladder's rungs; an ablated rung is `recipe less <group>`.
EAGER, COMPILED, RECIPE = "eager", "compiled", "recipe"


@dataclass
class StepResult:
    """One step: its plan and, once applied, its receipt.

    status: planned, applied, not_applicable, emulated or unsupported. matched, changed: modules. bytes_before and bytes_after are over the
    changed modules. ignored: settings left over from below that this option does not read. details: facts of the step.
    """

    group: str
    option: str
    optimizer: str | None
    support: str
    reason: str = ""
    status: str = "planned"
    matched: int = 0
    changed: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    kernels: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelResult:
    """bytes: distinct parameters and buffers of the whole model."""

    name: str = ""
    dtype: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None


@dataclass
class WorkloadResult:
    phase: str = ""
    batch: int | None = None
    length: int | None = None
    tokens_per_call: int | None = None


@dataclass
class Implementation:
    """The implementation gate. worst_ratio: our error over what the plain reference is allowed; above 1 fails.
    end_to_end_sqnr_db: the finished model (compiled, captured) against the same steps uncompiled; inf when bit-identical.
    end_to_end_floor_db: what that had to reach."""

    passed: bool | None = None
    modules_checked: int = 0
    worst_module: str | None = None
    worst_ratio: float | None = None
    end_to_end_sqnr_db: float | None = None
    end_to_end_floor_db: float | None = None
    message: str = ""


@dataclass
class Verification:
    """The quality gate against the baseline, and the implementation gate. gated: whether quality decides (trained weights).
    floors: the least values that were asked for. rows: output rows compared. held_out: neither timing nor calibration saw them."""

    passed: bool | None = None
    sqnr_db: float | None = None
    cosine_min: float | None = None
    max_abs: float | None = None
    top1_agreement: float | None = None
    first_divergence: str | None = None
    rows: int = 0
    held_out: bool = True
    gated: bool = True
    floors: dict[str, float] = field(default_factory=dict)
    implementation: Implementation = field(default_factory=Implementation)
    message: str = ""


@dataclass
class Rung:
    """One timed arm. latency_ms: median over rounds of one call. first_call_s: first call, with compilation and capture.
    graphs, graph_breaks: of torch.compile; None for an arm that is not compiled."""

    name: str
    latency_ms: float | None = None
    latency_ms_samples: list[float] = field(default_factory=list)
    ratio_to_eager: float | None = None
    ratio_to_compiled: float | None = None
    tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
    first_call_s: float | None = None
    graphs: int | None = None
    graph_breaks: int | None = None


@dataclass
class Report:
    """One run. `verdict` and `exit_code` are the last words; see the verdict table in docs/architecture.md."""

    verdict: str = "error"
    exit_code: int = 1
    recipe: dict[str, Any] = field(default_factory=lambda: {"name": None, "digest": None, "overrides": []})
    environment: dict[str, Any] = field(default_factory=dict)
    steps: list[StepResult] = field(default_factory=list)
    # What the backend's hooks did around the steps: when, name, before and after as measured, skipped with the reason.
    hooks: list[dict[str, Any]] = field(default_factory=list)
    model: ModelResult = field(default_factory=ModelResult)
    workload: WorkloadResult = field(default_factory=WorkloadResult)
    verification: Verification = field(default_factory=Verification)
    ladder: list[Rung] = field(default_factory=list)
    # Ratio of the same arm timed twice; its distance from 1 is the noise of the ladder.
    noise: float | None = None
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; the keys of result.json."""
        return asdict(self)

    def rung(self, name: str) -> Rung | None:
        """The ladder's rung of that name, or None."""
        return next((rung for rung in self.ladder if rung.name == name), None)
