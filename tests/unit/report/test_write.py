import json
import os
import stat
from pathlib import Path

import pytest
import yaml

from kernel_pytorch.report.write import FILES, to_json, write_atomically, write_run

ALL = ["recipe.yaml", "report.html", "result.json"]
KEYS = {"schema_version", "verdict", "exit_code", "recipe", "environment", "steps", "model", "workload", "verification", "ladder"}


@pytest.mark.parametrize(
    ("verdict", "files"),
    [("pass", ALL), ("emulated", ALL), ("unverified", ALL), ("numerics", ALL), ("performance", ALL), ("unsupported", ["result.json"]),
     ("no_effect", ["result.json"]), ("error", ["result.json"]), ("interrupted", ["result.json"]), ("invalid", ["result.json"])],
)  # fmt: skip
def test_files_of_a_verdict(tmp_path, verdict, files, full_report):
    report = full_report()
    report.verdict = verdict
    written = write_run(report, tmp_path / "run", config={"precision": {"dtype": None}})
    assert sorted(os.listdir(tmp_path / "run")) == files
    assert written[-1].name == "result.json"
    assert sorted(path.name for path in written) == files


def test_every_verdict_has_its_files():
    assert len(FILES) == 10


def test_result_and_recipe_read_back(tmp_path, full_report):
    report = full_report()
    config = {"precision": {"weight": {"format": "int8"}, "include": ["encoder.*"]}, "seed": 0}
    write_run(report, tmp_path, config=config)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) >= {*KEYS, "error"}
    assert result == report.to_dict()
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == config


def test_json_is_strict():
    assert json.loads(to_json({"a": [float("inf"), float("-inf"), float("nan"), 1.5], "b": (1, None)})) == {
        "a": ["inf", "-inf", "nan", 1.5],
        "b": [1, None],
    }
    assert to_json({"name": "é\ud800"}).isascii()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, 5)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path, full_report):
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError):
        write_run(full_report(), tmp_path / "run", config={})


def test_others_may_read_the_result(tmp_path):
    path = Path(tmp_path, "result.json")
    old = os.umask(0o022)
    write_atomically(path, "{}")
    os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
