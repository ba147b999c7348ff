from __future__ import annotations

import json
from pathlib import Path

from kernel_pytorch.cli.sweep_rows import rows_of, write_mark
from kernel_pytorch.recipe.sources import RecipeSources
from kernel_pytorch.report.result import Report


def job(folder: Path, number: int, sweep: str, status: str, *words: str, **more: str) -> Path:
    place = folder / str(number)
    place.mkdir(parents=True)
    write_mark(place, {"sweep": sweep, "job": number, "overrides": list(words), "status": status, **more})
    return place


def test_rows_in_the_order_of_the_jobs_with_what_differs(tmp_path: Path) -> None:
    for number in (10, 9, 2):
        place = job(tmp_path, number, "now", "pass", "+recipe=eager", "model=decoder", f"seed={number}")
        (place / "result.json").write_text(json.dumps(Report(verdict="pass", exit_code=0).to_dict()))
    rows = rows_of(tmp_path, "now", RecipeSources.from_environment())
    assert [(row.job, row.overrides, row.verdict) for row in rows] == [
        ("2", ["seed=2"], "pass"),
        ("9", ["seed=9"], "pass"),
        ("10", ["seed=10"], "pass"),
    ]


def test_an_earlier_sweep_in_the_folder_is_not_read(tmp_path: Path) -> None:
    job(tmp_path, 0, "before", "invalid", "seed=1", error="old")
    job(tmp_path, 1, "now", "invalid", "seed=2", error="new")
    rows = rows_of(tmp_path, "now", RecipeSources.from_environment())
    assert [(row.job, row.verdict, row.exit_code, row.error) for row in rows] == [("1", "invalid", 2, "new")]


def test_a_job_that_left_no_result_is_an_error(tmp_path: Path) -> None:
    job(tmp_path, 0, "now", "running", "seed=1")
    rows = rows_of(tmp_path, "now", RecipeSources.from_environment())
    assert [(row.verdict, row.exit_code, row.error) for row in rows] == [("error", 1, "the job ended without a result")]


def test_a_recipe_named_by_its_path_keeps_that_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("info: {name: mine}\n")
    sources = RecipeSources.from_environment().with_file("./mine.yaml")
    inside = sources.find("./mine.yaml").hydra_name
    job(tmp_path / "sweep", 0, "now", "running", f"+recipe={inside}")
    assert rows_of(tmp_path / "sweep", "now", sources)[0].overrides == ["recipe=./mine.yaml"]
