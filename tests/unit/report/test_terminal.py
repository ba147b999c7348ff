import io
import re

import pytest
from rich.cells import cell_len

from kernel_pytorch.report.result import Report, Rung, StepResult
from kernel_pytorch.report.terminal import make_console, render

ANSI = "\x1b["


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(result, folder=None) -> str:
    stream = io.StringIO()
    render(result, folder, console=make_console(stream))
    return stream.getvalue()


def row(text: str, start: str) -> list[str]:
    """Cells of the first line that starts with `start`."""
    line = next(line for line in text.splitlines() if line.strip().startswith(start))
    return re.split(r"\s{2,}", line.strip())


def wide(report: Report) -> Report:
    """Long names everywhere, and 200 skipped modules."""
    long = "model." + "encoder.layers.very_long_module_name." * 8
    step = report.steps[2]
    step.skipped = [{"module": f"{long}{index}", "reason": f"narrower than min_features, kind {index % 2}"} for index in range(200)]
    step.kernels = [f"kernel_with_a_rather_long_name_{index}" for index in range(9)]
    step.reason = "a reason that goes on " * 20
    report.verification.implementation.worst_module = long
    report.recipe["name"] = "team/" + "n" * 150
    report.recipe["overrides"] = [f"precision.exclude=[{long}]"]
    report.ladder.append(Rung("recipe less precision", 123456.7, [123456.7], 0.0012, 0.0012, 1234567.8, 143_000_000_000, 5123.4, 1, 0))
    return report


def hostile(report: Report) -> Report:
    """Markup and escape sequences wherever a name from elsewhere stands."""
    evil = "[red]x[/red]\x1b[31m\x1b]0;title\x07\r\n\u202e[/]"
    report.recipe["name"] = evil
    report.environment["device"] = evil
    report.steps[2].skipped = [{"module": evil, "reason": evil}]
    report.steps[2].kernels = [evil]
    report.steps[2].details = {evil: evil}
    report.verification.first_divergence = evil
    report.error = evil
    report.warnings = [evil, "[link=file:///etc/passwd]x[/link]"]
    return report


@pytest.mark.parametrize("change", [lambda report: report, lambda _: Report(), wide, hostile], ids=["full", "empty", "wide", "hostile"])
def test_every_line_fits_100_columns_without_escapes(change, full_report):
    text = printed(change(full_report()))
    lines = text.splitlines()
    assert max(cell_len(line) for line in lines) <= 100
    assert [line for line in lines if line != line.rstrip()] == []
    assert ANSI not in text


def test_ladder_rows(full_report):
    text = printed(full_report())
    assert row(text, "rung") == ["rung", "ms", "p10–p90", "vs eager", "vs compiled", "tokens/s", "peak memory", "first call"]
    ladder = text[text.index("Ladder") :]
    assert row(ladder, "recipe") == ["recipe", "8.41", "8.29–8.68", "2.78x", "2.34x", "30,432", "61.8 MB", "41.7 s"]
    assert row(ladder, "noise") == ["noise", "eager timed against itself: 1.004x (0.4% off)"]
    assert row(ladder, "graphs") == ["graphs", "compiled 1, recipe 2 with 1 graph break"]


def test_plan_rows(full_report):
    text = printed(full_report())
    plan = text[text.index("Plan") : text.index("Verification")]
    assert row(plan, "precision") == ["precision", "int8_dynamic", "native", "36/37", "42.5 MB → 10.7 MB (0.25x)", "onednn_int8_linear"]
    assert row(plan, "graph") == ["graph", "auto", "not applicable", "—", "—", "—"]
    assert "skipped 1: not reached (pooler.dense)" in plan
    assert "ignored, this option does not read it: weight.granularity" in plan
    assert "num prepacked 36, layout blocked\n" in plan
    assert row(plan, "unchanged") == ["unchanged", "attention"]


def test_verification_rows_and_last_lines(full_report):
    text = printed(full_report(), folder="outputs/here")
    assert row(text, "quality: cosine") == ["quality: cosine, least row", "0.99621", "at least 0.995", "pass"]
    assert row(text, "quality: SQNR") == ["quality: SQNR", "23.1 dB", "at least 20 dB", "pass"]
    assert row(text, "quality: largest") == ["quality: largest difference", "0.0871", "—", "reported"]
    assert row(text, "implementation: worst") == ["implementation: worst of 36 modules", "0.61x", "at most 1.00x of its budget", "pass"]
    assert text.splitlines()[-2:] == [
        "PASS  exit 0  speed 2.78x eager, 2.34x compiled, 0.65x the model bytes, least cosine 0.99621",
        "written to outputs/here",
    ]
    assert text.splitlines()[1] == "cpu_int8  1a2b3c4d5e6f"


def test_a_floor_that_was_missed_fails_and_random_weights_only_report(full_report):
    report = full_report()
    report.verification.cosine_min = 0.99
    assert row(printed(report), "quality: cosine")[-1] == "FAIL"
    report.verification.gated = False
    assert row(printed(report), "quality: cosine")[-1] == "reported"


def test_an_emulated_run_shows_no_speed(full_report):
    report = full_report()
    report.verdict = "emulated"
    text = printed(report)
    assert "EMULATED  exit 0  plain-torch references, no speed figure, 0.65x the model bytes, least cosine" in text
    assert [word for word in ("8.41", "2.78x", "30,432", "tokens/s", "p10") if word in text] == []


def test_an_empty_report_has_a_verdict_and_no_zero():
    text = printed(Report())
    assert text.splitlines() == ["", "no recipe", "", "ERROR  exit 1  the run ended without a word"]


def test_what_was_not_measured_is_a_dash():
    report = Report(ladder=[Rung("eager")], steps=[StepResult("compile", "default", "InductorCompile", "native")])
    text = printed(report)
    assert row(text, "eager") == ["eager", *["—"] * 7]
    assert row(text, "compile") == ["compile", "default", "native, not run", "—", "—", "—"]


def test_skipped_modules_are_counted_by_reason(full_report):
    text = " ".join(printed(wide(full_report())).split())
    assert text.count("skipped 100: narrower than min_features, kind") == 2
    assert text.count("and 97 more)") == 2


def test_many_reasons_are_cut_and_say_so(full_report):
    report = full_report()
    report.steps[2].skipped = [{"module": f"m{index}", "reason": f"reason {index % 10}"} for index in range(30)]
    text = printed(report)
    assert text.count("skipped 3: reason") == 6
    assert "skipped 12 more for 4 other reasons; result.json has them" in text


def test_a_terminal_gets_colour_unless_no_color(monkeypatch, full_report):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = FakeTerminal()
    render(full_report(), console=make_console(coloured))
    assert "\x1b[1;32mPASS" in coloured.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = FakeTerminal()
    render(full_report(), console=make_console(plain))
    assert re.findall(r"\x1b\[[0-9;]*3[0-7]m", plain.getvalue()) == []


def test_force_color_does_not_colour_a_pipe(monkeypatch, full_report):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert ANSI not in printed(full_report())


def test_hostile_text_is_shown_as_it_was_written(full_report):
    text = printed(hostile(full_report()))
    assert "[red]x[/red]\\x1b[31m\\x1b]0;title\\x07\\r\\n\\u202e[/]" in text.splitlines()[1]
    assert [character for character in text if character in "\x1b\x07\r\u202e"] == []


def test_a_dict_from_json_prints_the_same(full_report):
    report = full_report()
    assert printed(report.to_dict()) == printed(report)


def test_an_ascii_stream_gets_ascii(full_report):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    report = full_report()
    report.warnings = ["naïve"]
    render(report, console=make_console(stream))
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert row(text, "precision")[4] == "42.5 MB > 10.7 MB (0.25x)"
    assert "na\\xefve" in text
