import io
import json
from dataclasses import replace

import pytest
from rich.cells import cell_len

from kernel_pytorch.report.sweep import SweepRow, invalid_row, pareto, sweep_exit_code, sweep_row, write_sweep
from kernel_pytorch.report.terminal import make_console, render_sweep


def timed(job: str, latency: float, size: int, sqnr: float | None = 20.0, cosine: float | None = 0.99, verdict: str = "pass") -> SweepRow:
    return SweepRow(job, [f"x={job}"], verdict, 0, latency_ms=latency, model_bytes=size, sqnr_db=sqnr, cosine_min=cosine)


def emulated(job: str, size: int, sqnr: float) -> SweepRow:
    return SweepRow(job, [f"x={job}"], "emulated", 0, model_bytes=size, sqnr_db=sqnr)


def marks(rows: list[SweepRow]) -> list[str]:
    return [row.job for row in pareto(rows) if row.pareto]


def test_a_row_that_is_worse_in_everything_is_not_marked():
    assert marks([timed("a", 10, 100, 30), timed("b", 5, 50, 20), timed("c", 11, 100, 30), timed("d", 5, 50, 19)]) == ["a", "b"]


def test_equal_rows_are_both_marked():
    assert marks([timed("a", 10, 100), timed("b", 10, 100)]) == ["a", "b"]


def test_bytes_alone_can_earn_a_mark():
    assert marks([timed("a", 10, 100), timed("b", 12, 90), timed("c", 12, 95)]) == ["a", "b"]


def test_the_bit_identical_baseline_is_the_most_exact():
    assert marks([timed("eager", 20, 100, float("inf")), timed("int8", 10, 50, 23.0), timed("slow", 21, 100, 40.0)]) == ["eager", "int8"]


def test_cosine_decides_where_a_row_lacks_sqnr():
    rows = [timed("a", 10, 100, None, 0.99), timed("b", 10, 100, 50.0, 0.98)]
    assert marks(rows) == ["a"]
    assert marks([timed("a", 10, 100, None, None), timed("b", 10, 100, None, 0.5)]) == ["b"]
    assert marks([timed("a", 10, 100, float("nan"), None), timed("b", 10, 100, 1.0, 0.5)]) == ["b"]


def test_emulated_rows_compete_among_themselves_on_bytes_and_quality():
    rows = [timed("a", 10, 10, 99.0), emulated("b", 50, 25.0), emulated("c", 50, 24.0), emulated("d", 40, 20.0)]
    assert marks(rows) == ["a", "b", "d"]


def test_failed_rows_are_never_marked_and_beat_nobody():
    rows = [timed("a", 1, 1, 99.0, verdict="performance"), timed("b", 1, 1, 99.0, verdict="unverified"), timed("c", 10, 100)]
    assert marks(rows) == ["c"]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([("pass", 0), ("numerics", 5)], 0),
        ([("emulated", 0), ("invalid", 2)], 0),
        ([("unverified", 0)], 0),
        ([("pass", 0), ("error", 1)], 1),
        ([("invalid", 2), ("unsupported", 3), ("no_effect", 4)], 4),
        ([("performance", 6), ("no_effect", 4)], 6),
        ([("performance", 6), ("numerics", 5)], 5),
        ([("numerics", 5), ("error", 1)], 1),
        ([("invalid", 2)], 2),
        ([("pass", 0), ("interrupted", 130)], 130),
    ],
)
def test_exit_code(codes, expected):
    assert sweep_exit_code([SweepRow(str(index), [], *code) for index, code in enumerate(codes)]) == expected


def test_row_of_a_result(full_report):
    found = sweep_row("3", ["precision=int8_dynamic"], full_report().to_dict())
    assert found == SweepRow(
        job="3",
        overrides=["precision=int8_dynamic"],
        verdict="pass",
        exit_code=0,
        latency_ms=8.4123,
        ratio_to_eager=2.7817,
        ratio_to_compiled=2.343,
        tokens_per_s=30431.6,
        model_bytes=58_700_000,
        peak_memory_bytes=61_800_000,
        cosine_min=0.99621,
        sqnr_db=23.14,
    )


def test_an_emulated_result_gives_no_speed_and_inf_is_read_back(full_report):
    result = full_report().to_dict()
    result["verdict"] = "emulated"
    result["verification"]["sqnr_db"] = "inf"
    found = sweep_row("0", [], result)
    assert (found.latency_ms, found.ratio_to_eager, found.tokens_per_s, found.peak_memory_bytes) == (None,) * 4
    assert (found.model_bytes, found.sqnr_db) == (58_700_000, float("inf"))


def test_sweep_json_has_the_marks(tmp_path):
    path = write_sweep([timed("0", 10, 100, float("inf")), invalid_row("1", ["x=1"], "no such option")], tmp_path / "deep")
    data = json.loads(path.read_text())
    assert path == tmp_path / "deep" / "sweep.json"
    assert [(job["job"], job["verdict"], job["pareto"], job["sqnr_db"], job["error"]) for job in data["jobs"]] == [
        ("0", "pass", True, "inf", None),
        ("1", "invalid", False, None, "no such option"),
    ]
    assert data["exit_code"] == 0


def table(rows: list[SweepRow]) -> list[str]:
    stream = io.StringIO()
    render_sweep(rows, console=make_console(stream))
    return stream.getvalue().splitlines()


def test_table_of_a_sweep():
    rows = [
        replace(timed("0", 20, 90_000_000), overrides=["precision=none", "compile=none"], ratio_to_eager=1.0),
        SweepRow("1", ["precision=fp8", "compile=none"], "emulated", 0, model_bytes=30_000_000, sqnr_db=25.0),
        invalid_row("2", ["precision=[bold]x", "compile=none"], "bad \x1b[31m value"),
    ]
    lines = table(rows)
    assert lines[1] == "Sweep of 3 jobs, 2 good"
    cells = [line.split() for line in lines]
    assert ["★", "0", "precision=none", "pass", "1.00x", "20.0", "90.0", "MB", "—", "0.99000", "20.0", "dB"] in cells
    assert ["★", "1", "precision=fp8", "emulated", "—", "—", "30.0", "MB", "—", "—", "25.0", "dB"] in cells
    assert ["2", "precision=[bold]x", "invalid", *["—"] * 6] in cells
    assert ["all", "jobs", "compile=none"] in cells
    assert ["job", "2", "bad", "\\x1b[31m", "value"] in cells


def test_a_wide_sweep_fits():
    rows = [
        SweepRow(str(index), [f"precision.exclude=[{'a.very.long.name' * 9}]", "compile=max_autotune"], "performance", 6,
                 12345.6, 12.345, 1.0, 1e6, 143_000_000_000, 143_000_000_000, 0.99999, 139.9, "slow " * 60)
        for index in range(100, 130)
    ]  # fmt: skip
    assert max(cell_len(line) for line in table(rows)) <= 100
