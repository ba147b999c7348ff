"""The wheel carries everything it needs: installed without the checkout and run from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the unpacked wheel and nothing else of ours."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)], check=True, capture_output=True)
    wheel = next(folder.glob("kernel_pytorch-*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, capture_output=True)
    return wheel, folder / "site"


def test_the_wheel_holds_conf_recipes_sentences_and_kernels(installed):
    wheel, _ = installed
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("recipes/*.yaml")]:
        assert f"kernel_pytorch/_data/{path.relative_to(ROOT).as_posix()}" in names
    for path in ROOT.glob("kernel_pytorch/**/*"):
        if path.suffix in (".py", ".txt", ".cpp", ".json") and "_data" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.parametrize(
    "words", [["list"], ["validate", "cpu_int8"], ["+recipe=cpu_int8", "compile=none", "measure=off", "model=decoder"]]
)
def test_the_wheel_works_from_another_folder(installed, tmp_path, words):
    _, site = installed
    environ = {**os.environ, "PYTHONPATH": str(site), "HOME": str(tmp_path)}
    code = (
        "import sys; sys.path = [p for p in sys.path if 'kernel_pytorch' not in p]; import kernel_pytorch;"
        f" assert kernel_pytorch.__file__.startswith({str(site)!r}), kernel_pytorch.__file__;"
        " from kernel_pytorch.cli.main import main; raise SystemExit(main(sys.argv[1:]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "cpu_int8" in ended.stdout
