"""`precompile`: its words, what it writes, and its exit codes."""

from __future__ import annotations

import pytest

from kernel_pytorch.cli import precompile as command
from kernel_pytorch.cli.main import main
from kernel_pytorch.errors import ConfigError

# The recipe language is tested where there is no torch; this command is not.
pytest.importorskip("torch")


def test_all_mistakes_come_at_once():
    with pytest.raises(ConfigError) as raised:
        command.parse(["--targt", "--out", "a", "--out=b", "--kernel"])
    assert raised.value.lines == [
        "precompile: found '--targt' (did you mean '--target'?); allowed --target, --kernel, --out",
        "precompile: --kernel needs a value",
        "precompile: --out is given 2 times; allowed once",
    ]


def test_it_writes_code_objects_where_it_is_told_and_says_how_many(tmp_path, capsys):
    words = ["precompile", "--target", "gfx942", "--target=sm_90", "--kernel", "split_k.sum_splits", "--out", str(tmp_path)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    files = {path.suffix: path for path in tmp_path.rglob("*.*") if path.suffix in (".hsaco", ".cubin")}
    assert {path.parent.name for path in files.values()} == {"gfx942", "sm_90"}
    assert lines[0].startswith(f"{files['.hsaco']}  {files['.hsaco'].stat().st_size:,} bytes, ")
    assert lines[1].startswith(f"{files['.cubin']}  ")
    assert lines[2] == "2 code objects, 0 refused"


def test_a_name_that_is_not_there_is_a_mistake(capsys):
    assert main(["precompile", "--target", "gfx9420", "--kernel", "matrix"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "target: found 'gfx9420' (did you mean 'gfx942'?); allowed: sm_80, sm_90, sm_100, gfx942, gfx950" in lines[0]
    assert "kernel: found 'matrix'" in lines[1]
