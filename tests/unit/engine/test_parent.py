"""The parent of a run: however it is ended, no child goes on, no job file stays, and nothing of an earlier run is left.

A shell script stands in for the interpreter that runs the child, so that it can be slow, deaf or dead on command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PARENT = """
import signal, sys
from pathlib import Path
from kernel_pytorch.recipe.compose import compose
from kernel_pytorch.engine.parent import run_in_child
composed = compose(["model=decoder"])
sys.executable = sys.argv[1]
if len(sys.argv) > 2:
    signal.signal(signal.Signals[sys.argv[2]], signal.SIG_IGN)
result = run_in_child(composed, Path("out"))
print(result["verdict"], result["exit_code"])
"""
DEAF = "trap '' INT TERM HUP\necho $$ > pid.new\nmv pid.new pid\nexec sleep 600\n"
LISTENS = "trap 'exit 7' INT\necho $$ > pid.new\nmv pid.new pid\nwhile :; do sleep 0.05; done\n"


def start(folder: Path, body: str, *words: str) -> subprocess.Popen[bytes]:
    """A parent whose child runs `body`, in a process group of its own."""
    program = folder / "child.sh"
    program.write_text(f"#!/bin/sh\n{body}")
    program.chmod(0o755)
    command = [sys.executable, "-c", PARENT, str(program), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, start_new_session=True)


@pytest.fixture(autouse=True)
def _no_child_outlives_a_failed_test(tmp_path: Path) -> Iterator[None]:
    yield
    pid = tmp_path / "pid"
    if pid.is_file() and is_alive(int(pid.read_text())):
        os.kill(int(pid.read_text()), signal.SIGKILL)


def child_of(folder: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (folder / "pid").is_file():
            return int((folder / "pid").read_text())
        time.sleep(0.02)
    raise AssertionError("the child never started")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_interrupted(folder: Path, parent: subprocess.Popen[bytes], child: int) -> None:
    out, err = parent.communicate(timeout=15)
    assert (parent.returncode, out, err) == (0, b"interrupted 130\n", b"")
    assert not is_alive(child)
    assert sorted(os.listdir(folder / "out")) == ["result.json"]
    result = json.loads((folder / "out" / "result.json").read_text(encoding="utf-8"))
    assert (result["verdict"], result["exit_code"]) == ("interrupted", 130)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_parent_alone_ends_the_child(tmp_path: Path, name: str) -> None:
    parent = start(tmp_path, LISTENS)
    child = child_of(tmp_path)
    parent.send_signal(signal.Signals[name])
    assert_interrupted(tmp_path, parent, child)


@pytest.mark.parametrize("gap", [0.05, 0.35, 1.0])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_kills_a_child_that_does_not_listen(tmp_path: Path, name: str, gap: float) -> None:
    parent = start(tmp_path, DEAF)
    child = child_of(tmp_path)
    for _ in range(2):
        os.killpg(parent.pid, signal.Signals[name])
        time.sleep(gap)
    assert_interrupted(tmp_path, parent, child)


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path: Path) -> None:
    parent = start(tmp_path, LISTENS, "SIGHUP")
    child = child_of(tmp_path)
    parent.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert (parent.poll(), is_alive(child)) == (None, True)
    parent.send_signal(signal.SIGTERM)
    assert_interrupted(tmp_path, parent, child)


def test_sigterm_ends_a_child_that_inherited_an_ignored_sigint(tmp_path: Path) -> None:
    # What a shell without job control starts with `&`.
    parent = start(tmp_path, LISTENS, "SIGINT")
    child = child_of(tmp_path)
    parent.send_signal(signal.SIGTERM)
    assert_interrupted(tmp_path, parent, child)


def test_what_an_earlier_run_left_is_gone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("report.html", "recipe.yaml", "result.json", "log.txt", "notes.md"):
        (tmp_path / "out" / name).write_text("of an earlier run")
    parent = start(tmp_path, 'folder=$(dirname "$3")\necho \'{"verdict": "unsupported", "exit_code": 3}\' > "$folder/result.json"\n')
    out, err = parent.communicate(timeout=60)
    assert (out, err) == (b"unsupported 3\n", b"")
    assert sorted(os.listdir(tmp_path / "out")) == ["notes.md", "result.json"]


def has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_sigterm_lets_a_real_run_write_what_it_has(tmp_path: Path) -> None:
    words = ["compile=default", "model=decoder", "measure.num_rounds=10000", "data.length=32", "hydra.run.dir=out"]
    command = [sys.executable, "-m", "kernel_pytorch", *words]
    pipe = subprocess.PIPE
    parent = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, start_new_session=True)
    log = tmp_path / "out" / "log.txt"
    deadline = time.monotonic() + 60
    while not log.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(5)
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=60)
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert (parent.returncode, result["verdict"], result["exit_code"]) == (130, "interrupted", 130)
    assert b"Traceback" not in err
    assert sorted(os.listdir(tmp_path / "out")) == ["log.txt", "result.json"]
    # Compilers that the run had started end when they find it gone, on a busy machine a moment later.
    deadline = time.monotonic() + 20
    while has_processes(parent.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not has_processes(parent.pid)
