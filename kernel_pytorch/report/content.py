"""What a report says, before it is drawn: the terminal and the page draw the same sections from result.json's dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kernel_pytorch.report import figures
from kernel_pytorch.report.figures import DASH, number
from kernel_pytorch.report.plain import plain, shorten
from kernel_pytorch.report.result import RECIPE
from kernel_pytorch.report.statistics import spread

NAME_WIDTH = 44
NAMES_SHOWN, KERNELS_SHOWN, REASONS_SHOWN = 3, 2, 6


@dataclass(frozen=True)
class Cell:
    """tone: how it is drawn: good, bad, warn, dim, strong or nothing."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Column:
    """wrap: the text may take several lines."""

    title: str
    right: bool = False
    wrap: bool = False


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    rows: list[list[Cell]] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """notes: (label, text) lines below the table."""

    title: str
    table: Table | None = None
    notes: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Content:
    """facts: (label, text) lines below the title. reason: one sentence behind the verdict."""

    title: str
    digest: str
    facts: list[tuple[str, str]]
    sections: list[Section]
    verdict: str
    tone: str
    reason: str
    exit_code: int


TONES = {"pass": "good", "emulated": "warn", "unverified": "warn", "interrupted": "warn"}


def content(result: Mapping[str, Any]) -> Content:
    """Everything to be said about one run. result: result.json as a dict, or Report.to_dict()."""
    verdict = str(result.get("verdict", "error"))
    recipe = result.get("recipe") or {}
    return Content(
        title=plain(recipe.get("name") or "no recipe"),
        digest=plain(recipe.get("digest") or "")[:12],
        facts=_facts(result),
        sections=[section for section in (_plan(result), _verification(result), _ladder(result), _remarks(result)) if section],
        verdict=plain(verdict).upper().replace("_", " "),
        tone=TONES.get(verdict, "bad"),
        reason=_reason(result, verdict),
        exit_code=int(result.get("exit_code", 1)),
    )


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    environment, model = result.get("environment") or {}, result.get("model") or {}
    workload, recipe = result.get("workload") or {}, result.get("recipe") or {}
    threads = environment.get("threads")
    machine = [
        environment.get("device"),
        f"{threads} threads" if threads else None,
        f"driver {environment['driver']}" if environment.get("driver") else None,
    ]
    software = [f"{name} {environment[name]}" for name in ("torch", "triton", "python") if environment.get(name)]
    size = figures.before_after(model.get("bytes_before"), model.get("bytes_after"))
    effective = str(recipe.get("effective_digest") or "")
    lines = {
        "device": ", ".join(plain(word) for word in machine if word),
        "software": ", ".join(plain(word) for word in software),
        "model": ", ".join(plain(word) for word in (model.get("name"), model.get("dtype"), None if size == DASH else size) if word),
        "workload": _workload(workload),
        "overrides": " ".join(plain(word) for word in recipe.get("overrides") or []),
        "as run": f"digest {plain(effective[:12])}" if effective and effective != recipe.get("digest") else "",
    }
    return [(label, text) for label, text in lines.items() if text]


def _workload(workload: Mapping[str, Any]) -> str:
    batch, length, tokens = workload.get("batch"), workload.get("length"), workload.get("tokens_per_call")
    shape = f"batch {batch}" + (f" x {length} tokens" if length else "") if batch else None
    if workload.get("phase") == "decode" and batch:
        shape = f"batch {batch}" + (f", {length} tokens of context" if length else "")
    return ", ".join(plain(word) for word in (workload.get("phase"), shape, f"{tokens} tokens a call" if tokens else None) if word)


def _plan(result: Mapping[str, Any]) -> Section | None:
    steps = result.get("steps") or []
    if not steps:
        return None
    columns = ("group", "option", "support", "modules", "module bytes", "kernel")
    table = Table(tuple(Column(title, right=title == "modules", wrap=title == "kernel") for title in columns))
    notes: list[tuple[str, str]] = []
    idle = []
    for step in steps:
        group = plain(step["group"])
        # A group whose option has no optimizer is said in one line for all of them.
        if step.get("optimizer") is None and not step.get("changed"):
            idle.append(group if step["option"] == "none" else f"{group}={plain(step['option'])}")
        else:
            table.rows.append(_step_row(step))
        notes += [(group, text) for text in _step_notes(step)]
    if idle:
        notes.append(("unchanged", ", ".join(idle)))
    return Section("Plan and receipts", table if table.rows else None, notes)


def _step_row(step: Mapping[str, Any]) -> list[Cell]:
    support, status = str(step.get("support", "")), str(step.get("status", ""))
    if status == "not_applicable":
        standing = Cell("not applicable", "dim")
    elif status == "planned" and support != "unsupported":
        standing = Cell(f"{plain(support)}, not run", "dim")
    else:
        standing = Cell(plain(support), {"native": "good", "emulated": "warn", "unsupported": "bad"}.get(support, ""))
    done = f"{step.get('changed', 0)}/{step.get('matched', 0)}" if status in ("applied", "emulated") else DASH
    kernels = list(dict.fromkeys(plain(name) for name in step.get("kernels") or []))
    return [
        Cell(plain(step["group"]), "strong"),
        Cell(shorten(plain(step["option"]), 24)),
        standing,
        Cell(done),
        Cell(figures.before_after(step.get("bytes_before"), step.get("bytes_after"))),
        Cell(_some(kernels, KERNELS_SHOWN) or DASH),
    ]


def _some(names: list[str], shown: int) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _step_notes(step: Mapping[str, Any]) -> list[str]:
    notes = [plain(step["reason"])] if step.get("reason") else []
    by_reason: dict[str, list[str]] = {}
    for skipped in step.get("skipped") or []:
        by_reason.setdefault(plain(skipped["reason"]), []).append(shorten(plain(skipped["module"]), NAME_WIDTH))
    for reason, names in list(by_reason.items())[:REASONS_SHOWN]:
        notes.append(f"skipped {len(names)}: {reason} ({_some(names, NAMES_SHOWN)})")
    rest = list(by_reason.values())[REASONS_SHOWN:]
    if rest:
        notes.append(f"skipped {sum(map(len, rest))} more for {len(rest)} other reasons; result.json has them")
    if step.get("ignored"):
        notes.append(f"ignored, this option does not read it: {', '.join(plain(key) for key in step['ignored'])}")
    details = [
        f"{plain(key).replace('_', ' ')} {figures.significant(value) if isinstance(value, float) else plain(value)}"
        for key, value in (step.get("details") or {}).items()
        if isinstance(value, (str, int, float)) and value != ""
    ]
    return [*notes, *([", ".join(details)] if details else [])]


def _verification(result: Mapping[str, Any]) -> Section | None:
    found = result.get("verification") or {}
    gate = found.get("implementation") or {}
    if result.get("verdict") == "unverified":
        return Section("Verification", None, [("off", "nothing was compared with the baseline, so there is no speed figure")])
    if found.get("passed") is None and gate.get("passed") is None and not found.get("rows"):
        return None
    table = Table(tuple(Column(title, right=title == "measured") for title in ("check", "measured", "required", "result")))
    table.rows.extend(_implementation_rows(gate))
    floors, gated = found.get("floors") or {}, found.get("gated", True)
    for key, label in figures.QUALITY.items():
        if found.get(key) is None and key not in floors:
            continue
        outcome = _floor_outcome(key, found.get(key), floors.get(key), gated)
        bound = DASH if key not in floors else f"{'at most' if key == 'max_abs' else 'at least'} {figures.floor(key, floors[key])}"
        table.rows.append([Cell(f"quality: {label}"), Cell(figures.quality(key, found.get(key)), "strong"), Cell(bound), outcome])
    notes = [("worst module", shorten(plain(gate["worst_module"]), 2 * NAME_WIDTH))] if gate.get("worst_module") else []
    if found.get("rows"):
        kind = "held-out rows" if found.get("held_out", True) else "rows of the timed inputs"
        notes.append(("rows", f"{found['rows']} {kind} against the baseline"))
    if not gated:
        notes.append(("quality", "reported, not gated: the weights are random"))
    if found.get("first_divergence"):
        notes.append(("diverges", shorten(plain(found["first_divergence"]), 2 * NAME_WIDTH)))
    notes += [("message", plain(text)) for text in (gate.get("message"), found.get("message")) if text]
    return Section("Verification", table, notes)


def _implementation_rows(gate: Mapping[str, Any]) -> list[list[Cell]]:
    outcome = _outcome(gate.get("passed"))
    rows = []
    if gate.get("modules_checked"):
        label = f"implementation: worst of {gate['modules_checked']} modules"
        rows.append([Cell(label), Cell(figures.ratio(gate.get("worst_ratio")), "strong"), Cell("at most 1.00x of its budget"), outcome])
    if gate.get("end_to_end_sqnr_db") is not None:
        measured = figures.quality("sqnr_db", gate["end_to_end_sqnr_db"])
        floor = gate.get("end_to_end_floor_db")
        required = DASH if floor is None else f"at least {figures.quality('sqnr_db', floor)}"
        rows.append([Cell("implementation: end to end"), Cell(measured, "strong"), Cell(required), outcome])
    return rows or [[Cell("implementation"), Cell(DASH), Cell(DASH), outcome]]


def _outcome(passed: bool | None) -> Cell:
    if passed is None:
        return Cell(DASH, "dim")
    return Cell("pass", "good") if passed else Cell("FAIL", "bad")


def _floor_outcome(key: str, value: Any, floor: Any, gated: bool) -> Cell:
    measured, bound = number(value), number(floor)
    if bound is None or not gated:
        return Cell("reported", "dim")
    if measured is None:
        return Cell(DASH, "dim")
    return _outcome(measured <= bound if key == "max_abs" else measured >= bound)


def _ladder(result: Mapping[str, Any]) -> Section | None:
    if result.get("verdict") == "emulated":
        return Section("Ladder", None, [("speed", "none: plain-torch references ran in place of the device's kernels")])
    rungs = result.get("ladder") or []
    if not rungs:
        return None
    titles = ("rung", "ms", "p10–p90", "vs eager", "vs compiled", "tokens/s", "peak memory", "first call")
    table = Table(tuple(Column(title, right=title != "rung", wrap=title == "rung") for title in titles))
    table.rows.extend(_rung_row(rung) for rung in rungs)
    noise = number(result.get("noise"))
    notes = [] if noise is None else [("noise", f"eager timed against itself: {noise:.3f}x ({abs(1 - noise):.1%} off)")]
    compiled = [rung for rung in rungs if rung.get("graphs") is not None]
    if compiled:
        notes.append(("graphs", ", ".join(_graphs(rung) for rung in compiled)))
    return Section("Ladder", table, notes)


def _graphs(rung: Mapping[str, Any]) -> str:
    breaks = rung.get("graph_breaks")
    with_breaks = f" with {breaks} graph break{'' if breaks == 1 else 's'}" if breaks else ""
    return f"{plain(rung['name'])} {rung['graphs']}{with_breaks}"


def _rung_row(rung: Mapping[str, Any]) -> list[Cell]:
    samples = rung.get("latency_ms_samples") or []
    between = DASH
    if samples:
        found = spread(samples)
        between = f"{figures.ms(found.p10)}–{figures.ms(found.p90)}"
    tone = "strong" if rung.get("name") == RECIPE else ""
    return [
        Cell(plain(rung.get("name", "")), tone),
        Cell(figures.ms(rung.get("latency_ms")), tone),
        Cell(between, "dim"),
        Cell(figures.ratio(rung.get("ratio_to_eager")), tone),
        Cell(figures.ratio(rung.get("ratio_to_compiled")), tone),
        Cell(figures.count(rung.get("tokens_per_s")), tone),
        Cell(figures.nbytes(rung.get("peak_memory_bytes")), tone),
        Cell(figures.seconds(rung.get("first_call_s")), "dim"),
    ]


def _remarks(result: Mapping[str, Any]) -> Section | None:
    warnings = result.get("warnings") or []
    return Section("Remarks", None, [("note", plain(text)) for text in warnings]) if warnings else None


def _reason(result: Mapping[str, Any], verdict: str) -> str:
    if result.get("error"):
        return plain(result["error"])
    parts = []
    rung = next((rung for rung in result.get("ladder") or [] if rung.get("name") == RECIPE), {})
    if verdict == "emulated":
        parts.append("plain-torch references, no speed figure")
    elif number(rung.get("ratio_to_eager")) is not None:
        parts.append(f"speed {figures.ratio(rung['ratio_to_eager'])} eager")
        if number(rung.get("ratio_to_compiled")) is not None:
            parts.append(f"{figures.ratio(rung['ratio_to_compiled'])} compiled")
    model = result.get("model") or {}
    before, after = number(model.get("bytes_before")), number(model.get("bytes_after"))
    if before and after is not None:
        parts.append(f"{figures.ratio(after / before)} the model bytes")
    cosine = number((result.get("verification") or {}).get("cosine_min"))
    if cosine is not None:
        parts.append(f"least cosine {figures.quality('cosine_min', cosine)}")
    return ", ".join(parts) or "the run ended without a word"
