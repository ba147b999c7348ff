"""A sweep: one row a job, which rows nothing else beats, and the exit code of them all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kernel_pytorch.report import figures
from kernel_pytorch.report.content import TONES, Cell, Column, Section, Table
from kernel_pytorch.report.figures import DASH, number
from kernel_pytorch.report.plain import plain
from kernel_pytorch.report.result import RECIPE
from kernel_pytorch.report.write import to_json, write_atomically
from kernel_pytorch.schema import SCHEMA_VERSION

SWEEP_FILE = "sweep.json"
MARK = "★"
GOOD_VERDICTS = ("pass", "emulated", "unverified")
# The worst of several failures, worst first.
_WORST = (130, 1, 5, 6, 4, 3, 2)


@dataclass(frozen=True)
class SweepRow:
    """One job. job: its folder's name. overrides: what this job has that others do not. pareto: no other row of its kind
    is at least as good in everything and better in something. None is not measured."""

    job: str
    overrides: list[str] = field(default_factory=list)
    verdict: str = "error"
    exit_code: int = 1
    latency_ms: float | None = None
    ratio_to_eager: float | None = None
    ratio_to_compiled: float | None = None
    tokens_per_s: float | None = None
    model_bytes: int | None = None
    peak_memory_bytes: int | None = None
    cosine_min: float | None = None
    sqnr_db: float | None = None
    error: str | None = None
    pareto: bool = False


def sweep_row(job: str, overrides: Sequence[str], result: Mapping[str, Any]) -> SweepRow:
    """The row of a job that left a result.json. An emulated run has no speed, whatever its ladder says."""
    emulated = result["verdict"] == "emulated"
    rung: Mapping[str, Any] = {}
    if not emulated:
        rung = next((rung for rung in result.get("ladder") or [] if rung["name"] == RECIPE), {})
    verification, model = result.get("verification") or {}, result.get("model") or {}
    return SweepRow(
        job=job,
        overrides=list(overrides),
        verdict=result["verdict"],
        exit_code=result["exit_code"],
        latency_ms=number(rung.get("latency_ms")),
        ratio_to_eager=number(rung.get("ratio_to_eager")),
        ratio_to_compiled=number(rung.get("ratio_to_compiled")),
        tokens_per_s=number(rung.get("tokens_per_s")),
        model_bytes=model.get("bytes_after"),
        peak_memory_bytes=rung.get("peak_memory_bytes"),
        cosine_min=number(verification.get("cosine_min")),
        sqnr_db=number(verification.get("sqnr_db")),
        error=result.get("error"),
    )


def invalid_row(job: str, overrides: Sequence[str], error: str) -> SweepRow:
    """The row of a combination that cannot be: it never ran and left no files."""
    return SweepRow(job=job, overrides=list(overrides), verdict="invalid", exit_code=2, error=error)


def pareto(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """The rows with their marks set.

    Compared are speed against the same process's eager arm (higher), model bytes (lower) and quality (higher): SQNR where
    all rows of a pool have it, else the least cosine. Only passing rows with speed, passing rows without, and emulated rows
    are pools of their own: an emulated row says nothing of a device's speed. Failed and unverified rows are never marked.
    """
    pools: dict[tuple[str, bool], list[SweepRow]] = {}
    for row in rows:
        if row.verdict in ("pass", "emulated"):
            pools.setdefault(_pool(row), []).append(row)
    marked = []
    for row in rows:
        pool = pools.get(_pool(row), []) if row.verdict in ("pass", "emulated") else []
        costs = _costs(row, pool) if pool else ()
        marked.append(replace(row, pareto=bool(pool) and not any(_dominates(_costs(other, pool), costs) for other in pool)))
    return marked


def _pool(row: SweepRow) -> tuple[str, bool]:
    return row.verdict, row.verdict == "pass" and row.latency_ms is not None


def _costs(row: SweepRow, pool: Sequence[SweepRow]) -> tuple[float, float, float]:
    """Lower is better in each; what was not measured is the worst there is."""
    by_sqnr = all(other.sqnr_db is not None and not math.isnan(other.sqnr_db) for other in pool)
    quality = row.sqnr_db if by_sqnr else row.cosine_min
    # Each job has its own process and moment; its ratio to the eager arm beside it compares, milliseconds do not.
    speed = row.latency_ms if row.ratio_to_eager is None else 1 / row.ratio_to_eager
    latency = speed if _pool(row)[1] else 0.0
    return _or_worst(latency), _or_worst(row.model_bytes), _or_worst(None if quality is None else -quality)


def _or_worst(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _dominates(other: tuple[float, ...], row: tuple[float, ...]) -> bool:
    return other != row and all(theirs <= ours for theirs, ours in zip(other, row, strict=True))


def sweep_exit_code(rows: Sequence[SweepRow]) -> int:
    """0 when at least one row is good and none is an error; else the worst row's. An interrupted sweep is 130."""
    codes = {row.exit_code for row in rows}
    if 130 in codes:
        return 130
    if any(row.verdict in GOOD_VERDICTS for row in rows) and not any(row.verdict == "error" for row in rows):
        return 0
    return next((code for code in _WORST if code in codes), 1)


def write_sweep(rows: Sequence[SweepRow], folder: Path) -> Path:
    """Writes sweep.json, marks included, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SWEEP_FILE
    marked = [asdict(row) for row in pareto(rows)]
    write_atomically(path, to_json({"schema_version": SCHEMA_VERSION, "exit_code": sweep_exit_code(rows), "jobs": marked}))
    return path


def sweep_section(rows: Sequence[SweepRow]) -> Section:
    """The table of all jobs; errors stand below it, under the number of their job."""
    titles = ("", "job", "overrides", "verdict", "vs eager", "ms", "model", "peak", "cosine", "SQNR")
    table = Table(tuple(Column(title, right=title not in ("", "overrides", "verdict"), wrap=title == "overrides") for title in titles))
    marked = pareto(rows)
    shared = [word for word in rows[0].overrides if all(word in row.overrides for row in rows)] if len(rows) > 1 else []
    for row in marked:
        own = [plain(word) for word in row.overrides if word not in shared]
        table.rows.append(
            [
                Cell(MARK if row.pareto else "", "good"),
                Cell(plain(row.job), "dim"),
                Cell(" ".join(own) or DASH, "strong" if row.pareto else ""),
                Cell(plain(row.verdict), TONES.get(row.verdict, "bad")),
                Cell(figures.ratio(row.ratio_to_eager)),
                Cell(figures.ms(row.latency_ms)),
                Cell(figures.nbytes(row.model_bytes)),
                Cell(figures.nbytes(row.peak_memory_bytes)),
                Cell(figures.quality("cosine_min", row.cosine_min)),
                Cell(figures.quality("sqnr_db", row.sqnr_db)),
            ]
        )
    notes = [("all jobs", " ".join(plain(word) for word in shared))] if shared else []
    if any(row.pareto for row in marked):
        notes.append((MARK, "on the Pareto front of speed against eager, model bytes and quality, among rows of its kind"))
    if any(row.verdict == "emulated" for row in rows):
        notes.append(("emulated", "no speed: plain-torch references ran in place of the device's kernels"))
    notes += [(f"job {plain(row.job)}", plain(row.error)) for row in marked if row.error]
    good = sum(row.verdict in GOOD_VERDICTS for row in rows)
    return Section(f"Sweep of {len(rows)} job{'' if len(rows) == 1 else 's'}, {good} good", table, notes)
