"""What the command line imports. Times are printed for the record; a loaded machine must not fail a test."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

_PROGRAM = """
import contextlib, io, json, sys
from kernel_pytorch.cli.main import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    code = main(sys.argv[1:])
print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]))
"""


def _imported(*words: str) -> tuple[int, set[str], float]:
    start = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", _PROGRAM, *words], capture_output=True, text=True, check=True)
    code, names = json.loads(ended.stdout)
    return code, set(names), time.perf_counter() - start


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["list"], 0),
        (["describe", "cpu_int8"], 0),
        (["describe", "precision"], 0),
        (["validate", "cpu_int8"], 0),
        (["diff", "eager", "cpu_int8"], 0),
        (["explain", "+recipe=cpu_int8", "precision.weight.format"], 0),
        (["--cfg", "job"], 0),
        (["precision=fp9"], 2),
        (["-m", "precision=bf16,fp9"], 2),
    ],
)
def test_no_torch(words: list[str], code: int) -> None:
    ended, names, seconds = _imported(*words)
    print(f"{' '.join(words)}: {seconds:.2f} s")
    assert ended == code
    assert names & {"torch", "triton", "transformers", "torchao", "numpy"} == set()


@pytest.mark.parametrize("words", [["--help"], ["list", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    ended, names, seconds = _imported(*words)
    print(f"{' '.join(words)}: {seconds:.2f} s")
    assert ended == 0
    assert names & {"torch", "hydra", "omegaconf", "pydantic", "rich", "yaml"} == set()


@pytest.mark.parametrize("module", ["kernel_pytorch", "kernel_pytorch.schema", "kernel_pytorch.recipe.compose", "kernel_pytorch.cli.sweep"])
def test_importing_a_torch_free_layer(module: str) -> None:
    program = f"import sys, {module}; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
