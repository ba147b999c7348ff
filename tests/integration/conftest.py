"""The command line as a user meets it: a process of its own, in an empty folder, with an empty home."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

_PRIVATE = ("KERNEL_PYTORCH_", "HYDRA_", "PYTHONPATH", "COLUMNS")


@dataclass(frozen=True)
class Ended:
    """How a command ended. changed: paths below the temporary folder that were made, changed or removed."""

    code: int
    out: str
    err: str
    changed: list[str]

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


@dataclass(frozen=True)
class Place:
    """root: the temporary folder. work: the working folder. home: HOME."""

    root: Path

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def home(self) -> Path:
        return self.root / "home"

    def recipe(self, name: str, text: str | bytes) -> Path:
        """Writes work/NAME.yaml."""
        path = self.work / f"{name}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    def run(self, *words: str, code: str | None = None, **environ: str) -> Ended:
        """Runs the program, or with `code` a Python program that does something before it."""
        before = self._snapshot()
        start = [sys.executable, "-m", "kernel_pytorch"] if code is None else [sys.executable, "-c", code]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(_PRIVATE)}
        clean |= {"HOME": str(self.home), "XDG_CACHE_HOME": str(self.home / ".cache"), "TMPDIR": str(self.root / "tmp"), **environ}
        ended = subprocess.run([*start, *words], cwd=self.work, env=clean, capture_output=True, timeout=300, check=False)
        after = self._snapshot()
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode(errors="backslashreplace"), changed)

    def _snapshot(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self.root.rglob("*"):
            status = path.lstat()
            # A folder's own time changes with its entries, which are listed themselves.
            found[str(path.relative_to(self.root))] = (0, 0) if path.is_dir() else (status.st_mtime_ns, status.st_size)
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("work", "home", "tmp"):
        (tmp_path / name).mkdir()
    return Place(tmp_path)


@pytest.fixture
def refused(place: Place) -> Callable[..., Ended]:
    """Runs a command line that must be refused: exit 2, one line a mistake, nothing else printed, nothing written."""

    def check(*words: str, mistakes: int = 1, says: tuple[str, ...] = (), **environ: str) -> Ended:
        ended = place.run(*words, **environ)
        assert "Traceback" not in ended.err, ended.err
        assert (ended.code, len(ended.lines)) == (2, mistakes), f"exit {ended.code}\n{ended.err}"
        assert ended.out == ""
        assert ended.changed == []
        for text in says:
            assert text in ended.err
        assert all(line.isprintable() for line in ended.lines), ended.err
        return ended

    return check
